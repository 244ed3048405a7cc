"""What outputs are held against: codes of two classes, z of a number, and nothing where nothing is known."""

import numpy as np
import pytest
import torch

from fmristream.errors import UsageError
from train.objectives import make_objective


def test_two_labels_are_coded_in_sorted_order_and_the_loss_is_the_cross_entropy():
    objective = make_objective("classification", "sex", labels=("F", "M"), train_values=np.array([0.0, 1.0, 1.0]))
    outputs, targets = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0])
    expected = torch.nn.functional.softplus(torch.tensor([-2.0, -1.0]))
    torch.testing.assert_close(objective.losses(outputs, targets), expected)
    assert objective.scores(outputs).tolist() == [2.0, -1.0]
    assert objective.truth(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_two_numbers_are_two_classes_as_well_also_where_float32_rounds_them():
    values = np.array([0.1, 2.7, np.nan, 0.1])
    objective = make_objective("classification", "group", labels=(), train_values=values)
    carried = torch.tensor(values, dtype=torch.float32)
    assert objective.truth(carried[[0, 1]].double().numpy()).tolist() == [0.0, 1.0]
    losses = objective.losses(torch.zeros(4, 1), carried)
    torch.testing.assert_close(losses, torch.tensor([1.0, 1.0, 0.0, 1.0]) * np.log(2))


def test_a_number_is_standardised_and_scored_in_its_own_unit():
    objective = make_objective("regression", "age", labels=(), train_values=np.array([20.0, 40.0, np.nan]))
    assert (objective.offset, objective.scale) == (30.0, 10.0)
    assert objective.losses(torch.tensor([[1.0]]), torch.tensor([20.0])).tolist() == [4.0]
    assert objective.scores(torch.tensor([[1.0]])).tolist() == [40.0]
    assert objective.truth(np.array([20.0])).tolist() == [20.0]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_missing_target_costs_nothing_and_has_no_gradient(kind):
    objective = make_objective(kind, "x", labels=(), train_values=np.array([0.0, 1.0]))
    outputs = torch.tensor([[0.3], [0.4]], requires_grad=True)
    losses = objective.losses(outputs, torch.tensor([torch.nan, 1.0]))
    losses.sum().backward()
    assert losses[0] == 0
    assert outputs.grad[0] == 0
    assert outputs.grad[1] != 0


def test_bf16_outputs_are_held_against_targets_in_float32():
    objective = make_objective("classification", "sex", labels=("F", "M"), train_values=np.array([0.0, 1.0]))
    assert objective.losses(torch.zeros(1, 1, dtype=torch.bfloat16), torch.ones(1)).dtype == torch.float32
    assert objective.scores(torch.zeros(1, 1, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "labels", "values", "sentence"),
    [
        ("classification", ("F", "M", "X"), [2.0, 2.0, np.nan], "got X"),
        ("classification", ("F", "M"), [1.0, 1.0], "needs two classes among the training subjects"),
        ("classification", (), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "got 1, 2, 3, 4, 5, ..."),
        ("classification", (), [np.nan], "no known value"),
        ("regression", ("F", "M"), [0.0, 1.0], "regression needs numbers"),
        ("regression", (), [30.0, 30.0, np.nan], "that differ between the training subjects, got 30"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_with_what_it_holds(kind, labels, values, sentence):
    with pytest.raises(UsageError) as caught:
        make_objective(kind, "x", labels=labels, train_values=np.array(values))
    assert sentence in str(caught.value)
