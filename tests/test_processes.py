"""Work that is dealt out among processes: here the talking is faked, tests/commands/test_processes.py is real."""

from typing import Any

import pytest
import torch.distributed as dist

from kontext.errors import UserError
from kontext.processes import Processes, joined, local_rank


def test_shares_are_disjoint_and_together_everything() -> None:
    for size in (1, 2, 3, 7):
        shares = [Processes(rank, size).share(range(5)) for rank in range(size)]
        assert sorted(value for share in shares for value in share) == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own, without a launcher's RANK
    monkeypatch.delenv("RANK", raising=False)
    assert local_rank() is None
    with joined() as crew:
        assert crew == Processes() and crew.leads
        assert crew.first(lambda: 3) == 3 and crew.gather("x") == ["x"]


def test_when_the_first_fails_it_says_so_and_the_others_go_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box: sent.append(list(box)))

    def fail() -> None:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        Processes(0, 2).first(fail)
    assert sent == [[None]]
    with pytest.raises(SystemExit) as ended:
        Processes(1, 2).first(fail)
    assert ended.value.code == 2


def test_what_the_first_computes_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(box: list[Any]) -> None:
        if box == [None]:
            box[0] = (None,)

    monkeypatch.setattr(dist, "broadcast_object_list", receive)
    assert Processes(0, 2).first(lambda: 5) == 5
    assert Processes(1, 2).first(lambda: 5) is None, "a result may be nothing"
