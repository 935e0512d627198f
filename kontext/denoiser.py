"""The contract between the transformer and everything that calls it.

Training, validation, previews and generation all ask one question: given a noisy latent x (B, C, h, w) at
level t (B,), which way is noise? How latents become tokens, and where references lie, is known here only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kontext.model.latents import PATCH, pack, position_ids, unpack
from kontext.model.transformer import Transformer


@dataclass(frozen=True)
class Conditioning:
    """What a picture is made from: text (B, T, D), pooled text (B, V), references (B, C, h, w), guidance."""

    txt: Tensor
    vector: Tensor
    references: tuple[Tensor, ...]
    guidance: float


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
    """Velocity (B, C, h, w) of x (B, C, h, w) at noise levels t (B,), under fixed conditioning.

    x and the result are float32; the transformer works in its own dtype. Tokens of references and their
    positions are made once and serve every step.
    """

    def __init__(self, transformer: Transformer, conditioning: Conditioning) -> None:
        self.transformer = transformer
        device, dtype = transformer.img_in.weight.device, transformer.img_in.weight.dtype
        self.txt = conditioning.txt.to(device, dtype)
        self.vector = conditioning.vector.to(device, dtype)
        self.txt_ids = torch.zeros(1, self.txt.shape[1], 3, device=device)
        self.references = [pack(reference.to(device, dtype)) for reference in conditioning.references]
        sizes = [(r.shape[-2] // PATCH, r.shape[-1] // PATCH) for r in conditioning.references]
        ids = [
            position_ids(*size, index=1, offset=offset)
            for size, offset in zip(sizes, reference_offsets(sizes), strict=True)
        ]
        self.reference_ids = [i[None].to(device) for i in ids]
        self.guidance = torch.full((self.txt.shape[0],), conditioning.guidance, device=device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = pack(x.to(self.txt.dtype))
        ids = position_ids(height // PATCH, width // PATCH)[None].to(x.device)
        velocity = self.transformer(
            torch.cat((tokens, *self.references), 1),
            torch.cat((ids, *self.reference_ids), 1),
            self.txt,
            self.txt_ids,
            t,
            self.vector,
            self.guidance,
            targets=tokens.shape[1],
        )
        return unpack(velocity, height, width).float()
