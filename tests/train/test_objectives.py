"""What outputs are held against: codes of two classes, z of a number, and nothing where nothing is known."""

import numpy as np
import pytest
import torch

from fmristream.errors import UsageError
from train.objectives import balanced_weights, make_objective, require_known_classes


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
        ("regression", ("1", "2.5", "yes", "inf"), [0.0, 1.0, 2.0], "got yes, inf;"),
        ("regression", (), [30.0, 30.0, np.nan], "that differ between the training subjects, got 30"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_with_what_it_holds(kind, labels, values, sentence):
    with pytest.raises(UsageError) as caught:
        make_objective(kind, "x", labels=labels, train_values=np.array(values))
    assert sentence in str(caught.value)


def test_several_words_have_an_output_each_and_the_loss_is_the_softmax_cross_entropy():
    values = np.array([3.0, 0.0, 1.0, np.nan, 0.0])
    objective = make_objective("classification", "hand", labels=("b", "l", "n", "r"), train_values=values)
    assert (objective.outputs, objective.names) == (3, ("b", "l", "r"))
    outputs = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]], requires_grad=True)
    losses = objective.losses(outputs, torch.tensor([3.0, torch.nan, 0.0]))
    total = np.log(np.exp([1.0, 2.0, 4.0]).sum())
    torch.testing.assert_close(losses, torch.tensor([total - 4, 0.0, total - 1], dtype=torch.float32))
    losses.sum().backward()
    assert (outputs.grad[1] == 0).all()
    np.testing.assert_array_equal(objective.truth(np.array([3.0, 1.0, 2.0])), [2, 1, np.nan])
    assert objective.scores(outputs).shape == (3, 3)


@pytest.mark.parametrize(
    ("loss", "delta", "expected"), [("mse", 1.0, [4.0, 0.25]), ("l1", 1.0, [2.0, 0.5]), ("huber", 0.8, [1.28, 0.125])]
)
def test_numbers_have_the_loss_that_was_asked_for(loss, delta, expected):
    objective = make_objective(
        "regression", "age", labels=(), train_values=np.array([20.0, 40.0]), loss=loss, huber_delta=delta
    )
    found = objective.losses(torch.tensor([[1.0], [0.5]]), torch.tensor([20.0, 40.0]))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_classes_of_other_subjects_must_be_those_of_training():
    objective = make_objective("classification", "x", labels=("a", "b", "c"), train_values=np.array([0.0, 1.0]))
    require_known_classes(objective, np.array([1.0, np.nan, 0.0]), split="test")
    with pytest.raises(UsageError, match="split 'test' have classes that no training subject has"):
        require_known_classes(objective, np.array([1.0, 2.0]), split="test")


def test_balanced_classes_weigh_by_inverse_frequency_and_one_on_average():
    words = np.array([0.0, 0.0, 0.0, 3.0, 1.0, np.nan, 0.0, 3.0])
    objective = make_objective("classification", "hand", labels=("b", "l", "n", "r"), train_values=words, balance=True)
    assert objective.class_weights == pytest.approx(
        (7 / (3 * 4), 7 / (3 * 1), 7 / (3 * 2))
    )  # scikit-learn's "balanced"
    per_subject = [objective.class_weights[objective.classes.index(word)] for word in words[np.isfinite(words)]]
    assert np.mean(per_subject) == pytest.approx(1)
    outputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    targets, known = torch.tensor(words, dtype=torch.float32), torch.tensor(np.isfinite(words))
    places = torch.tensor(objective.truth(words[np.isfinite(words)])).long()
    by_torch = torch.nn.functional.cross_entropy(
        outputs[known], places, weight=torch.tensor(objective.class_weights), reduction="none"
    )
    losses = objective.losses(outputs, targets)
    torch.testing.assert_close(losses[known], by_torch)
    assert losses[~known].tolist() == [0]


def test_two_balanced_classes_are_weighted_too_also_where_float32_rounds_their_values():
    values = np.array([0.1, 2.7, 0.1, 0.1, np.nan])
    objective = make_objective("classification", "group", labels=(), train_values=values, balance=True, weight=3.0)
    assert objective.class_weights == pytest.approx((4 / (2 * 3), 4 / (2 * 1)))
    losses = objective.losses(torch.zeros(5, 1), torch.tensor(values, dtype=torch.float32))
    np.testing.assert_allclose(losses, 3 * np.log(2) * np.array([2 / 3, 2, 2 / 3, 2 / 3, 0]), rtol=1e-6)
    assert balanced_weights(objective, np.array([0.1, 2.7])) == (1, 1)


def test_weights_are_of_training_subjects_and_numbers_have_none():
    values = np.array([20.0, 40.0])
    objective = make_objective("regression", "age", labels=(), train_values=values, weight=0.5, balance=True)
    assert objective.class_weights == ()
    assert objective.losses(torch.tensor([[1.0]]), torch.tensor([20.0])).tolist() == [2.0]
