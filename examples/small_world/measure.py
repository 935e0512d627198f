"""How well a small world follows its edits, on scenes that it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from kontext import flow
from kontext.denoiser import Conditioning, Denoiser
from kontext.model.autoencoder import Autoencoder
from kontext.model.latents import draw_noise
from kontext.sampler import euler
from small_world import scenes
from small_world.base import SmallWorld, Words
from small_world.pictures import edit_error, from_unit, to_bytes, to_unit

STEPS = 8
GUIDANCE = 2.5
TOKENS = (scenes.SIZE // 16) ** 2


@dataclass(frozen=True)
class Score:
    """Mean edit errors, 0..255: of doing nothing, of the autoencoder on the true picture, of the model."""

    kind: str
    nothing: float
    autoencoder: float
    model: float


@torch.no_grad()
def follow(
    world: SmallWorld, autoencoder: Autoencoder, words: Words, references: Tensor, instructions: list[str]
) -> Tensor:
    """References (B, 3, 64, 64) after their instructions, uint8."""
    device = next(world.parameters()).device
    txt, vector = world.text(tuple(ids.to(device) for ids in words(instructions)))
    latents = autoencoder.encode(to_unit(references).to(device))
    noise = torch.cat([draw_noise(seed, scenes.SIZE, scenes.SIZE) for seed in range(len(references))])
    denoise = Denoiser(world.transformer, Conditioning(txt, vector, (latents,), GUIDANCE))
    result = euler(denoise, noise.to(device), flow.schedule(STEPS, TOKENS))
    return from_unit(autoencoder.decode(result)).cpu()


@torch.no_grad()
def score(kind: str, world: SmallWorld, autoencoder: Autoencoder, words: Words, count: int = 32) -> Score:
    """Errors of one kind of edit over `count` held-out scenes."""
    edits = [scenes.edit(scenes.HELD_OUT + i, (kind,)) for i in range(count)]
    before = torch.stack([to_bytes(scenes.draw(edit.reference)) for edit in edits])
    after = torch.stack([to_bytes(scenes.draw(edit.target)) for edit in edits])
    result = follow(world, autoencoder, words, before, [edit.instruction for edit in edits])
    device = next(autoencoder.parameters()).device
    decoded = from_unit(autoencoder.decode(autoencoder.encode(to_unit(after).to(device)))).cpu()

    def error(pictures: Tensor) -> float:
        return mean(edit_error(*three) for three in zip(before, after, pictures, strict=True))

    return Score(kind, nothing=error(before), autoencoder=error(decoded), model=error(result))
