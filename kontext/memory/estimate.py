"""How much memory training and generation take, computed from sizes alone: nothing is loaded, no GPU is asked.

A *unit* is one tensor of tokens x width in the compute type. What blocks keep, and what is live at the worst moment,
is counted tensor by tensor in tests/memory/test_estimate.py. What CUDA's kernels need for themselves is not seen
there; `CONTEXT` covers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kontext.memory.policies import Policy
from kontext.memory.weights import Placed, Weights
from kontext.model.autoencoder import AutoencoderConfig
from kontext.model.transformer import TransformerConfig

TRAINING_STEP = "a training step"
CONTEXT = 500_000_000  # CUDA's own code and buffers
FLOAT32 = 4
IN_FLIGHT = 2  # checkpoints on their way to or from the host
# Live at the worst moment beside what blocks keep, in units, for FLUX's MLP of four times the model's width. In a
# forward pass: the stream, and image and text before they were joined and before the blocks, linear1's 7, the
# attention's output, linear2's 5 and its result.
FORWARD_UNITS = 18
BACKWARD_UNITS: dict[Policy, int] = {"none": 13, "selective": 21, "whole": 24, "offloaded": 24}


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

    def beside(self, parts: Sequence[Part]) -> "Stage":
        """The same while `parts` are there too."""
        return Stage(self.name, (*parts, *self.parts))


@dataclass(frozen=True)
class Estimate:
    """Stages one after another: the peak is that of the largest. context: bytes that the device itself takes."""

    stages: tuple[Stage, ...]
    context: int = CONTEXT

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.largest.device + self.context

    @property
    def host(self) -> int:
        """Bytes on the host, at most."""
        return max(stage.host for stage in self.stages)


@dataclass(frozen=True)
class Work:
    """One pass of the transformer: tokens of an item (text, target and references), bytes of a number."""

    batch: int
    tokens: int
    itemsize: int

    def unit(self, config: TransformerConfig) -> int:
        return self.batch * self.tokens * config.width * self.itemsize


@dataclass(frozen=True)
class Trained:
    """What is learned, beside the weights or in their place: its numbers, and the optimizer's bytes for them.

    itemsize: bytes of a number; ranks: the sum of all adapters' ranks; averaged: whether a moving average is kept.
    outputs: whether the adapters keep what they put out; scratch, units: what a block's pass takes for them, in bytes
    and in units.
    replaces: bytes of the model's weights that are trained themselves; rounded: of the copies in the compute type that
    are made of these in use.
    """

    parameters: int
    optimizer: int
    itemsize: int = FLOAT32
    ranks: int = 0
    averaged: bool = False
    replaces: int = 0
    rounded: int = 0
    outputs: bool = False
    scratch: int = 0
    units: int = 0

    @property
    def nbytes(self) -> int:
        return self.parameters * self.itemsize

    @property
    def average(self) -> int:
        """Bytes of the moving average, which is float32 whatever the weights are."""
        return self.parameters * FLOAT32 if self.averaged else 0

    def parts(self) -> tuple[Part, ...]:
        """What is there all the time."""
        name = "trained weights" if self.replaces else "adapter"
        return Part(name, self.nbytes + self.average), Part("optimizer", self.optimizer)


def weight_parts(placed: Placed) -> tuple[Part, ...]:
    return Part("weights", placed.device, placed.host), Part("ring of streamed blocks", placed.ring)


def modulation(config: TransformerConfig, work: Work, times: int) -> Part:
    """The vectors that the blocks are modulated with, computed for `times` passes together."""
    vectors = (12 * config.double_blocks + 3 * config.single_blocks) * config.width
    return Part("modulation vectors", times * work.batch * vectors * work.itemsize)


def kept_units(config: TransformerConfig, policy: Policy) -> float:
    """Units that a block keeps: its input, q, k and v, the attention's output, the MLP before its activation."""
    everything = 5 + config.mlp_width / config.width
    return {"none": everything, "selective": 2, "whole": 1, "offloaded": 0}[policy]


def output_units(config: TransformerConfig, policy: Policy, *, double: bool) -> float:
    """Units that are kept more where all outputs of linears are: those of the narrow ones, and what is made again."""
    narrow, wide = (2 if double else 1), 3 + config.mlp_width / config.width
    return {"none": narrow, "selective": wide + narrow, "whole": 0, "offloaded": 0}[policy]


def activations(
    config: TransformerConfig,
    work: Work,
    policies: Sequence[Policy],
    *,
    ranks: int = 0,
    outputs: bool = False,
) -> Part:
    """What all blocks keep. ranks: of all adapters, whose inner values are kept where a block is not run again."""
    unit, tokens = work.unit(config), work.batch * work.tokens
    once = sum(policy in ("none", "selective") for policy in policies)
    kept = sum(round(kept_units(config, policy) * unit) for policy in policies)
    if outputs:
        doubles = config.double_blocks
        each = (output_units(config, p, double=i < doubles) for i, p in enumerate(policies))
        kept += round(sum(each) * unit)
    kept += once * tokens * config.heads * FLOAT32  # log-sums of attention
    kept += ranks * tokens * work.itemsize * once // len(policies)
    offloaded = policies.count("offloaded") * unit
    return Part("kept activations", kept + min(offloaded, IN_FLIGHT * unit), offloaded)


def training(
    weights: Weights,
    placed: Placed,
    trained: Trained,
    work: Work,
    policies: Sequence[Policy],
    *,
    ahead: int = 1,
) -> Stage:
    """A step: backward through one block, or the optimizer's turn if that takes more.

    policies: of each block in turn. ahead: items whose modulation is computed together.
    """
    config = weights.config
    fixed = (*weight_parts(placed), *trained.parts(), Part("gradients", trained.nbytes))
    rounded = trained.rounded if "none" in policies else IN_FLIGHT * trained.rounded // len(policies)
    block = max(BACKWARD_UNITS[policy] for policy in policies) + trained.units
    scratch = weights.scratch + trained.scratch
    busy = (
        activations(config, work, policies, ranks=trained.ranks, outputs=trained.outputs),
        modulation(config, work, -(-ahead // work.batch)),
        Part("one block at work", block * work.unit(config) + scratch + rounded),
    )
    if (
        sum(part.device for part in busy) < trained.nbytes
    ):  # the optimizer's own copies, when activations are gone
        return Stage("a step of the optimizer", (*fixed, Part("copies at work", trained.nbytes)))
    return Stage(TRAINING_STEP, (*fixed, *busy))


def denoising(weights: Weights, placed: Placed, work: Work, *, steps: int) -> Stage:
    """All steps of a picture."""
    config = weights.config
    busy = Part("one block at work", FORWARD_UNITS * work.unit(config) + weights.scratch)
    return Stage("denoising", (*weight_parts(placed), modulation(config, work, steps), busy))


def reading_text(weights: int, *, heads: int, length: int, width: int, scratch: int = 0) -> Stage:
    """T5 and CLIP together, of `weights` bytes. heads, width: T5's; scratch: a quantised weight made plain."""
    work = 3 * heads * length**2 * FLOAT32 + 8 * length * width * FLOAT32 + scratch
    return Stage("reading the prompt", (Part("weights", weights), Part("at work", work)))


def encoding_picture(config: AutoencoderConfig, weights: int, *, pixels: int, itemsize: int) -> Stage:
    """The worst moment is at full resolution: input, two convolutions, norm and activation of a block."""
    live = 5 if config.res_blocks > 1 else 4
    work = Part("at work", live * config.widths[0] * pixels * itemsize)
    return Stage("encoding a reference", (Part("autoencoder", weights), work))


def decoding_picture(config: AutoencoderConfig, weights: int, *, pixels: int, itemsize: int) -> Stage:
    """The worst moment is the first block of full resolution: input, norm and activation of the level below's width."""
    work = Part("at work", 3 * config.widths[1] * pixels * itemsize)
    return Stage("decoding the picture", (Part("autoencoder", weights), work))
