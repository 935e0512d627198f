from pathlib import Path
from types import SimpleNamespace

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


def test_a_schedule_free_run_is_sampled_with_its_average(tmp_path: Path) -> None:
    run = Run(steps=4, optimizer="adamwschedulefree").go()
    parameters = list(run.parameters.values())
    drawn_with: list[dict[str, torch.Tensor]] = []
    request = Request("", seed=1)
    sample = Sample(
        request, (), SimpleNamespace(framed=SimpleNamespace(request=request, width=16, height=16))
    )
    kontext = SimpleNamespace(
        transformer=lambda: run.transformer, denoise=lambda conditioned: drawn_with.append(run.weights()),
        autoencoder=lambda: torch.nn.Identity(), finish=lambda framed, latent: Image.new("RGB", (16, 16)),
        runtime=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    Previews(
        kontext, [sample], plan=PLAN, rhythm=Rhythm(), weights=lambda: evaluation_weights(run.optimizer, parameters),
        team=run.team, names=Names(tmp_path, "a"), drawn=lambda *_: None,
    ).draw("000004", 4)  # fmt: skip
    with evaluation_weights(run.optimizer, parameters):
        expected = run.weights()
    (found,) = drawn_with
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
