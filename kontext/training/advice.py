"""What is known to be useless: a sentence for each setting that almost surely is not what was meant."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kontext.lora.linear import AdapterLinear, LoraLinear
from kontext.training.schedules import LearningRate

# By optimizer: the learning rates between which anything useful has been seen, with a margin on both sides.
USUAL_RATES = {
    "AdamW": (1e-7, 1e-2), "AdamW8bit": (1e-7, 1e-2), "PagedAdamW8bit": (1e-7, 1e-2), "Adafactor": (1e-7, 1e-2),
    "AdamWScheduleFree": (1e-7, 2e-2), "Lion8bit": (1e-8, 2e-3), "Prodigy": (0.1, 10),
}  # fmt: skip
LEAST_STRENGTH, MOST_STRENGTH = 1 / 64, 16  # alpha / rank


@dataclass(frozen=True)
class Settings:
    """What advice is about. optimizer: the name of its class; modules: the adapters by name, if any are trained.

    relative: whether the optimizer takes a learning rate of its own, whatever it is given.
    """

    optimizer: str
    rates: Sequence[LearningRate]
    modules: Mapping[str, AdapterLinear]
    relative: bool = False


def advice(settings: Settings) -> Iterator[str]:
    """A sentence for each useless setting."""
    yield from _of_rates(settings)
    yield from _of_schedule(settings)
    yield from _of_ranks(settings.modules)
    yield from _of_strength(settings.modules)


def _of_rates(settings: Settings) -> Iterator[str]:
    if settings.relative:
        yield (
            f"With relative_step=True {settings.optimizer} sets its learning rate by the step: --learning-rate and "
            "--lr-scheduler do nothing, and the rate that is shown is not the one that acts."
        )
        return
    low, high = USUAL_RATES.get(settings.optimizer, (0.0, float("inf")))
    peaks = sorted({rate.peak for rate in settings.rates})
    if settings.optimizer == "Prodigy":
        if not low <= peaks[0] <= peaks[-1] <= high:
            yield (
                f"Prodigy finds the learning rate itself and multiplies it with --learning-rate, which is "
                f"{peaks[0]:g}: give 1."
            )
    elif peaks[-1] > high:
        yield (
            f"A learning rate of {peaks[-1]:g} (--learning-rate, lr_patterns or loraplus_lr_ratio) destroys the model with "
            f"{settings.optimizer}: usual are {high / 100:g} and less."
        )
    elif peaks[0] < low:
        yield (
            f"With a learning rate of {peaks[0]:g} (--learning-rate or lr_patterns) {settings.optimizer} learns next to "
            f"nothing: usual are {1000 * low:g} and more."
        )


def _of_schedule(settings: Settings) -> Iterator[str]:
    rate = settings.rates[0]
    if 0 < rate.total <= rate.warmup:
        yield f"--lr-warmup-steps {rate.warmup}: the run has {rate.total} steps, so the learning rate only rises."
    if settings.optimizer == "AdamWScheduleFree" and not rate.schedule.startswith("constant"):
        yield (
            f"--lr-scheduler {rate.schedule}: a schedule-free optimizer averages its weights instead; with a schedule "
            "beside it learns less. Leave it out."
        )


def _of_ranks(modules: Mapping[str, AdapterLinear]) -> Iterator[str]:
    """A product of (out, r) and (r, in) has no more than min(out, in) ranks."""
    limits = {
        name: min(module.base.in_features, module.base.out_features)
        for name, module in modules.items()
        if isinstance(module, LoraLinear)
    }
    above = [name for name, limit in limits.items() if modules[name].rank > limit]
    if above:
        first = above[0]
        yield (
            f"A rank of {modules[first].rank} is more than {limits[first]}, the most that {first} can have"
            f"{f', and so for {len(above) - 1} more modules' if above[1:] else ''}: a lower --network-dim learns the same."
        )


def _of_strength(modules: Mapping[str, AdapterLinear]) -> Iterator[str]:
    strengths = [module.scale for module in modules.values()]
    if strengths and min(strengths) < LEAST_STRENGTH:
        yield (
            f"alpha / rank is {min(strengths):.3g}, and what is learned counts so much only: raise --network-alpha to at "
            "least a sixteenth of the rank, or leave it out."
        )
    if strengths and max(strengths) > MOST_STRENGTH:
        yield (
            f"alpha / rank is {max(strengths):.3g}, and what is learned counts so many times: lower --network-alpha to the "
            "rank, or leave it out."
        )
