"""From noise to finished latents: schedule, guidance and sampler as a request says."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kontext.console import say
from kontext.denoiser import Denoiser
from kontext.errors import UserError
from kontext.flow import schedule
from kontext.generation.stages import Conditioned
from kontext.generation.step_cache import StepCache
from kontext.model.latents import PATCH, PIXELS_PER_TOKEN, draw_noise
from kontext.model.transformer import Transformer
from kontext.sampler import SAMPLERS, Denoise

OnStep = Callable[[int, Tensor], None]
"""Called with the number of each step that is done, from 0, and the latents (B, C, h, w) that it points at."""


def true_guidance(positive: Denoise, negative: Denoise, scale: float) -> Denoise:
    """negative + scale * (positive - negative), in two passes (Ho & Salimans 2022; diffusers' `true_cfg_scale`)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        away = negative(x, t)
        return away + scale * (positive(x, t) - away)

    return denoise


@torch.no_grad()
def denoise(
    model: Transformer,
    conditioned: Conditioned,
    seeds: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_step: OnStep | None = None,
    step_cache: float = 0.0,
) -> Tensor:
    """The finished latents (B, C, h, w) of all seeds in one batch, float32 on the CPU.

    dtype: the model's, for messages. step_cache: threshold of a `StepCache`, 0 for none. Raises UserError at the first
    step that leaves NaN or infinite values.
    """
    framed, request = conditioned.framed, conditioned.framed.request
    tokens = (framed.height // PIXELS_PER_TOKEN) * (framed.width // PIXELS_PER_TOKEN)
    sigmas = schedule(request.steps, tokens, kind=request.schedule, flow_shift=request.flow_shift)
    sigmas = sigmas[request.skipped_steps :]
    channels = model.config.out_channels // PATCH**2
    shape, packed = (framed.height, framed.width, channels), request.noise_layout == "packed"
    noise = torch.cat([draw_noise(seed, *shape, packed=packed) for seed in seeds]).to(device)
    sides = _sides(model, conditioned, sigmas)
    caches = _cached(sides, step_cache) if step_cache else []
    x, velocity = noise, sides[0] if len(sides) == 1 else true_guidance(*sides, request.true_cfg_scale)
    if framed.canvas is not None:
        x, velocity = framed.canvas.start(noise, sigmas[:1]), framed.canvas.within(velocity, noise)
    watch = _Watch(x, sigmas, dtype, on_step)
    latents = SAMPLERS[request.sampler](velocity, x, sigmas, on_step=watch).cpu()
    if caches:
        skipped, passes = sum(cache.skipped for cache in caches), sum(cache.passes for cache in caches)
        say(f"Step cache: {skipped} of {passes} passes were the first block alone.")
    return latents


def _cached(sides: Sequence[Denoiser], threshold: float) -> list[StepCache]:
    """Lets each side skip steps by a cache of its own."""
    caches = [StepCache(side.transformer, threshold) for side in sides]
    for side, cache in zip(sides, caches, strict=True):
        side.trunk = cache
    return caches


def _sides(model: Transformer, conditioned: Conditioned, sigmas: Tensor) -> list[Denoiser]:
    """What is steered towards, and with true guidance what away from."""
    sides = []
    for conditioning in (conditioned.positive, conditioned.negative):
        if conditioning is not None:
            side = Denoiser(model, conditioning)
            side.prepare(sigmas[:-1])
            sides.append(side)
    return sides


class _Watch:
    """Listens to a sampler: stops at values that are not finite, and tells where each step points."""

    def __init__(self, x: Tensor, sigmas: Tensor, dtype: torch.dtype, on_step: OnStep | None) -> None:
        self.x, self.sigmas = x, sigmas.tolist()
        self.dtype, self.on_step = dtype, on_step

    def __call__(self, step: int, x: Tensor) -> None:
        check_finite(x, f"Step {step + 1}: the latents became NaN or infinite", "--dtype", self.dtype)
        if self.on_step is not None:
            old, new = self.sigmas[step : step + 2]
            self.on_step(step, x + new / (old - new) * (x - self.x))  # the straight line on, to level 0
        self.x = x


def check_finite(values: Tensor, what: str, option: str, dtype: torch.dtype) -> None:
    """Raise UserError, beginning with `what`, for NaN or infinite values that came of computing in `dtype`."""
    if torch.isfinite(values).all():
        return
    if dtype == torch.float16:
        raise UserError(f"{what}: float16 overflows. Use {option} bfloat16 or {option} float32.")
    raise UserError(f"{what}. Try {option} float32; if that fails too, the weights or a LoRA are damaged.")
