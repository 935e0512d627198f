from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kontext.generation.request import Request
from kontext.training.names import Names
from kontext.training.optimizers import evaluation_weights
from kontext.training.plan import Plan
from kontext.training.previews import GAP, Previews, Rhythm, Sample, grid, prepare
from tests.training.world import Run

PLAN = Plan(batches=4, accumulation=1, processes=1, steps=12)


def labels(rhythm: Rhythm) -> list[str | None]:
    return [rhythm.label(step, PLAN) for step in range(8)]


def test_a_step_that_ends_an_epoch_makes_one_set() -> None:
    rhythm = Rhythm(every_steps=2, every_epochs=1)
    assert labels(rhythm) == [None, "000002", None, "e000001", None, "000006", None, "e000002"]


def test_nothing_is_drawn_unasked() -> None:
    assert labels(Rhythm()) == [None] * 8


def test_grid_puts_references_before_the_sample() -> None:
    red, green, blue = (
        Image.new("RGB", size, colour)
        for size, colour in (((20, 10), "red"), ((10, 20), "lime"), ((10, 10), "blue"))
    )
    sheet = grid([(red, green), (blue,)])
    cell = 20  # the tallest sample
    assert sheet.size == (GAP + 40 + GAP + 10 + GAP, 2 * (cell + GAP) + GAP)
    assert sheet.getpixel((GAP + 20, GAP + 10)) == (255, 0, 0)
    assert sheet.getpixel((GAP + 40 + GAP + 5, GAP + 10)) == (0, 255, 0)
    assert sheet.getpixel((GAP + 10, GAP + cell + GAP + 10)) == (0, 0, 255)
    assert sheet.getpixel((GAP + 40 + 2, GAP + 10)) == (255, 255, 255)


def previews(run: Run, folder: Path, denoise: Callable[..., None], rhythm: Rhythm | None = None) -> Previews:
    """Of two samples, with `denoise` in the place of the pipeline's."""
    request = Request("", seed=1)
    sample = Sample(
        request, (), SimpleNamespace(framed=SimpleNamespace(request=request, width=16, height=16))
    )
    kontext = SimpleNamespace(
        transformer=lambda: run.transformer, denoise=denoise, autoencoder=lambda: torch.nn.Identity(),
        finish=lambda framed, latent: Image.new("RGB", (16, 16)), runtime=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    parameters = list(run.parameters.values())
    return Previews(
        kontext, [sample, sample], plan=PLAN, rhythm=rhythm or Rhythm(), team=run.team, names=Names(folder, "a"),
        weights=lambda: evaluation_weights(run.optimizer, parameters), drawn=lambda *_: None,
    )  # fmt: skip


def test_samples_are_broken_off_when_the_run_is_to_end_and_drawn_when_it_goes_on(tmp_path: Path) -> None:
    """Between two steps of a picture, with the weights in training back in their places."""
    run = Run(steps=4, optimizer="adamwschedulefree").go()
    weights, steps = run.weights(), []

    def denoise(conditioned: SimpleNamespace, on_step: Callable[[int, None], None]) -> None:
        for step in range(20):
            steps.append(step)
            on_step(step, None)

    drawing = previews(run, tmp_path, denoise, Rhythm(at_first=True, every_steps=4))
    run.transformer.train()
    assert not drawing.draw("000004", 4, lambda: len(steps) == 25)
    assert len(steps) == 25 and run.transformer.training and not (tmp_path / "sample").exists()
    assert all(torch.equal(run.weights()[name], weight) for name, weight in weights.items())
    with pytest.raises(KeyboardInterrupt):
        drawing.begin(4, lambda: True)
    drawing.begin(3)
    assert not (tmp_path / "sample").exists(), "none were due"
    drawing.begin(4)
    assert [path.name for path in tmp_path.glob("sample/*grid*")] == ["a_000004_grid.png"]
    steps.clear()
    drawing.begin(4)
    assert not steps, "they lie there"
    drawing.begin(0)
    assert (tmp_path / "sample" / "a_000000_grid.png").exists()


def test_a_schedule_free_run_is_sampled_with_its_average(tmp_path: Path) -> None:
    run = Run(steps=4, optimizer="adamwschedulefree").go()
    parameters = list(run.parameters.values())
    drawn_with: list[dict[str, torch.Tensor]] = []
    previews(run, tmp_path, lambda conditioned, watch: drawn_with.append(run.weights())).draw("000004", 4)
    with evaluation_weights(run.optimizer, parameters):
        expected = run.weights()
    found, _ = drawn_with
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in run.weights().items())


class Encoding:
    """In the place of Kontext: notes what is loaded, framed and conditioned."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.text_encoders = SimpleNamespace(free=lambda: self.seen.append("freed"))
        self.autoencoder = lambda: self.seen.append("autoencoder") or torch.nn.Identity()

    def frame(self, request: Request) -> SimpleNamespace:
        self.seen.append(f"frame {request.prompt}")
        return SimpleNamespace(request=request)

    def condition(self, framed: SimpleNamespace) -> SimpleNamespace:
        self.seen.append(f"condition {framed.request.prompt}")
        return SimpleNamespace(framed=framed)


def test_only_what_this_process_draws_is_encoded(tmp_path: Path) -> None:
    """But the first process has the references of all, for the grid."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(picture)
    requests = [Request(name, references=(picture,), seed=1) for name in "abc"]
    kontext = Encoding()
    samples = prepare(kontext, requests, range(3)[1::2])
    assert kontext.seen == ["frame b", "condition b", "freed", "autoencoder"]
    assert [sample.conditioned is not None for sample in samples] == [False, True, False]
    assert [sample.request for sample in samples] == requests and all(len(s.references) == 1 for s in samples)
    idle = Encoding()
    assert len(prepare(idle, requests, range(0))) == 3 and idle.seen == [], (
        "nothing is loaded to draw nothing"
    )
