"""How a step is taken: in pieces, in float16, with averaged weights, and until validation gets no better."""

import json
import math
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import ResumeError, UsageError
from train import loop, metrics
from train.averaging import Ema
from train.checkpoint import load_checkpoint
from train.config import recipe_from
from train.evaluate import NonFiniteError
from train.launch import StopRequest, World
from train.log import read_history
from train.scaling import LossScale
from train.steps import cut_into, number_of_pieces
from train.stopping import Best

ALONE = World()


@pytest.fixture
def start(tmp_path):
    """Begin a run that is closed with the test."""
    with ExitStack() as stack:
        yield lambda recipe, out="run": loop.start(recipe, out=tmp_path / out, world=ALONE, stack=stack)


def history(out):
    return read_history(out / "log.jsonl").steps


def events(out, kind):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(out):
    return [entry["loss"] for entry in history(out)]


# Pieces.


@pytest.mark.parametrize("augment", ["none", "swift"])
def test_four_pieces_of_two_are_one_batch_of_eight(small_recipe, tmp_path, augment):
    for pieces in (1, 4):
        recipe = small_recipe(data={"augment": augment}, train={"batch_size": 8, "accumulate": pieces})
        loop.train(recipe, out=tmp_path / str(pieces), world=ALONE)
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-5)
    norms = [[entry["gradient_norm"] for entry in history(tmp_path / pieces)] for pieces in "14"]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    assert [entry["windows"] for entry in history(tmp_path / "4")] == [
        entry["windows"] for entry in history(tmp_path / "1")
    ]


def test_only_the_asked_number_of_samples_is_in_the_network_at_once(small_recipe, start):
    run = start(small_recipe(train={"batch_size": 8, "accumulate": 4, "steps": 1}))
    sizes = []
    run.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    loop.fit(run, StopRequest())
    assert sizes == [2, 2, 2, 2]


def test_every_rank_makes_as_many_pieces_and_none_is_empty(small_recipe, start):
    (batch,) = [next(iter(start(small_recipe(train={"batch_size": 8})).train.loader))]
    assert [number_of_pieces(batch, 4, world=World(size=size)) for size in (1, 2, 3, 8)] == [4, 4, 2, 1]
    for count in range(1, 9):
        pieces = cut_into(batch, count)
        assert len(pieces) == count
        assert {len(piece) for piece in pieces} <= {8 // count, -(-8 // count)}
        assert torch.equal(torch.cat([piece.window for piece in pieces]), batch.window)
        assert torch.equal(torch.cat([piece.packed for piece in pieces]), batch.packed)
        assert [name for piece in pieces for name in piece.run] == batch.run
        assert {piece.global_size for piece in pieces} == {8}


def test_a_piece_has_all_views_of_its_samples(small_recipe, start):
    recipe = small_recipe(data={"views": "same-subject"}, objective={"kind": "contrastive"}, train={"batch_size": 6})
    batch = next(iter(start(recipe).train.loader))
    piece = batch.samples(2, 5)
    assert (len(piece), piece.views) == (6, 2)
    for view in (0, 1):
        ours, whole = piece.view(view), batch.view(view)
        assert torch.equal(ours.packed, whole.packed[2:5])
        assert ours.subject == whole.subject[2:5]
        assert torch.equal(ours.sample, whole.sample[2:5])
    with pytest.raises(UsageError, match=r"samples \[5, 7\) were asked for, the batch has 6"):
        batch.samples(5, 7)


def test_what_pieces_would_change_is_refused(small_recipe, parcelled, start):
    with pytest.raises(UsageError, match="compares all windows of a batch with each other"):
        start(small_recipe(data={"views": "same-subject"}, objective={"kind": "contrastive"}, train={"accumulate": 2}))
    tables = {
        "data": {"url": parcelled, "target": "age", "window": 8},
        "model": {"name": "cnn_rnn", "channels": [4, 4], "norm": "batch", "hidden": 6},
        "objective": {"kind": "regression"},
        "train": {"accumulate": 2},
    }
    with pytest.raises(UsageError, match="'cnn_rnn' normalises by the whole batch"):
        start(recipe_from(tables))


def test_statistics_that_would_move_under_frozen_weights_are_refused(cohort, start):
    tables = {
        "data": {"url": cohort, "window": 8, "stride": 14, "test_split": ""},
        "model": {"name": "cnn_rnn", "channels": [4, 4], "norm": "batch", "hidden": 6},
        "train": {"steps": 2, "batch_size": 4},
    }
    with pytest.raises(UsageError, match="running statistics would follow the windows"):
        start(recipe_from(tables | {"start": {"freeze": ["cnn."]}}))
    run = start(recipe_from(tables | {"model": tables["model"] | {"freeze_cnn": True}}))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert loop.fit(run, run.world.stop)
    moved = {
        name.partition(".")[0] for name, tensor in run.model.state_dict().items() if not tensor.equal(before[name])
    }
    assert moved == {"rnn", "head"}


# Float16.


def test_the_scale_moves_as_torchs_own_does(monkeypatch):
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", growth_interval=2000)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    overflowing = {3, 4, 2100, 4200, 4201}
    for step in range(4300):
        parameter.grad = torch.full((3,), math.inf if step in overflowing else 1.0)
        theirs.scale(torch.ones(()))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        if step in overflowing:
            ours.shrink()
        else:
            ours.grow()
        assert ours.value == theirs.get_scale()


def test_an_overflow_is_taken_again_and_no_window_is_passed_over(small_recipe, start, tmp_path):
    exact = small_recipe(train={"batch_size": 8})
    loop.train(exact, out=tmp_path / "exact", world=ALONE)
    run = start(small_recipe(train={"precision": "fp16", "batch_size": 8, "accumulate": 2}))
    run.loss_scale.value = 2.0**40
    loop.fit(run, StopRequest())
    steps = history(tmp_path / "run")
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert [entry["windows"] for entry in steps] == [entry["windows"] for entry in history(tmp_path / "exact")]
    assert 1 < steps[0]["loss_scale"] < 2.0**40
    assert all(math.isfinite(entry["gradient_norm"]) for entry in steps)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "exact"), rtol=0.03)
    norms = [[entry["gradient_norm"] for entry in history(tmp_path / which)] for which in ("run", "exact")]
    np.testing.assert_allclose(norms[0][0], norms[1][0], rtol=0.03)  # of the loss, not of the scaled loss


def test_a_gradient_that_is_no_number_at_any_scale_stops_the_run_with_its_windows(small_recipe, start):
    run = start(small_recipe(train={"precision": "fp16"}))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    next(run.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is 0\.\d+ and the gradient's norm nan.*windows \["):
        loop.fit(run, StopRequest())
    assert run.loss_scale.value == 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_loss_that_is_no_number_is_not_taken_for_an_overflow(small_recipe, start):
    run = start(small_recipe(train={"precision": "fp16"}))
    with torch.no_grad():
        run.model.output_head.head.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        loop.fit(run, StopRequest())
    assert run.loss_scale.value == 2.0**16


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_learns_and_goes_on_bit_for_bit(small_recipe, tmp_path, precision):
    recipe = small_recipe(train={"precision": precision, "accumulate": 2, "ema": 0.9, "steps": 10})
    loop.train(recipe, out=tmp_path / "whole", world=ALONE)
    extra = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-5").state["extra"]
    assert ("scaler" in extra) == (precision == "fp16")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-10")
    loop.train(recipe, out=tmp_path / "again", world=ALONE)
    assert history(tmp_path / "again")[5]["loss"] == history(tmp_path / "whole")[5]["loss"]
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "step-10") for run in ("whole", "again"))
    assert one.state["extra"] == two.state["extra"]
    assert all(torch.equal(value, two.extra["ema"][name]) for name, value in one.extra["ema"].items())


# Averaged weights.


def test_the_average_is_that_of_the_formula_and_evaluation_has_it_in_place(small_recipe, start):
    run = start(small_recipe(train={"ema": 0.8, "eval_every": 1, "steps": 6}, start={"freeze": ["model.patch_embed."]}))
    names = [name for name, one in run.model.named_parameters() if one.requires_grad]
    oracle = {name: dict(run.model.named_parameters())[name].detach().double().clone() for name in names}
    seen = []
    original = run.optimizer.step

    def step(*arguments):
        result = original(*arguments)
        weights = dict(run.model.named_parameters())
        decay = min(0.8, (run.step + 1) / (run.step + 10))
        for name in names:
            oracle[name] = decay * oracle[name] + (1 - decay) * weights[name].detach().double()
        return result

    run.optimizer.step = step

    def look(module, inputs):
        if not module.training:
            weights = dict(module.named_parameters())
            seen.append(max((weights[name].double() - oracle[name]).abs().max().item() for name in names))

    run.model.register_forward_pre_hook(look)
    loop.fit(run, StopRequest())
    assert len(seen) >= 6
    assert max(seen) < 1e-6
    assert set(run.ema.tensors()) == set(names)
    weights = dict(run.model.named_parameters())
    assert any(not torch.equal(weights[name], run.ema.tensors()[name]) for name in names)


def test_the_models_own_weights_come_back_after_an_error():
    model = nn.Linear(2, 2)
    ema, mean = Ema(model, decay=0.5), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()

    def fail():
        with ema.in_place():
            assert torch.equal(model.weight, mean)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(model.weight, own)
    assert not torch.equal(own, mean)


def test_an_average_of_other_weights_is_refused():
    with pytest.raises(ResumeError, match=r"differ in 0\.bias"):
        Ema(nn.Sequential(nn.Linear(2, 2)), decay=0.5).restore({"0.weight": torch.ones(2, 2)}, {"updates": 1})


# The end at the best look.


def test_patience_counts_looks_without_a_better_one_in_the_metrics_direction():
    rising, falling = Best("auroc", patience=2), Best("mae", patience=0)
    assert [rising.see({"auroc": value}, step=step) for step, value in enumerate([0.5, 0.7, 0.7, 0.6])] == [
        True,
        True,
        False,
        False,
    ]
    assert (rising.is_over, rising.value, rising.step) == (True, 0.7, 1)
    assert [falling.see({"mae": value}, step=0) for value in [3.0, 2.0, 4.0, 5.0, 6.0]] == [True, True, *3 * [False]]
    assert not falling.is_over
    again = Best("auroc", patience=2)
    again.restore({}, rising.facts())
    assert again.is_over
    other = Best("accuracy", patience=2)
    other.restore({}, rising.facts())
    assert other.value is None
    with pytest.raises(UsageError, match=r"no 'auroc' to tell the best weights by \(loss 0.5\)"):
        again.see({"loss": 0.5}, step=7)


def test_a_run_ends_when_patience_does_and_scores_the_best_weights(small_recipe, tmp_path):
    # At this rate the net is thrown about, so that some look is not the best.
    sections = {"optim": {"lr": 0.3}, "eval": {"metric": "auroc"}}
    plan = {"steps": 60, "eval_every": 2, "patience": 2, "checkpoint_every": 100, "ema": 0.5}
    recipe = small_recipe(**sections, train=plan)
    outcome = loop.train(recipe, out=tmp_path, world=ALONE)
    looks = events(tmp_path, "eval")
    (ended,) = events(tmp_path, "patience")
    values = [look["auroc"] for look in looks]
    first_best = looks[int(np.argmax(values))]
    assert ended["step"] == looks[-1]["step"] == first_best["step"] + 4 < 60
    assert outcome.step == first_best["step"]  # what was scored is what the report names
    assert (ended["best"], ended["at"]) == (max(values), first_best["step"])
    assert metrics.auroc(outcome.val.truth, outcome.val.score) == max(values)
    again = loop.train(recipe, out=tmp_path, world=ALONE)  # nothing is left to do
    assert again.step == outcome.step
    np.testing.assert_array_equal(again.test.score, outcome.test.score)
    last = loop.train(
        small_recipe(**sections | {"eval": {"metric": "auroc", "use": "last"}}, train=plan), out=tmp_path, world=ALONE
    )
    assert not np.array_equal(last.test.score, outcome.test.score)


def test_looks_that_are_never_taken_cannot_decide(small_recipe, start):
    with pytest.raises(UsageError, match="never looks at"):
        start(small_recipe(eval={"use": "best"}))
    with pytest.raises(UsageError, match=r"train.eval_every is 0"):
        small_recipe(train={"patience": 3})
    with pytest.raises(UsageError, match=r"eval.metric must be one of .*, got 'aurok'"):
        small_recipe(eval={"metric": "aurok"})
