"""What the processes of a run do together; tests/commands/test_train_processes.py has real ones."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from kontext.errors import UserError
from kontext.training import team as module
from kontext.training.team import Team


class OneOfTwo(Team):
    """A process beside another one that always says `other`."""

    def __init__(self, rank: int, other: float = 0.0) -> None:
        super().__init__(Accelerator(cpu=True))
        self.rank, self.size, self.other = rank, 2, other

    def sum(self, values: Tensor) -> Tensor:
        return values + self.other


def test_a_flag_of_either_is_known_to_both_one_call_later() -> None:
    asked = [False, False, True, False, False]
    team = OneOfTwo(0)
    assert [team.any_before(flag) for flag in asked] == [False, False, False, True, False]
    team = OneOfTwo(0, other=1.0)
    assert [team.any_before(False) for _ in range(3)] == [False, True, True]
    alone = Team(Accelerator(cpu=True))
    assert [alone.any_before(flag) for flag in asked] == asked, "nothing to wait for"


def test_every_use_is_dealt_once() -> None:
    for count in (0, 1, 2, 5):
        dealt = [number for rank in (0, 1) for number in OneOfTwo(rank).deal(count)]
        assert sorted(dealt) == list(range(count))
    assert Team(Accelerator(cpu=True)).gather({"a": torch.ones(1)})[0]["a"] == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16531.\nMore."
        ),
        dist.DistNetworkError("recvValue failed"),
        dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited"),
    ],
)
def test_a_lost_connection_is_told_in_one_sentence(error: RuntimeError) -> None:
    """Wherever it shows: what torch raises within a backward pass has no type of its own."""
    said = r"^Another process of this run has ended; see its own message\. \([^\n]+\)$"
    with pytest.raises(UserError, match=said), Team(Accelerator(cpu=True)).in_touch():
        raise error


def test_a_process_that_does_not_come_is_told_apart() -> None:
    error = RuntimeError(
        "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"
    )
    said = r"^Another process of this run does not answer \(--ddp-timeout\); see its own message\."
    with pytest.raises(UserError, match=said), Team(Accelerator(cpu=True)).in_touch():
        raise error


def test_other_errors_are_as_they_were() -> None:
    for error in (
        RuntimeError("size mismatch"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("x"),
    ):
        with pytest.raises(type(error), match=str(error)), Team(Accelerator(cpu=True)).in_touch():
            raise error


class Doubling(Team):
    """Two processes with equal gradients."""

    def __init__(self) -> None:
        super().__init__(Accelerator(cpu=True))
        self.size, self.summed = 2, []

    def sum(self, values: Tensor) -> Tensor:
        self.summed.append(values.numel())
        return 2 * values


def test_gradients_are_summed_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 10)
    shapes = [(2, 3), (4,), (1,), (5, 5), (2,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    before = [torch.randn(parameter.shape, dtype=parameter.dtype) for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient.clone()
    parameters[2].grad = None
    before[2].zero_()
    team = Doubling()
    team.sum_gradients(iter(parameters))
    assert team.summed == [10, 1, 25, 2, 3]
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(parameters, before, strict=True))


def test_the_norm_is_that_of_all_gradients_together() -> None:
    gradients = [torch.randn(3, 4), torch.randn(7)]
    norm = Team(Accelerator(cpu=True)).norm(gradients)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
