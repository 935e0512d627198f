"""How much memory training and generation take, computed from sizes alone: nothing is loaded, no GPU is asked.

A *unit* is one tensor of tokens x width in the compute type. What blocks keep, and what is live at the worst moment,
is counted tensor by tensor in tests/memory/test_estimate.py. What CUDA's kernels need for themselves is not seen
there; `CONTEXT` covers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kontext.memory.weights import Placed, Weights
from kontext.model.autoencoder import AutoencoderConfig
from kontext.model.transformer import TransformerConfig

Policy = Literal["none", "selective", "whole", "offloaded"]
"""What a block keeps for its backward: all that this needs; its input and the attention's output; its input; nothing,
while its input waits on the host."""

CONTEXT = 500_000_000  # CUDA's own code and buffers
FLOAT32 = 4
IN_FLIGHT = 2  # checkpoints on their way to or from the host
# Live at the worst moment of one block, in units, for FLUX's MLP of four times the model's width.
FORWARD_UNITS = 20
BACKWARD_UNITS = 26


@dataclass(frozen=True)
class Part:
    """Bytes of one kind, on the device and on the host."""

    name: str
    device: int
    host: int = 0


@dataclass(frozen=True)
class Stage:
    """What is in memory together at one time."""

    name: str
    parts: tuple[Part, ...]

    @property
    def device(self) -> int:
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> int:
        return sum(part.host for part in self.parts)


@dataclass(frozen=True)
class Estimate:
    """Stages one after another: the peak is that of the largest."""

    stages: tuple[Stage, ...]

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.largest.device

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages)


@dataclass(frozen=True)
class Work:
    """One pass of the transformer: tokens of all items (text, target and references), bytes of a number."""

    batch: int
    tokens: int
    itemsize: int

    def unit(self, config: TransformerConfig) -> int:
        return self.batch * self.tokens * config.width * self.itemsize


@dataclass(frozen=True)
class Trained:
    """What is learned: its numbers (all float32), the optimizer's bytes for them, and the sum of its ranks.

    averaged: whether a moving average of it is kept.
    """

    parameters: int
    optimizer: int
    ranks: int = 0
    averaged: bool = False


def kept_units(config: TransformerConfig, policy: Policy) -> float:
    """Units that a block keeps: its input, q, k and v, the attention's output, the MLP before its activation."""
    everything = 5 + config.mlp_width / config.width
    return {"none": everything, "selective": 2, "whole": 1, "offloaded": 0}[policy]


def activations(config: TransformerConfig, work: Work, policies: Sequence[Policy], *, ranks: int = 0) -> Part:
    """What all blocks keep. ranks: of all adapters; their inner values are kept where nothing is recomputed."""
    unit, tokens = work.unit(config), work.batch * work.tokens
    lse = tokens * config.heads * FLOAT32
    kept = sum(round(kept_units(config, policy) * unit) for policy in policies)
    kept += lse * sum(policy in ("none", "selective") for policy in policies)
    kept += ranks * tokens * work.itemsize * policies.count("none") // len(policies)
    offloaded = policies.count("offloaded") * unit
    return Part("kept activations", kept + min(offloaded, IN_FLIGHT * unit), offloaded)


def training(
    weights: Weights, placed: Placed, trained: Trained, work: Work, policies: Sequence[Policy]
) -> Stage:
    """The step: backward through the last block, or the optimizer's turn if that takes more.

    policies: of each block in turn.
    """
    config, numbers = weights.config, trained.parameters * FLOAT32
    fixed = (
        *_weights(placed),
        Part("adapter", numbers * (2 if trained.averaged else 1)),
        Part("gradients", numbers),
        Part("optimizer", trained.optimizer),
        Part("CUDA context", CONTEXT),
    )
    kept = activations(config, work, policies, ranks=trained.ranks)
    block = Part("one block at work", BACKWARD_UNITS * work.unit(config) + weights.scratch)
    if kept.device + block.device < numbers:  # the optimizer's own copies, when activations are gone
        return Stage("training", (*fixed, Part("optimizer at work", numbers, kept.host)))
    return Stage("training", (*fixed, kept, block))


def denoising(weights: Weights, placed: Placed, work: Work, *, steps: int, adapter: int = 0) -> Stage:
    """All steps of a picture. adapter: bytes of LoRAs beside the weights."""
    config = weights.config
    vectors = (12 * config.double_blocks + 3 * config.single_blocks) * config.width
    return Stage(
        "denoising",
        (
            *_weights(placed),
            Part("adapter", adapter),
            Part("modulation of all steps", work.batch * steps * vectors * work.itemsize),
            Part("one block at work", FORWARD_UNITS * work.unit(config) + weights.scratch),
            Part("CUDA context", CONTEXT),
        ),
    )


def _weights(placed: Placed) -> tuple[Part, ...]:
    return Part("weights", placed.device, placed.host), Part("ring of streamed blocks", placed.ring)


def encoding_text(weights: int, *, heads: int, length: int, width: int, scratch: int = 0) -> Stage:
    """T5 and CLIP together, of `weights` bytes. heads, width: T5's; scratch: a quantised weight made plain."""
    scores = 3 * heads * length**2 * FLOAT32
    parts = (
        Part("weights", weights),
        Part("at work", scores + 8 * length * width * FLOAT32 + scratch),
        Part("CUDA context", CONTEXT),
    )
    return Stage("reading the prompt", parts)


def encoding_picture(config: AutoencoderConfig, weights: int, *, pixels: int, itemsize: int) -> Stage:
    """The worst moment is at full resolution: input, two convolutions, norm and activation of a block."""
    live = 5 if config.res_blocks > 1 else 4
    return _picture("encoding the reference", weights, live * config.widths[0] * pixels * itemsize)


def decoding_picture(config: AutoencoderConfig, weights: int, *, pixels: int, itemsize: int) -> Stage:
    """The worst moment is the first block of full resolution: input, norm and activation of the level below's width."""
    return _picture("decoding", weights, 3 * config.widths[1] * pixels * itemsize)


def _picture(name: str, weights: int, live: int) -> Stage:
    return Stage(name, (Part("weights", weights), Part("at work", live), Part("CUDA context", CONTEXT)))
