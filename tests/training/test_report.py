import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kontext.cli import main
from kontext.commands.train_report import settings
from kontext.generation.outputs import save_picture
from kontext.options.train import Train
from kontext.training.history import History, SampleSet, Sitting, Validation, read_history
from kontext.training.plan import Plan
from kontext.training.report import About, Setting, page, smooth, write_report
from tests.training.dataset import cached_dataset
from tests.training.page import Page

PLAN = Plan(batches=10, accumulation=1, processes=1, steps=200)


def history(steps: int, *, groups: int = 1, **more: Any) -> History:
    rng = np.random.default_rng(0)
    time = 1000.0 + 2 * np.arange(1, steps + 1)
    values = {
        "step": np.arange(1, steps + 1),
        "loss": rng.gamma(5, 0.1, steps),
        "norm": rng.gamma(5, 0.2, steps),
        "time": time,
        "rates": 1e-4 * np.outer(np.linspace(0, 1, steps), 4.0 ** np.arange(groups)),
        "levels": rng.random(2 * steps),
        "item_losses": rng.gamma(5, 0.1, 2 * steps),
        "validation": (),
        "samples": (),
        "sittings": (Sitting(0, 1000.0),),
    }
    return History(**(values | more))


def about(folder: Path, *options: Setting, plan: Plan = PLAN) -> About:
    return About("edit", plan, options, {"kontext": "1.2.3", "torch": "9.9"}, folder)


def shown(found: History, folder: Path = Path("none"), **more: Any) -> Page:
    return Page(page(found, about=about(folder), state=more.pop("state", "running"), **more))


def test_the_curves_are_the_history() -> None:
    validation = (Validation(50, 0.4), Validation(100, 0.3))
    found = history(120, groups=2, validation=validation)
    seen = shown(found)
    for chart, name, expected in (
        ("Loss", "loss", found.loss),
        ("Loss", "average", smooth(found.loss)),
        ("Gradient norm", "norm", found.norm),
        ("Learning rate", "group 1", found.rates[:, 0]),
        ("Learning rate", "group 2", found.rates[:, 1]),
    ):
        x, y = seen.series(chart, name)
        assert x == found.step.tolist()
        assert y == pytest.approx(expected.tolist(), rel=1e-5)
    assert seen.series("Loss", "validation") == ([50, 100], [0.4, 0.3])


def test_the_drawing_shows_its_data() -> None:
    seen = shown(history(120))
    for look, name in (("raw", "loss"), ("main", "average")):
        x, y = seen.series("Loss", name)
        points = seen.drawn("Loss", look)
        assert [point[0] for point in points] == pytest.approx(x, abs=0.05)
        assert [point[1] for point in points] == pytest.approx(y, abs=2e-4)


def test_the_average_is_the_corrected_moving_average() -> None:
    losses = np.array([1.0, 0.0, 0.5])
    weights = [0.98 ** np.arange(n)[::-1] for n in (1, 2, 3)]
    expected = [float((w * losses[: len(w)]).sum() / w.sum()) for w in weights]
    assert smooth(losses) == pytest.approx(expected)


def test_bars_count_levels_and_average_losses() -> None:
    levels = np.array([0.0, 0.04, 0.06, 0.55, 0.56, 0.97, 1.0])
    losses = np.array([1.0, 2.0, 6.0, 0.5, math.nan, 4.0, 2.0])
    seen = shown(history(2, levels=levels, item_losses=losses))
    counts = seen.series("Noise levels drawn", "items")[1]
    assert len(counts) == 20
    assert {i: count for i, count in enumerate(counts) if count} == {0: 2, 1: 1, 11: 2, 19: 2}
    means = seen.series("Loss by noise level", "mean loss")[1]
    assert means == [3.0, None, None, None, None, 0.5, None, None, None, 3.0]
    assert [note.split()[0] for note in seen.charts["Loss by noise level"]["notes"]] == list("3000010002")
    top = seen.charts["Loss by noise level"]["frame"][3]
    heights = [bar["height"] / 1000 * top for bar in seen.bars["Loss by noise level"]]
    assert heights == pytest.approx([3.0, 0.5, 3.0], abs=1e-3)


def test_facts_at_the_head() -> None:
    seen = shown(history(120, validation=(Validation(50, 0.25), Validation(100, 0.3))))
    words = seen.text
    assert "120 of 200" in words and "12 of 20" in words
    assert "2.00 s/step" in words and "4 min 00 s" in words and "about 2 min 40 s left" in words
    assert "0.3 best 0.25 at step 50" in words
    assert f"{smooth(history(120).loss)[-1]:.4g}" in words


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(steps: int) -> None:
    seen = shown(history(steps))
    assert ("Nothing recorded yet." in seen.text) == (steps == 0)
    assert not seen.needs_network


def test_missing_values_break_the_line() -> None:
    norm = np.array([1.0, np.nan, 2.0, 3.0])
    seen = shown(history(4, norm=norm))
    assert seen.series("Gradient norm", "norm")[1] == [1.0, None, 2.0, 3.0]
    assert seen.paths["Gradient norm", "raw"].count("M") == 2


def test_a_long_run_makes_a_small_page_with_its_peaks() -> None:
    found = history(100_000)
    found.loss[77_777] = 9.5
    text = page(found, about=about(Path("none"), plan=Plan(10, 1, 1, 100_000)), state="finished")
    assert len(text) < 400_000
    x, y = Page(text).series("Loss", "loss")
    assert len(x) < 1000 and x[0] == 1 and x[-1] == 100_000
    assert dict(zip(x, y, strict=True))[77_778] == 9.5
    assert y == pytest.approx(found.loss[np.array(x) - 1].tolist(), rel=1e-5)


NASTY = "</script><script>alert('1')</script> \"quoted\" & <b> $title ${x} {y} http://example.org/x"


def save_sample(
    path: Path, prompt: str, size: tuple[int, int] = (800, 400), reference: Path | None = None
) -> str:
    noise = np.random.default_rng(1).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size)
    extra = {"control_image": str(reference)} if reference else {}
    save_picture(path, picture, {"prompt": prompt, "seeds": "5", "width": "800", "height": "400", **extra})
    return path.name


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    name = save_sample(tmp_path / "a.png", NASTY)
    found = history(3, samples=(SampleSet(2, NASTY, (name,)),))
    described = About(NASTY, PLAN, (Setting("--x", NASTY, True),), {NASTY: NASTY}, tmp_path)
    seen = Page(page(found, about=described, state="stopped", note=NASTY))
    assert seen.source.count("<script") == Page(
        page(history(3), about=about(tmp_path), state="running")
    ).source.count("<script")
    assert "b" not in seen.tags
    assert seen.text.count(NASTY) >= 5
    assert seen.images[0][1].endswith(NASTY)
    assert all(link.startswith("data:") for link in seen.links)


def test_samples_stand_beside_their_references(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 2000), (250, 20, 20)).save(tmp_path / "before.jpg")
    sets = []
    for step in (0, 10, 25):
        names = [
            save_sample(tmp_path / f"{step}_0.png", "red", reference=tmp_path / "before.jpg"),
            save_sample(tmp_path / f"{step}_1.png", "blue"),
        ]
        sets.append(SampleSet(step, f"{step:06d}", tuple(names)))
    (tmp_path / "25_1.png").unlink()
    seen = shown(history(30, samples=tuple(sets)), tmp_path)
    assert [alt for _, alt in seen.images] == [
        "Reference: red", "Before training: red", "Step 10 · epoch 1: red", "Step 25 · epoch 3: red",
        "Before training: blue", "Step 10 · epoch 1: blue",
    ]  # fmt: skip
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
        for source, _ in seen.images
    ]
    assert [picture.size for picture in pictures] == [(192, 384)] + [(384, 192)] * 5
    red = np.asarray(pictures[0].convert("RGB")).mean((0, 1))
    assert red == pytest.approx([250, 20, 20], abs=6)
    assert "800 × 400 · seed 5" in seen.text
    assert not seen.needs_network


def test_many_samples_are_thinned_to_a_page_of_few_megabytes(tmp_path: Path) -> None:
    names = tuple(save_sample(tmp_path / f"{i}.png", f"p{i}", (512, 512)) for i in range(8))
    sets = tuple(SampleSet(step, f"{step:06d}", names) for step in range(200))
    write_report(tmp_path / "r.html", history(200, samples=sets), about=about(tmp_path), state="finished")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    seen = Page(text)
    assert len(seen.images) == 96
    assert "12 of 200 sets of samples are shown." in seen.text
    assert "Before training: p0" in seen.images[0][1] and "Step 199 " in seen.images[11][1]


def test_settings_are_shown_but_secrets_are_not() -> None:
    options = Train(
        dit=Path("d.safetensors"), dataset_config=Path("c.toml"), output_dir=Path("o"), output_name="n",
        learning_rate=3e-4, optimizer_args=["weight_decay=0.1", "eps=1e-6"],
    )  # fmt: skip

    found = {one.name: one for one in settings(options, seed=7)}
    assert found["--learning-rate"] == Setting("--learning-rate", "0.0003", True)
    assert found["--optimizer-args"].value == "weight_decay=0.1\neps=1e-6"
    assert found["--seed"] == Setting("--seed", "7", True)
    assert found["--lr-scheduler"] == Setting("--lr-scheduler", "constant", False)
    assert "--tokenizer1" in found
    given = options.model_dump(exclude_unset=True) | {
        "huggingface_token": "hf_abc",
        "wandb_api_key": "key123",
    }
    shown = settings(Train(**given), seed=7)
    assert {one.name for one in shown} == set(found) - {"--huggingface-token", "--wandb-api-key"}
    assert "hf_abc" not in str(shown) and "key123" not in str(shown)


BASE = ["--seed", "42", "--network-dim", "4", "--learning-rate", "1e-3", "--max-data-loader-n-workers", "0"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, tiny_files: Any) -> Any:
    """Runs the command on a small dataset."""
    root = tmp_path_factory.mktemp("edits")
    cached = cached_dataset(root, tiny_files)
    prompts = root / "prompts.txt"
    prompts.write_text(f"a <red> circle --w 64 --h 64 --s 1 --ci {cached.reference}\n")

    def run(output: Path, *more: str) -> int:
        samples = ["--sample-prompts", str(prompts), "--sample-every-n-steps", "2", "--sample-at-first"]
        words = ["train", *cached.models, *BASE, "--output-dir", str(output), "--output-name", "edit"]
        return main([*words, *samples, *more])

    return run


def test_a_run_writes_its_report(train: Any, tmp_path: Path) -> None:
    steps = ["--max-train-steps", "4", "--save-every-n-steps", "2", "--save-state"]
    assert train(tmp_path / "a", *steps) == 0
    assert train(tmp_path / "b", *steps, "--no-report") == 0
    assert (tmp_path / "a" / "edit.safetensors").read_bytes() == (
        tmp_path / "b" / "edit.safetensors"
    ).read_bytes()
    assert not {".html", ".jsonl"} & {path.suffix for path in (tmp_path / "b").iterdir()}
    found = read_history(tmp_path / "a" / "edit.history.jsonl")
    assert found.step.tolist() == [1, 2, 3, 4]
    assert [(one.step, one.label) for one in found.samples] == [(0, "000000"), (2, "000002"), (4, "000004")]
    seen = Page((tmp_path / "a" / "edit.html").read_text(encoding="utf-8"))
    assert "Finished" in seen.text and "4 of 4" in seen.text and "--network-dim 4" in seen.text
    assert seen.series("Loss", "loss")[1] == pytest.approx(found.loss.tolist(), rel=1e-5)
    assert [alt.partition(":")[0] for _, alt in seen.images] == [
        "Reference", "Before training", "Step 2 · epoch 1", "Step 4 · epoch 2",
    ]  # fmt: skip
    assert not seen.needs_network

    (tmp_path / "a" / "edit-state" / "state.safetensors").unlink()
    (tmp_path / "a" / "edit-step00000004-state" / "state.safetensors").unlink()
    assert train(tmp_path / "a", *steps, "--resume", "auto") == 0
    again = read_history(tmp_path / "a" / "edit.history.jsonl")
    assert again.step.tolist() == [1, 2, 3, 4] and again.loss.tolist() == found.loss.tolist()
    assert [one.row for one in again.sittings] == [0, 2] and len(again.samples) == 3


def test_a_run_that_breaks_down_says_so_in_its_report(train: Any, tmp_path: Path) -> None:
    bad = [
        "--learning-rate",
        "1e30",
        "--optimizer-type",
        "sgd",
        "--max-grad-norm",
        "0",
        "--max-train-steps",
        "4",
    ]
    assert train(tmp_path, *bad) == 2
    seen = Page((tmp_path / "edit.html").read_text(encoding="utf-8"))
    assert "Stopped" in seen.text and "The loss became" in seen.text


def test_a_report_that_cannot_be_written_stops_nothing(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edit.html").mkdir()
    assert train(tmp_path, "--max-train-steps", "2", "--save-every-n-steps", "1") == 0
    assert (tmp_path / "edit.safetensors").is_file()
    assert "edit.html is not continued" in capsys.readouterr().err
