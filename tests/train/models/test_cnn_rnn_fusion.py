"""What is not known of a scan enters as a zero beside a flag; codes enter one by one, and a new site is not known."""

import pytest
import torch

from train.models.cnn_rnn import build_cnn_rnn
from train.models.cnn_rnn_fusion import Columns, SideSeries, with_missing

NAN, INF = torch.nan, torch.inf
GRID = (5, 4, 6)


def test_gaps_become_zeros_beside_flags():
    assert with_missing(torch.tensor([[1.5, NAN], [INF, -2.0]])).tolist() == [[1.5, 0, 0, 1], [0, -2, 1, 0]]


def test_columns_are_spread_as_worked_out_by_hand():
    # A number, a code of two, a number, a code of three.
    columns = torch.tensor([[0.5, 1, NAN, 0], [-1, 0, 2, 2], [0, NAN, 1, 7], [0, -1, 1, 1.5]])
    found = Columns((0, 2, 0, 3), width=4).spread(columns)
    numbers = [[0.5, 0, 0, 1], [-1, 2, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    twos = [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]
    threes = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert found.tolist() == [a + b + c for a, b, c in zip(numbers, twos, threes, strict=True)]


@pytest.mark.parametrize("kinds", [(0,), (2,), (0, 0), (4, 3)])
def test_columns_of_numbers_or_of_codes_alone_are_taken(kinds):
    assert Columns(kinds, width=4)(torch.zeros(2, len(kinds)), 2).shape == (2, 4)


@pytest.mark.parametrize("rnn", ["gru", "lstm", "none"])
def test_side_series_are_read_forwards_or_frame_by_frame(rnn):
    torch.manual_seed(0)
    series = SideSeries(2, width=3, rnn=rnn)
    side = torch.randn(1, 5, 2)
    changed = side.clone()
    changed[0, 2] = NAN
    difference = (series(side, (1, 5)) - series(changed, (1, 5))).abs().amax(2)[0] > 0
    assert difference.tolist() == [False, False, True, rnn != "none", rnn != "none"]


def test_everything_unknown_still_gives_numbers_and_gradients():
    torch.manual_seed(0)
    model = build_cnn_rnn({"img_size": [*GRID, 3], "channels": [8], "side": 2, "columns": [0, 3]})
    out = model(torch.randn(2, 1, *GRID, 3), side=torch.full((2, 3, 2), NAN), columns=torch.full((2, 2), NAN))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_each_other_input_decides_the_prediction():
    torch.manual_seed(0)
    model = build_cnn_rnn({"img_size": [*GRID, 3], "channels": [8], "side": 1, "columns": [0, 3]}).eval()
    bold, side, columns = torch.randn(1, 1, *GRID, 3), torch.zeros(1, 3, 1), torch.zeros(1, 2)
    plain = model(bold, side=side, columns=columns)
    for other in (1.0, 2.0, 3.0, NAN):  # code 3 is one of 0 to 2 no more: as unknown as NaN
        changed = torch.tensor([[0.0, other]])
        assert not torch.equal(model(bold, side=side, columns=changed), plain)
    new_site, unknown = (model(bold, side=side, columns=torch.tensor([[0.0, code]])) for code in (3.0, NAN))
    assert torch.equal(new_site, unknown)
    assert not torch.equal(model(bold, side=side + 1, columns=columns), plain)
    assert not torch.equal(model(bold, side=side, columns=torch.tensor([[1.0, 0.0]])), plain)
