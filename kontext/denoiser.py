"""The contract between the transformer and everything that calls it.

Training, validation, previews and generation all ask one question: given a noisy latent x (B, C, h, w) at
level t (B,), which way is noise? How latents become tokens, and where references lie, is known here only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kontext.model.latents import PATCH, pack, position_ids, unpack
from kontext.model.transformer import Modulations, Transformer


@dataclass(frozen=True)
class Conditioning:
    """What a picture is made from: text (B, T, D), pooled text (B, V), references (B, C, h, w), guidance.

    placement says where several references lie: see `reference_ids`.
    """

    txt: Tensor
    vector: Tensor
    references: tuple[Tensor, ...]
    guidance: float
    placement: str = "offset"


def reference_offsets(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where references of `sizes` (token rows, columns) lie: ComfyUI's "offset" placement.

    Each goes right of the area taken so far if that keeps it flatter than placing it below, else below. The
    first lies at the origin, and is told from the target by its index.
    """
    height = width = 0
    offsets = []
    for rows, columns in sizes:
        right = rows + height > columns + width
        offset = (0, width) if right else (height, 0)
        height, width = max(height, rows + offset[0]), max(width, columns + offset[1])
        offsets.append(offset)
    return offsets


class Denoiser:
    """Velocity (B, C, h, w) of x (B, C, h, w) at noise levels t (B,), under fixed conditioning: of B, or one for all.

    x and the result are float32; the transformer works in its own dtype. What no step changes is made once:
    embedded text and references, and their positions.
    """

    def __init__(self, transformer: Transformer, conditioning: Conditioning) -> None:
        self.transformer = transformer
        self.trunk = transformer.trunk  # what computes velocities: see `generation.step_cache`
        self.device, self.dtype = transformer.img_in.weight.device, transformer.img_in.weight.dtype
        self.vector, self.guidance = conditioning.vector, conditioning.guidance
        self.txt = transformer.txt_in(conditioning.txt.to(self.device, self.dtype))
        self.references = [self.embed(reference) for reference in conditioning.references]
        self.reference_ids = reference_ids(
            conditioning.references, conditioning.placement, device=self.device
        )
        self.positions: dict[tuple[int, int], Tensor] = {}
        self.prepared: dict[float, Modulations] = {}

    def __call__(self, x: Tensor, t: Tensor, modulations: Modulations | None = None) -> Tensor:
        """modulations: those of level t if they were computed ahead."""
        height, width = x.shape[-2:]
        img, txt = self.embed(x), self.txt.expand(len(x), -1, -1)
        references = [reference.expand(len(x), -1, -1) for reference in self.references]
        tokens = torch.cat((img, *references), 1)
        pe = self.positions_for(height, width)
        mods = modulations or self.modulations(t)
        velocity = self.trunk(tokens, txt, pe, mods, targets=img.shape[1])
        return unpack(velocity, height, width).float()

    def embed(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as embedded tokens (B, L, D)."""
        return self.transformer.img_in(pack(latents.to(self.device, self.dtype)))

    def positions_for(self, height: int, width: int) -> Tensor:
        """Rotations of text, target of latent size height x width, and references."""
        if (height, width) not in self.positions:
            target_ids = position_ids(height // PATCH, width // PATCH, device=self.device)
            ids = torch.cat((target_ids, *self.reference_ids))[None]
            txt_ids = torch.zeros(1, self.txt.shape[1], 3, device=self.device)
            self.positions[height, width] = self.transformer.positions(txt_ids, ids)
        return self.positions[height, width]

    def prepare(self, levels: Tensor) -> None:
        """Compute the modulation of noise levels (S,) at once: the weights for it are read only once."""
        t = levels[:, None].expand(-1, self.vector.shape[0])
        mods = self.transformer.modulations([self.condition(level) for level in t])
        self.prepared = dict(zip(levels.tolist(), mods, strict=True))

    def modulations(self, t: Tensor) -> Modulations:
        """The prepared modulation of level t (all of t equal), or a new one."""
        if self.prepared and (mods := self.prepared.get(t[0].item())) is not None:
            return mods
        return self.transformer.modulations([self.condition(t)])[0]

    def condition(self, t: Tensor) -> Tensor:
        return condition(self.transformer, self.vector, self.guidance, t)


def condition(transformer: Transformer, vector: Tensor, guidance: float, t: Tensor) -> Tensor:
    """The vector (B, D) that modulates all blocks, of pooled text (B, V), guidance strength and levels t (B,)."""
    weight = transformer.img_in.weight
    strength = torch.full(t.shape, guidance, device=weight.device)
    vector = vector.to(weight.device, weight.dtype, non_blocking=True)
    return transformer.condition(t.to(weight.device, non_blocking=True), vector, strength)


def reference_ids(
    references: tuple[Tensor, ...], placement: str = "offset", *, device: torch.device | None = None
) -> list[Tensor]:
    """Positions of the tokens of each reference latent, on `device`.

    "offset": all have index 1 and lie beside each other. "index": all lie at the origin, with the indices 1, 2, ...
    """
    sizes = [(r.shape[-2] // PATCH, r.shape[-1] // PATCH) for r in references]
    if placement == "index":
        return [position_ids(*size, index=number, device=device) for number, size in enumerate(sizes, 1)]
    return [
        position_ids(*size, index=1, offset=offset, device=device)
        for size, offset in zip(sizes, reference_offsets(sizes), strict=True)
    ]
