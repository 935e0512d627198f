"""A training step against diffusers and peft: same weights, batch, noise and levels give the same gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kontext.checkpoints import load_transformer
from kontext.data.batches import Batch
from kontext.lora.adapter import LoraLinear
from kontext.timesteps import Timesteps, loss_weights
from kontext.training.ahead import Pass
from kontext.training.feed import Example
from kontext.training.network import Network, build
from kontext.training.objective import Objective, masked_mean
from tests.tiny import CONTEXT_WIDTH, TEXT_LENGTH, VECTOR_WIDTH

RANK, ALPHA = 4, 2

# Our module of a block: the modules of diffusers that make up its rows, in order.
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)}


def theirs_of(name: str) -> list[str]:
    kind, block, rest = name.split(".", 2)
    prefix, table = (
        ("transformer_blocks", DOUBLE) if kind == "double_blocks" else ("single_transformer_blocks", SINGLE)
    )
    return [f"{prefix}.{block}.{part}" for part in table[rest]]


def example() -> Example:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    batch = Batch(
        latents=draw(2, 16, 8, 6),
        references=(draw(2, 16, 4, 10),),
        txt=draw(2, TEXT_LENGTH, CONTEXT_WIDTH),
        vector=draw(2, VECTOR_WIDTH),
        keys=("a", "b"),
    )
    u = torch.tensor([0.2, 0.9], dtype=torch.float64)
    return Example(epoch=0, index=0, share=1, batch=batch, noise=draw(2, 16, 8, 6), u=u)


def ids(index: int, rows: int, columns: int) -> Tensor:
    return torch.tensor([[float(index), y, x] for y in range(rows) for x in range(columns)])


def diffusers_loss(model: Any, example: Example, t: Tensor) -> Tensor:
    from diffusers import FluxKontextPipeline

    pack, batch = FluxKontextPipeline._pack_latents, example.batch
    mixed = (1 - t).view(-1, 1, 1, 1) * batch.latents + t.view(-1, 1, 1, 1) * example.noise
    tokens = torch.cat([pack(mixed, 2, 16, 8, 6), pack(batch.references[0], 2, 16, 4, 10)], 1)
    predicted = model(
        hidden_states=tokens,
        timestep=t,
        guidance=torch.ones(2),
        pooled_projections=batch.vector,
        encoder_hidden_states=batch.txt,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=torch.cat([ids(0, 4, 3), ids(1, 2, 5)]),
        return_dict=False,
    )[0][:, : 4 * 3]
    predicted = FluxKontextPipeline._unpack_latents(predicted, 64, 48, 8)
    return ((predicted - (example.noise - batch.latents)) ** 2).mean()


def adapters(files: Any) -> tuple[Any, dict[str, LoraLinear]]:
    transformer = load_transformer(files.dit, device=torch.device("cpu"), dtype=torch.float32)
    modules = build(transformer, Network(rank=RANK, alpha=ALPHA), seed=1)
    g = torch.Generator().manual_seed(5)
    for module in modules.values():
        module.lora_up.weight.data.copy_(0.3 * torch.randn(module.lora_up.weight.shape, generator=g))
    return transformer, modules


def peft_model(files: Any, modules: dict[str, LoraLinear]) -> Any:
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    model = FluxTransformer2DModel.from_pretrained(files.pipeline, subfolder="transformer")
    names = [name for ours in modules for name in theirs_of(ours)]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    for ours, module in modules.items():
        start = 0
        for name in theirs_of(ours):
            layer = model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(module.lora_down.weight)
            end = start + layer.out_features
            layer.lora_B["default"].weight.data.copy_(module.lora_up.weight[start:end])
            start = end
    return model


def test_gradients_are_those_of_diffusers_and_peft(tiny_files: Any) -> None:
    transformer, modules = adapters(tiny_files)
    theirs = peft_model(tiny_files, modules)
    sample = example()
    objective = Objective(transformer, Timesteps(), 1.0)
    t = objective.levels(sample)
    loss = objective.losses(Pass(sample, t)).mean()
    loss.backward()
    expected = diffusers_loss(theirs, sample, t)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, module in modules.items():
        layers = [theirs.get_submodule(part) for part in theirs_of(name)]
        down = sum(layer.lora_A["default"].weight.grad for layer in layers)
        up = torch.cat([layer.lora_B["default"].weight.grad for layer in layers])
        for found, wanted in ((module.lora_down.weight.grad, down), (module.lora_up.weight.grad, up)):
            assert (found - wanted).norm() / wanted.norm() < 1e-5, name


def test_the_model_is_told_the_level_of_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same float32 numbers mix the noise and reach the model."""
    told, mixed = [], []

    class Recorder:
        def __init__(self, transformer: Any, conditioning: Any) -> None:
            self.guidance = conditioning.guidance

        def __call__(self, x: Tensor, t: Tensor, modulations: Any) -> Tensor:
            told.append(t)
            mixed.append(x)
            return torch.zeros_like(x)

    monkeypatch.setattr("kontext.training.objective.Denoiser", Recorder)
    sample = example()
    objective = Objective(None, Timesteps(weighting="sigma_sqrt"), 1.0)  # type: ignore[arg-type]
    t = objective.levels(sample)
    losses = objective.losses(Pass(sample, t))
    assert t.dtype == torch.float32 and torch.equal(told[0], t)
    level = (mixed[0] - sample.batch.latents) / (sample.noise - sample.batch.latents)
    torch.testing.assert_close(level, t.view(2, 1, 1, 1).expand_as(level), rtol=1e-3, atol=1e-4)

    target = sample.noise - sample.batch.latents
    by_hand = torch.stack([target[i].square().mean() / t[i] ** 2 for i in range(2)])
    torch.testing.assert_close(losses, by_hand)  # each item has its own weight
    torch.testing.assert_close(loss_weights("sigma_sqrt", t), t**-2)


def test_only_what_the_mask_shows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's velocity gets no gradient outside, and inside that of the mean over the part that counts."""
    predicted = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()

    class Fixed:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, x: Tensor, *_: Any) -> Tensor:
            return predicted

    monkeypatch.setattr("kontext.training.objective.Denoiser", Fixed)
    masks = torch.ones(2, 1, 8, 6)
    masks[0] = 0
    masks[0, :, 2:5, 1:3], masks[0, :, 5, 1] = 1, 0.5
    plain = example()
    sample = replace(plain, batch=replace(plain.batch, masks=masks))
    objective = Objective(None, Timesteps(), 1.0)  # type: ignore[arg-type]
    losses = objective.losses(Pass(sample, objective.levels(sample)))

    squares = (predicted - (plain.noise - plain.batch.latents)).square().detach()
    counted = squares[0, :, 2:5, 1:3].sum() + 0.5 * squares[0, :, 5, 1].sum()
    assert losses[0].item() == pytest.approx(counted.item() / (16 * 6.5), rel=1e-5)
    assert losses[1].item() == pytest.approx(squares[1].mean().item(), rel=1e-5), "all of it counts"

    losses.sum().backward()
    gradient = predicted.grad
    assert gradient is not None
    assert (gradient[0][:, masks[0, 0] == 0] == 0).all() and (gradient[0][:, masks[0, 0] > 0] != 0).all()
    error = (predicted - (plain.noise - plain.batch.latents)).detach()
    torch.testing.assert_close(gradient[0, :, 3, 1], 2 * error[0, :, 3, 1] / (16 * 6.5))


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[[[1.0, 2.0]], [[3.0, 10.0]]]])  # two channels, two places
    assert masked_mean(values, torch.tensor([[[[1.0, 0.0]]]])).tolist() == [2.0]
    assert (
        masked_mean(values, torch.tensor([[[[0.5, 0.5]]]])).tolist()
        == masked_mean(values, None).tolist()
        == [4.0]
    )
    assert masked_mean(values, torch.tensor([[[[0.75, 0.25]]]])).tolist() == [3.0]
