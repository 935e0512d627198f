"""What the processes of a run do together; tests/commands/test_train_processes.py has real ones."""

import torch
from accelerate import Accelerator
from torch import Tensor

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
