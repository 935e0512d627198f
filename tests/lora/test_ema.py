from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kontext.errors import UserError
from kontext.lora.ema import average, by_step, constant, power


def files(folder: Path, values: list[float], steps: list[int] | None = None) -> list[Path]:
    paths = []
    for i, value in enumerate(values):
        path = folder / f"run-{i:06d}.safetensors"
        tensors = {"lora_unet_x.lora_down.weight": torch.full((2, 3), value)}
        save_file(tensors, path, metadata={"ss_steps": str(steps[i])} if steps else None)
        paths.append(path)
    return paths


def mean(folder: Path, values: list[float], decay) -> float:
    tensors = average(by_step(files(folder, values)), decay)
    return tensors["lora_unet_x.lora_down.weight"][0, 0].item()


def test_a_constant_share(tmp_path: Path):
    assert mean(tmp_path, [1.0, 2.0, 4.0], constant(0.5)) == pytest.approx(
        (1 * 0.5 + 2 * 0.5) * 0.5 + 4 * 0.5
    )


def test_a_share_that_changes(tmp_path: Path):
    """Shares 0.9, 0.5 and 0.1 at the second, third and fourth file."""
    expected = ((1 * 0.9 + 2 * 0.1) * 0.5 + 4 * 0.5) * 0.1 + 8 * 0.9
    assert mean(tmp_path, [1.0, 2.0, 4.0, 8.0], constant(0.9, 0.1)) == pytest.approx(expected)


def test_a_power_function_average_has_the_width_asked_for():
    """Weights t^gamma over a run have standard deviation sigma_rel as a part of its length."""
    count, sigma = 4000, 0.1
    decay = power(sigma)
    weights = torch.zeros(count, dtype=torch.float64)
    weights[0] = 1
    for i in range(1, count):
        beta = decay(i, count)
        weights *= beta
        weights[i] = 1 - beta
    assert weights.sum().item() == pytest.approx(1)
    t = torch.arange(1, count + 1, dtype=torch.float64) / count
    centre = (weights * t).sum()
    assert (weights * (t - centre) ** 2).sum().sqrt().item() == pytest.approx(sigma, rel=0.01)
    with pytest.raises(UserError, match="between 0 and 0.289"):
        power(0.5)


def test_files_are_sorted_by_step_not_by_name(tmp_path: Path):
    paths = files(tmp_path, [1.0, 2.0, 3.0], steps=[300, 100, 200])
    assert [source.path for source in by_step(paths)] == [paths[1], paths[2], paths[0]]
    named = [tmp_path / f"{n}.safetensors" for n in ("run-step00000200", "run-step00000100")]
    for path in named:
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, path)
    assert [source.path for source in by_step(named)] == named[::-1]


def test_files_that_cannot_be_averaged(tmp_path: Path):
    one, two = files(tmp_path, [1.0, 2.0], steps=[5, 5])
    with pytest.raises(UserError, match="same training step"):
        by_step([one, two])
    nameless = tmp_path / "final.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, nameless)
    with pytest.raises(UserError, match="does not tell its training step"):
        by_step([one, nameless])
    other = tmp_path / "other-9.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 3)}, other)
    with pytest.raises(UserError, match="other tensors"):
        average(by_step([one, other]), constant(0.5))
