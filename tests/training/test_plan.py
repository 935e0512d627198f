from kontext.training.feed import places
from kontext.training.plan import Plan


def test_every_batch_comes_once_per_epoch() -> None:
    for processes in (1, 2, 3):
        plan = Plan(batches=7, accumulation=2, processes=processes, steps=3 * -(-7 // (2 * processes)))
        seen = [
            (plan.epoch(step), index)
            for rank in range(processes)
            for step, index in places(plan, first_step=0, rank=rank)
        ]
        assert sorted(seen) == [(epoch, index) for epoch in range(3) for index in range(7)]


def test_steps_and_epochs_by_hand() -> None:
    plan = Plan(batches=5, accumulation=2, processes=1, steps=7)
    assert plan.steps_per_epoch == 3
    assert plan.epochs == 3
    assert [plan.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [list(plan.group(step)) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert [step for step in range(7) if plan.ends_epoch(step)] == [2, 5]


def test_two_processes_share_the_batches_of_a_step() -> None:
    plan = Plan(batches=5, accumulation=1, processes=2, steps=3)
    assert places(plan, first_step=0, rank=0) == [(0, 0), (1, 2), (2, 4)]
    assert places(plan, first_step=1, rank=1) == [(1, 3)]


def test_processes_that_share_a_model_take_as_many_batches() -> None:
    """Five batches for two: the last step has one, which stands in for the other process's."""
    plan = Plan(batches=5, accumulation=2, processes=2, steps=2)
    both = [places(plan, first_step=0, rank=rank, together=True) for rank in range(2)]
    assert both == [[(0, 0), (0, 2), (1, 4)], [(0, 1), (0, 3), (1, 4)]]
    assert [plan.rounds(step) for step in range(2)] == [2, 1]
