"""Full-size random transformers: one set of weights, in our class and in diffusers', which share its memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from card import Sizes
from diffusers import FluxTransformer2DModel
from torch import Tensor

from kontext.checkpoints.names import SWAPPED, diffusers_modules, part_sizes
from kontext.checkpoints.transformer import block_linears, is_quantisable
from kontext.denoiser import Conditioning, Denoiser, reference_ids
from kontext.device import precision_of
from kontext.lora.adapter import attach
from kontext.lora.deltas import swap_halves
from kontext.memory.placement import Placement
from kontext.memory.policies import Policy
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.model.latents import PATCH, pack, position_ids
from kontext.model.transformer import FLUX, Modulations, Transformer, TransformerConfig
from kontext.quant import Mode, keep_in, quantise, quantised_linear

TINY = replace(
    FLUX,
    context_width=32,
    vector_width=16,
    width=64,
    heads=1,
    mlp_width=256,
    double_blocks=1,
    single_blocks=2,
    axes=(8, 28, 28),
)


def narrow(width: int, double: int, single: int) -> TransformerConfig:
    """FLUX's sizes with fewer heads of 128 channels and fewer blocks, for text of width 512."""
    return replace(
        FLUX,
        context_width=512,
        vector_width=256,
        width=width,
        heads=width // 128,
        mlp_width=4 * width,
        double_blocks=double,
        single_blocks=single,
    )


# diffusers rounds both, times 1000, to the model's type: these are the same number in bfloat16.
GUIDANCE = 2.0
LEVEL = 0.5

Weights = dict[str, Tensor]


def random_weights(
    config: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    on_host: Callable[[str], bool] = lambda name: False,
) -> Weights:
    """Under BFL's names; made on the device, of deviation 1/sqrt(inputs). `on_host`: names of those that leave it."""
    torch.manual_seed(0)
    made = {}
    for name, shape in shapes(config).items():
        tensor = torch.zeros(shape, device=device, dtype=dtype)
        if name.endswith("scale"):
            tensor.fill_(1)
        elif len(shape) > 1:
            tensor.normal_(std=shape[1] ** -0.5)
        made[name] = tensor.cpu() if on_host(name) else tensor
    return made


def shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def ours(config: TransformerConfig, weights: Weights) -> Transformer:
    """As the commands arrange it where --dtype is the weights' type."""
    with torch.device("meta"):
        model = Transformer(config)
    first = weights["img_in.weight"]
    precision = precision_of(str(first.dtype).removeprefix("torch."), first.device)
    if precision.computing != precision.kept:
        narrow = keep_in(model, block_linears(model), precision.kept)
        weights = {n: w if n in narrow else w.to(precision.computing) for n, w in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def theirs(config: TransformerConfig, weights: Weights) -> FluxTransformer2DModel:
    """The parts of fused weights are rows of them, so nothing but the final modulation is copied."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=config.width // config.heads,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_width,
            pooled_projection_dim=config.vector_width,
            guidance_embeds=config.guidance,
            axes_dims_rope=config.axes,
        )
    state = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        whole = swap_halves(tensor) if module == SWAPPED else tensor
        rows = part_sizes(module, width=config.width, mlp_width=config.mlp_width) or (len(tensor),)
        for part, values in zip(diffusers_modules(module), whole.split(rows), strict=True):
            state[f"{part}.{'weight' if kind == 'scale' else kind}"] = values
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def exact(config: TransformerConfig, weights: Weights) -> FluxTransformer2DModel:
    """diffusers' in float32: what both sides are to compute in any precision."""
    return theirs(config, {name: tensor.float() for name, tensor in weights.items()})


def rounded(model: Transformer, mode: Mode) -> Transformer:
    """The model with the linears of its blocks in few bits, as loading does it."""
    for name, module in list(model.named_modules()):
        if is_quantisable(name, module):
            layer = quantised_linear(quantise(module.weight.detach(), mode), module.bias, mode)
            model.set_submodule(name, layer.requires_grad_(False))
    return model


@dataclass(frozen=True)
class Setup:
    """How a transformer is arranged for training: LoRA, what blocks keep, where weights lie."""

    rank: int = 0
    policy: Policy | None = None
    placement: Placement = Placement()

    def apply(self, model: Transformer, device: torch.device) -> Transformer:
        """In the order in which training does it."""
        if self.rank:
            attach(model, rank=self.rank, alpha=self.rank, seed=0, device=device)
        if self.policy:
            remake_blocks(model, self.policy)
        self.placement.apply(model, device)
        if self.policy:
            recompute_blocks(model, self.policy)
        return model


@dataclass(frozen=True)
class Picture:
    """One picture in the making: noisy latent and reference (1, 16, h, w), text, pooled text, and its noise level."""

    latent: Tensor
    reference: Tensor
    txt: Tensor
    vector: Tensor
    level: float

    @classmethod
    def random(
        cls, sizes: Sizes, device: torch.device, dtype: torch.dtype, *, level: float = LEVEL
    ) -> "Picture":
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        config, edge = sizes.config, sizes.side * PATCH
        channels = config.in_channels // PATCH**2
        return cls(
            draw(1, channels, edge, edge).to(dtype).float(),
            draw(1, channels, edge, edge).to(dtype),
            draw(1, sizes.text, config.context_width).to(dtype),
            draw(1, config.vector_width).to(dtype),
            level,
        )

    def to(self, dtype: torch.dtype) -> "Picture":
        """The same numbers, for a model that computes in `dtype`."""
        parts = {name: getattr(self, name).to(dtype) for name in ("reference", "txt", "vector")}
        return replace(self, **parts)

    def denoiser(self, model: Transformer) -> Denoiser:
        return Denoiser(model, Conditioning(self.txt, self.vector, (self.reference,), GUIDANCE))

    @torch.no_grad()
    def modulations(self, model: Transformer) -> Modulations:
        """Of this level, computed ahead."""
        denoiser = self.denoiser(model)
        return model.modulations([denoiser.condition(torch.tensor([self.level]))])[0]

    def step(self, model: Transformer) -> Callable[[], Tensor]:
        """A step of sampling: (1, 16, h, w). The level's modulation, text and reference are prepared before."""
        with torch.no_grad():
            denoiser, mods = self.denoiser(model), self.modulations(model)
        t = torch.tensor([self.level])
        return lambda: denoiser(self.latent, t, mods)

    def velocity(self, model: Transformer, mods: Modulations | None = None) -> Tensor:
        """As training computes it."""
        return self.denoiser(model)(self.latent, torch.tensor([self.level]), mods)

    @property
    def targets(self) -> int:
        """Tokens of the target."""
        return self.latent.shape[-2] * self.latent.shape[-1] // PATCH**2

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Target and reference (1, L, 64), and their positions (L, 3)."""
        rows = self.latent.shape[-1] // PATCH
        ids = torch.cat((position_ids(rows, rows), *reference_ids((self.reference,)))).to(self.txt.device)
        return torch.cat((pack(self.latent.to(self.txt.dtype)), pack(self.reference)), 1), ids

    def whole(self, model: Transformer) -> Callable[[], Tensor]:
        """The velocity of all tokens, also of the reference's, which nothing needs: (1, L, 64)."""
        same = self.to(model.img_in.weight.dtype)
        tokens, ids = same.tokens()
        txt_ids = torch.zeros(1, self.txt.shape[1], 3, device=self.txt.device)
        t, guidance = torch.tensor([[self.level], [GUIDANCE]], device=self.txt.device)
        return lambda: model(tokens, ids[None], same.txt, txt_ids, t, same.vector, guidance)

    def peer(self, model: FluxTransformer2DModel) -> Callable[[], Tensor]:
        """The same of diffusers' model, which computes all tokens: (1, L, 64)."""
        device, dtype = self.txt.device, self.txt.dtype
        tokens, ids = self.tokens()
        inputs = {
            "hidden_states": tokens,
            "encoder_hidden_states": self.txt,
            "pooled_projections": self.vector,
            "timestep": torch.tensor([self.level], device=device, dtype=dtype),
            "img_ids": ids,
            "txt_ids": torch.zeros(self.txt.shape[1], 3, device=device),
            "guidance": torch.tensor([GUIDANCE], device=device, dtype=dtype),
            "return_dict": False,
        }
        return lambda: model(**inputs)[0]

    def peer_step(self, model: FluxTransformer2DModel) -> Callable[[], Tensor]:
        """What is left of that for the target: (1, targets, 64)."""
        run = self.peer(model)
        return lambda: run()[:, : self.targets]
