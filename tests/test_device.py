"""Names of devices and precisions."""

import pytest
import torch

from kontext import device as devices
from kontext.device import Precision, precision_of, resolve_device, resolve_dtype, told_precision
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
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:2: there is no cuda:2; there are 2 GPUs"):
        resolve_device("cuda:2")


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    assert current == [torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cuda", 0)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--device cuda: there is no cuda:2; there are 2 GPUs"):
        resolve_device("cuda")


def test_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_dtype("float32") is torch.float32 and resolve_dtype("bfloat16") is torch.bfloat16
    cuda = torch.device("cuda")
    assert told_precision("bfloat16", cuda) == Precision(torch.bfloat16, torch.bfloat16)
    assert capsys.readouterr().err == ""
    assert told_precision("float16", cuda) == Precision(torch.float16, torch.float16)
    assert "overflows in float16" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_what_the_processor_is_asked(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    computing = precision_of("bfloat16", torch.device("cpu")).computing
    assert computing is (torch.bfloat16 if there else torch.float32)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_processor_without_16_bits_computes_in_float32_and_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "is_fast", lambda dtype: dtype == torch.float32)
    cpu, dtype = torch.device("cpu"), resolve_dtype(name)
    assert told_precision("float32", cpu) == Precision(torch.float32, torch.float32)
    assert capsys.readouterr().err == ""
    assert told_precision(name, cpu) == precision_of(name, cpu) == Precision(torch.float32, dtype)
    said = " ".join(capsys.readouterr().err.split())
    assert f"--dtype {name}: this processor has no instructions for it, and computes in float32" in said
    assert "half the memory of --dtype float32" in said and "overflows" not in said
    assert told_precision(name, cpu, "--vae-dtype").computing is torch.float32
    said = " ".join(capsys.readouterr().err.split())
    assert f"--vae-dtype {name}: this processor" in said and "half the memory" not in said
    assert precision_of(name, torch.device("cuda")) == Precision(dtype, dtype)
