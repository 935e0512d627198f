import pytest
import torch
from torch import nn

from kontext.training.average import Average
from kontext.training.loop import Outcome


def after(step: int) -> Outcome:
    return Outcome(step, torch.zeros(()), torch.zeros(()), (0.1,), ())


def test_the_mean_by_hand() -> None:
    """Decays 2/11 and 3/12, then 0.25, which the option limits them to."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average({"x": parameter}, 0.25)
    expected = 1.0
    for step, (value, decay) in enumerate(((12.0, 2 / 11), (2.0, 3 / 12), (7.0, 0.25))):
        parameter.data.fill_(value)
        average(after(step))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average.values["x"], torch.tensor([expected]))


def test_the_weights_come_back_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.tensor([0.1, 0.7]))
    average = Average({"x": parameter}, 0.9)
    before = parameter.detach().clone()
    average.values["x"].fill_(3.0)
    with average.weights():
        assert parameter.tolist() == [3.0, 3.0]
    assert torch.equal(parameter, before)


def test_the_mean_of_bfloat16_weights_moves_by_less_than_they_can() -> None:
    """After many steps at 2 the mean has left 1 as in float32; one kept in bfloat16 stands still at 1."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    average = Average({"x": parameter}, 0.999)
    parameter.data.fill_(2.0)
    for step in range(20_000, 20_100):
        average(after(step))
    torch.testing.assert_close(average.values["x"], torch.tensor([2 - 0.999**100]))
    with average.weights():
        assert parameter.dtype == torch.bfloat16 and parameter.item() == pytest.approx(
            2 - 0.999**100, rel=4e-3
        )
    assert parameter.item() == 2


def test_a_run_without_average_is_gone_on_from_its_weights() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    average = Average({"x": parameter}, 0.9)
    parameter.data.fill_(5.0)
    average.load({})
    assert average.values["x"].tolist() == [5.0, 5.0]
    average.load({"x": torch.ones(2)})
    assert average.values["x"].tolist() == [1.0, 1.0] and parameter.tolist() == [5.0, 5.0]
