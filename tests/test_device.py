"""Names of devices and precisions."""

import pytest
import torch

from kontext.device import computing_dtype, resolve_device, resolve_dtype
from kontext.errors import UserError


def test_auto_takes_the_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: PyTorch .* sees no CUDA GPU. Use --device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:2: there is no cuda:2; there are 2 GPUs"):
        resolve_device("cuda:2")


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--device cuda: there is no cuda:2; there are 2 GPUs"):
        resolve_device("cuda")


def test_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_dtype("float32") is torch.float32 and resolve_dtype("bfloat16") is torch.bfloat16
    assert capsys.readouterr().err == ""
    assert resolve_dtype("float16") is torch.float16
    assert "overflows in float16" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_a_processor_without_bfloat16_is_told_of(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    cpu = torch.device("cpu")
    for device, name in (cpu, "float32"), (torch.device("cuda"), "bfloat16"):
        computing_dtype(name, device)
        assert capsys.readouterr().err == ""
    assert computing_dtype("bfloat16", cpu, "--vae-dtype") is torch.bfloat16
    assert ("very slow with it: use --vae-dtype float32" in capsys.readouterr().err) == (not there)
