"""The report of a run: one HTML page that needs nothing but itself, `<output_dir>/<output_name>.html`."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
import torch

from kontext import __version__
from kontext.files import atomic_write
from kontext.training.charts import Bar, Line, bar_chart, line_chart, short, thin
from kontext.training.gallery import gallery
from kontext.training.history import History, Validation
from kontext.training.monitor import Smoothed
from kontext.training.plan import Plan

BINS = 20  # of the histogram of noise levels
BANDS = 10  # of the loss by noise level
SCALE = "0 clean, 1 noise"
PACKAGES = ("accelerate", "bitsandbytes", "safetensors", "transformers")

State = Literal["running", "finished", "interrupted", "stopped"]


@dataclass(frozen=True)
class Setting:
    """An option of the run. given: by the user, not by default."""

    name: str
    value: str
    given: bool


@dataclass(frozen=True)
class About:
    """What the page says of a run besides its history. samples: the folder of the sample pictures."""

    name: str
    plan: Plan
    settings: tuple[Setting, ...]
    versions: Mapping[str, str]
    samples: Path


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page, with a remark."""

    name: str
    value: str
    note: str


def versions(device: torch.device) -> dict[str, str]:
    """What the run depends on besides its settings."""
    cuda = device.type == "cuda"
    found = {"kontext": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    found |= {package: version(package) for package in PACKAGES}
    if cuda:
        found["CUDA"] = str(torch.version.cuda)
    processor = f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    return found | {
        "Device": torch.cuda.get_device_name(device) if cuda else processor,
        "System": platform.platform(terse=True),
    }


def write_report(path: Path, history: History, *, about: About, state: State, note: str = "") -> None:
    """Writes the page. note: why the run stopped. Raises UserError if the file cannot be written."""
    text = page(history, about=about, state=state, note=note)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(history: History, *, about: About, state: State, note: str = "") -> str:
    """The whole page."""
    plan = about.plan
    done = int(history.step[-1]) if len(history.step) else 0
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    average = smooth(history.loss)
    template = Template(files("kontext.training").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{about.name} · kontext training report"),
        name=escape(about.name),
        state=state,
        state_word=state.capitalize(),
        state_text=escape(f"{note} ({now})" if note else f"as of {now}"),
        steps=plan.steps,
        done=done,
        facts="".join(map(_tile, _facts(history, average, plan, state))),
        charts=_charts(history, average),
        gallery=gallery(history.samples, about.samples, lambda step: when(step, plan)),
        settings=_settings(about.settings),
        versions=_table("Versions", about.versions.items()),
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """The moving average (N,) that is shown while training; what is not a number does not count."""
    smoothed = Smoothed()
    averages = [smoothed.add(v) if math.isfinite(v) else smoothed.value for v in values.tolist()]
    return np.array(averages, dtype=np.float64)


def when(step: int, plan: Plan) -> str:
    """A point of the run in words, from the number of steps done."""
    if step == 0:
        return "Before training"
    return f"Step {step:,} · epoch {plan.epoch(step - 1) + 1}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest of them that are not zero."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _facts(history: History, average: np.ndarray, plan: Plan, state: State) -> list[Fact]:
    """What is to be seen first."""
    if not len(history.step):
        return [Fact("Step", "0", f"of {plan.steps:,}")]
    done = int(history.step[-1])
    pace = history.seconds / len(history.step)
    speed = f"{pace:.2f} s/step" if pace >= 1 else f"{1 / max(pace, 1e-9):.1f} steps/s"
    rates = list(dict.fromkeys(short(rate) for rate in history.rates[-1].tolist()))
    left = f"about {duration(pace * (plan.steps - done))} left" if state == "running" else ""
    return [
        Fact("Step", f"{done:,}", f"of {plan.steps:,}"),
        Fact("Epoch", f"{plan.epoch(done - 1) + 1:,}", f"of {plan.epochs:,}"),
        Fact("Loss", f"{average[-1]:.4g}", "moving average"),
        *_validation(history.validation),
        Fact("Learning rate", rates[0] if rates else "–", " ".join(["and", *rates[1:]]) if rates[1:] else ""),
        Fact("Speed", speed, "saving and sampling included"),
        Fact("Time", duration(history.seconds), left),
    ]


def _validation(found: Sequence[Validation]) -> list[Fact]:
    if not found:
        return []
    best = min(found, key=lambda one: one.loss)
    return [Fact("Validation loss", f"{found[-1].loss:.4g}", f"best {best.loss:.4g} at step {best.step:,}")]


def _tile(fact: Fact) -> str:
    note = f'<dd class="small">{escape(fact.note)}</dd>' if fact.note else ""
    return f"<div><dt>{escape(fact.name)}</dt><dd>{escape(fact.value)}</dd>{note}</div>"


def _charts(history: History, average: np.ndarray) -> str:
    drawn = [
        line_chart("Loss", _loss(history, average)),
        line_chart("Learning rate", _rates(history)),
        line_chart(
            "Gradient norm", _raw_and_average(history.step, history.norm, smooth(history.norm), "norm")
        ),
        noise_levels(history.levels),
        loss_by_level(history.levels, history.item_losses),
    ]
    return "".join(drawn)


def _loss(history: History, average: np.ndarray) -> list[Line]:
    lines = _raw_and_average(history.step, history.loss, average, "loss")
    if history.validation:
        steps = np.array([one.step for one in history.validation])
        losses = np.array([one.loss for one in history.validation])
        kept = thin(losses)
        lines.append(Line("validation", "other", steps[kept], losses[kept]))
    return lines


def _raw_and_average(steps: np.ndarray, raw: np.ndarray, average: np.ndarray, name: str) -> list[Line]:
    kept = thin(raw)
    return [Line(name, "raw", steps[kept], raw[kept]), Line("average", "main", steps[kept], average[kept])]


def _rates(history: History) -> list[Line]:
    """A line per parameter group whose learning rate is not that of a group before it."""
    different: list[np.ndarray] = []
    for rates in history.rates.T:
        if not any(np.array_equal(rates, other) for other in different):
            different.append(rates)
    lines = []
    for number, (rates, look) in enumerate(zip(different, ("main", "other", "third"), strict=False), 1):
        kept = thin(rates)
        name = "learning rate" if len(different) == 1 else f"group {number}"
        lines.append(Line(name, look, history.step[kept], rates[kept]))
    return lines


def noise_levels(levels: np.ndarray) -> str:
    """How often which noise levels were drawn; `levels` (M,) in 0..1."""
    counts, edges = np.histogram(levels, bins=BINS, range=(0, 1))
    total = max(len(levels), 1)
    bars = [
        Bar(low, high, float(count), f"{count / total:.1%} of all items")
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]
    return bar_chart("Noise levels drawn", bars, legend=SCALE, unit="noise level", value_name="items")


def loss_by_level(levels: np.ndarray, losses: np.ndarray) -> str:
    """Mean and count of `losses` (M,) in equal bands of `levels` (M,)."""
    known = np.isfinite(losses)
    levels, losses = levels[known], losses[known]
    counts, edges = np.histogram(levels, bins=BANDS, range=(0, 1))
    sums, _ = np.histogram(levels, bins=BANDS, range=(0, 1), weights=losses)
    bars = [
        Bar(low, high, total / count if count else None, f"{count:,} items")
        for low, high, total, count in zip(
            edges[:-1].tolist(), edges[1:].tolist(), sums.tolist(), counts.tolist(), strict=True
        )
    ]
    return bar_chart(
        "Loss by noise level", bars, legend=SCALE, unit="noise level", value_name="mean loss", labelled=True
    )


def _settings(settings: Sequence[Setting]) -> str:
    given = [(one.name, one.value) for one in settings if one.given]
    others = [(one.name, one.value) for one in settings if not one.given]
    hidden = (
        f"<details><summary>All other settings, at their defaults</summary>{_table('', others)}</details>"
    )
    return _table("Settings", given) + (hidden if others else "")


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    lines = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    return f"<table>{caption}{lines}</table>"
