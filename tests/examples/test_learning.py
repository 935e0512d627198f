"""How the small world is made: by the loop of the product, from nothing to files that generate reads."""

import sys
from pathlib import Path

import make_base
import pytest
import torch
from safetensors.torch import load_file
from small_world import learning, scenes
from small_world.base import CLIP_TOKENS, T5_TOKENS, Pool, SmallWorld

from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request

VOCABULARIES = (60, 90)


def pool() -> Pool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def ids() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = zip(VOCABULARIES, (T5_TOKENS, CLIP_TOKENS), strict=True)
        return tuple(torch.randint(0, v, (12, length), generator=generator) for v, length in lengths)

    kinds = {kind: torch.arange(i, 12, len(scenes.EDITS)) for i, kind in enumerate(scenes.EDITS)}
    return Pool(draw(12, 16, 6, 6), draw(12, 16, 6, 6), ids(), ids(), kinds)


def learn(folder: Path) -> SmallWorld:
    torch.manual_seed(1)
    return learning.train(
        pool(), SmallWorld(*VOCABULARIES), steps=4, device=torch.device("cpu"), folder=folder
    )


def test_all_three_networks_learn_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "BATCH", 3)
    monkeypatch.setattr(learning, "STEPS_BETWEEN_SAVES", 2)
    whole = learn(tmp_path)
    torch.manual_seed(1)
    before = dict(SmallWorld(*VOCABULARIES).named_parameters())
    moved = {
        name for name, p in whole.named_parameters() if not torch.equal(p.detach(), before[name].detach())
    }
    assert all(any(name.startswith(part) for name in moved) for part in ("transformer.", "t5.", "clip."))
    final = tmp_path / "world.safetensors"
    kept = load_file(final)
    assert all(torch.equal(p.detach(), kept[name]) for name, p in whole.named_parameters())
    bytes_before = final.read_bytes()
    for path in (final, tmp_path / "world-state" / "state.safetensors"):
        path.unlink()
    (tmp_path / "world-step00000004-state" / "state.safetensors").unlink()
    learn(tmp_path)
    assert final.read_bytes() == bytes_before


@pytest.mark.slow
def test_the_script_makes_a_whole_small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps a stage: the files are complete, whatever they have learned."""
    models = tmp_path / "models"
    line = [
        "make_base.py",
        "--quick",
        "--output",
        str(models),
        "--work",
        str(tmp_path / "work"),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", line)
    make_base.main()
    assert (tmp_path / "work" / "base.png").is_file() and (tmp_path / "work" / "world.html").is_file()
    names = {"dit": "dit", "vae": "ae", "text_encoder1": "t5", "text_encoder2": "clip"}
    files = ModelFiles(**{part: models / f"{name}.safetensors" for part, name in names.items()})
    runtime = Runtime(torch.device("cpu"), torch.float32, t5_max_length=T5_TOKENS)
    picture = Kontext(files, runtime).picture(Request("a red circle", width=48, height=48, seed=1, steps=1))
    assert picture.size == (48, 48)
