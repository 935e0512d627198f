"""What a run needs memory for, whatever is chosen about it; a setup then says how much."""

from dataclasses import dataclass, replace
from typing import TypeVar

from kontext.memory.choice import Setup
from kontext.memory.estimate import (
    CONTEXT,
    Estimate,
    Part,
    Stage,
    Trained,
    Work,
    decoding_picture,
    denoising,
    encoding_picture,
    reading_text,
    training,
    weight_parts,
)
from kontext.memory.weights import Placed, Weights
from kontext.model.autoencoder import AutoencoderConfig

Needs = TypeVar("Needs", "TrainingNeeds", "PictureNeeds")

STRIPS = 100_000_000  # bytes of the strips that the autoencoder works in, at the worst moment


@dataclass(frozen=True)
class Pictures:
    """The largest picture that is made: its pass of the transformer, its steps, its pixels and those of a reference.

    passes: 2 with true guidance.
    """

    work: Work
    steps: int
    pixels: int
    reference: int = 0
    passes: int = 1


@dataclass(frozen=True)
class Vae:
    """An autoencoder: sizes, bytes of its weights and of a number; whether it works in strips."""

    config: AutoencoderConfig
    weights: int
    itemsize: int
    tiled: bool = False

    def encoding(self, pixels: int) -> Stage:
        whole = encoding_picture(self.config, self.weights, pixels=pixels, itemsize=self.itemsize)
        return self._stage(whole, pixels, 2 * self.config.widths[0])

    def decoding(self, pixels: int) -> Stage:
        whole = decoding_picture(self.config, self.weights, pixels=pixels, itemsize=self.itemsize)
        return self._stage(whole, pixels, self.config.widths[0] + self.config.widths[1])

    def _stage(self, whole: Stage, pixels: int, channels: int) -> Stage:
        """In strips only a layer's input and output exist in full: `channels` together."""
        weights, maps = whole.parts
        if not self.tiled:
            return whole
        return Stage(whole.name, (weights, Part(maps.name, channels * pixels * self.itemsize + STRIPS)))


@dataclass(frozen=True)
class Text:
    """The text encoders: bytes of their weights, T5's heads and width, the length it reads, bytes of a plain weight."""

    weights: int
    heads: int
    width: int
    length: int
    scratch: int = 0

    def reading(self) -> Stage:
        return reading_text(
            self.weights, heads=self.heads, length=self.length, width=self.width, scratch=self.scratch
        )


@dataclass(frozen=True)
class TrainingNeeds:
    """A training run. work: its largest batch; ahead: items whose modulation is computed together.

    whole_modulation: whether modulation is trained, and so never leaves the device. pictures, vae, text: of the
    samples, if there are any. context: as in Estimate.
    """

    weights: Weights
    trained: Trained
    work: Work
    ahead: int
    whole_modulation: bool = False
    pictures: Pictures | None = None
    vae: Vae | None = None
    text: Text | None = None
    context: int = CONTEXT

    def estimate(self, setup: Setup) -> Estimate:
        config = self.weights.config
        policies = setup.mix.of(config.double_blocks + config.single_blocks)
        placed = self._placed(setup)
        ahead = self.ahead if setup.placement.modulation else 1
        step = training(self.weights, placed, self.trained, self.work, policies, ahead=ahead)
        return Estimate((*self._before(), step, *self._samples(setup)), self.context)

    def _placed(self, setup: Setup) -> Placed:
        """The frozen weights."""
        away = setup.placement.modulation and not self.whole_modulation
        placed = self.weights.placed(replace(setup.placement, modulation=away))
        return replace(placed, device=placed.device - self.trained.replaces)

    def _before(self) -> tuple[Stage, ...]:
        """What the samples need before the transformer is loaded."""
        if self.pictures is None or self.vae is None or self.text is None:
            return ()
        encoding = (self.vae.encoding(self.pictures.reference),) if self.pictures.reference else ()
        return (self.text.reading(), *encoding)

    def _samples(self, setup: Setup) -> tuple[Stage, ...]:
        """Samples are made beside everything that training keeps, but gradients."""
        if self.pictures is None or self.vae is None:
            return ()
        placed = self._placed(setup)
        steps = denoising(
            self.weights, placed, self.pictures.work, steps=self.pictures.steps * self.pictures.passes
        )
        decoding = self.vae.decoding(self.pictures.pixels).beside(weight_parts(placed))
        return tuple(stage.beside(self.trained.parts()) for stage in (steps, decoding))


@dataclass(frozen=True)
class PictureNeeds:
    """Making pictures. adapter: bytes of LoRAs beside the weights; keep: whether models stay after their stage."""

    weights: Weights
    pictures: Pictures
    vae: Vae
    text: Text
    adapter: int = 0
    keep: bool = False
    context: int = CONTEXT

    def estimate(self, setup: Setup) -> Estimate:
        pictures, placed = self.pictures, self.weights.placed(setup.placement)
        steps = denoising(self.weights, placed, pictures.work, steps=pictures.steps * pictures.passes)
        model = (*weight_parts(placed), Part("adapter", self.adapter))
        vae, text = Part("autoencoder", self.vae.weights), Part("text encoders", self.text.weights)
        stages = [
            (self.text.reading(), (vae, *model)),
            (steps.beside([Part("adapter", self.adapter)]), (vae, text)),
            (self.vae.decoding(pictures.pixels), (text, *model)),
        ]
        if pictures.reference:
            stages.insert(0, (self.vae.encoding(pictures.reference), (text, *model)))
        return Estimate(
            tuple(stage.beside(others) if self.keep else stage for stage, others in stages), self.context
        )


def in_strips(needs: Needs, tiled: bool = True) -> Needs:
    """The same with the autoencoder working in strips, or not."""
    return needs if needs.vae is None else replace(needs, vae=replace(needs.vae, tiled=tiled))
