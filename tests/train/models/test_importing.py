"""A published checkpoint gives the network that it was made with, or is refused with what does not fit."""

import re

import pytest
import torch

from fmristream.errors import UsageError
from tests.train.models.tiny_networks import NETWORKS, OPTIONS, UNSEEN, UNUSED, example, network, published, run, unseen
from train.models.importing import Row, Told, build_fitted, fit_weights, setting, table
from train.models.load import WeightsError
from train.models.published import FAMILIES, family_of


def told(name, **changed):
    return [Told(by="--set", options=unseen(name) | changed, only_known=True)]


def plain(options):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def refusal(weights, name, **changed):
    with pytest.raises(WeightsError) as caught:
        fit_weights(weights, name, source="w.pt", told=told(name, **changed))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_are_seen_in_the_tensors_and_the_rest_is_told(name):
    weights = published(name)
    fitted = fit_weights(weights, name, source="w.pt", told=told(name))
    assert plain(fitted.options) == OPTIONS[name]
    assert {option for option, by in fitted.known_from.items() if by == "--set"} == set(UNSEEN[name])
    assert set(fitted.ignored) == set(UNUSED[name])
    assert all(fitted.ignored.values())
    assert list(fitted.tensors) == list(network(name).state_dict())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in fitted.tensors.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_imported_network_computes_what_the_exported_one_did(name):
    fitted = fit_weights(published(name), name, source="w.pt", told=told(name))
    inputs = example(name)
    for ours, theirs in zip(run(build_fitted(fitted).eval(), inputs), run(network(name, 1), inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_no_tensor_shows_is_asked_for_and_nothing_is_guessed(name):
    with pytest.raises(UsageError) as caught:
        fit_weights(published(name), name, source="w.pt")
    sentence, *lines = str(caught.value).splitlines()
    assert sentence.startswith(f"w.pt: as {name}, {len(UNSEEN[name])} option")
    assert "cannot be seen in the tensors, and a wrong one would compute something else" in sentence
    assert {line.split()[0] for line in lines} == set(UNSEEN[name])


def test_options_that_no_tensor_shows_change_the_function():
    """Heads and windows load whatever they are, and compute something else."""
    # Large weights, so that attention chooses.
    weights, inputs = {name: 5 * tensor for name, tensor in published("swift").items()}, example("swift")
    right = build_fitted(fit_weights(weights, "swift", source="w.pt", told=told("swift"))).eval()
    for change in ({"num_heads": [2, 4]}, {"window_size": [4, 4, 4, 4]}, {"first_window_size": [2, 2, 2, 2]}):
        wrong = build_fitted(fit_weights(weights, "swift", source="w.pt", told=told("swift", **change))).eval()
        assert not torch.allclose(run(right, inputs)[0], run(wrong, inputs)[0], atol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_family_of_weights_is_known_by_their_names(name):
    assert family_of(published(name)) == name
    assert family_of({"encoder.weight": torch.ones(1)}) is None


def test_hyper_parameters_serve_as_options_and_what_is_nobodys_option_is_left_out():
    hyper_parameters = OPTIONS["swift"] | {"learning_rate": 1e-3, "dataset_path": "/home/somebody/hcp"}
    fitted = fit_weights(
        published("swift"), "swift", source="w.pt", told=[Told(by="its hyper-parameters", options=hyper_parameters)]
    )
    assert plain(fitted.options) == OPTIONS["swift"]
    assert "/home/somebody" not in repr((fitted.options, fitted.known_from))


def test_a_later_word_replaces_an_earlier_one():
    several = [
        Told(by="its hyper-parameters", options=unseen("swift") | {"num_heads": [2, 4]}),
        Told(by="--set", options={"num_heads": [1, 2]}, only_known=True),
    ]
    fitted = fit_weights(published("swift"), "swift", source="w.pt", told=several)
    assert (fitted.options["num_heads"], fitted.known_from["num_heads"]) == ([1, 2], "--set")


def test_published_names_of_sizes_are_known():
    words = {"dim": [9, 9, 9], "sequence_length": 4, "inChannels": 2, "num_attention_heads": 4}
    fitted = fit_weights(published("tff3"), "tff3", source="w.pt", told=[Told(by="--config", options=words)])
    assert plain(fitted.options) == OPTIONS["tff3"]


@pytest.mark.parametrize("head", ["v1", "v2", "emb"])
def test_every_published_head_is_known_by_its_names(head):
    fitted = fit_weights(published("swift", head=head, outputs=3), "swift", source="w.pt", told=told("swift"))
    assert (fitted.options["head"], fitted.options["outputs"]) == (head, 3)


def test_a_backbone_alone_is_imported_when_that_is_asked_for():
    weights = published("swift")
    bare = {name.removeprefix("model."): t for name, t in weights.items() if not name.startswith("output_head.")}
    with pytest.raises(WeightsError, match="only the head does not fit: --backbone imports the weights without it"):
        fit_weights(bare, "swift", source="w.pt", told=told("swift"))
    for given in (weights, bare):
        fitted = fit_weights(given, "swift", source="w.pt", told=told("swift"), backbone=True)
        assert {name.split(".")[0] for name in fitted.tensors} == {"model"}
        model = build_fitted(fitted)
        assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in model.model.state_dict().items())
    with pytest.raises(UsageError, match="brainlm has no head that could be left behind; only swift has"):
        fit_weights(published("brainlm"), "brainlm", source="w.pt", backbone=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("other", NETWORKS)
def test_weights_of_another_family_are_refused_with_a_table_and_their_name(name, other):
    if name == other:
        return
    lines = refusal(published(other), name)
    assert lines[0].startswith(f"w.pt: refused as {name}: ")
    assert lines[0].endswith("; nothing is taken from it")
    assert lines[1].split() == ["tensor", "network", "file"]
    assert lines[-1] == f"these are names of {other}: did you mean --as {other}?"
    assert any(line.startswith(("missing", "unexpected")) for line in lines[2:])


def test_the_table_lists_what_is_missing_unexpected_and_of_another_shape():
    weights = published("swift")
    weights["model.layers.0.blocks.0.norm1.weight"] = torch.ones(5)
    weights["model.layers.0.blocks.0.norm3.weight"] = torch.ones(4)
    del weights["output_head.head.bias"]
    assert refusal(weights, "swift") == [
        "w.pt: refused as swift: 3 tensors do not fit (1 shape, 1 missing, 1 unexpected, of 47 expected); "
        "nothing is taken from it",
        "            tensor                                network  file",
        "shape       model.layers.0.blocks.0.norm1.weight  [4]      [5]",
        "missing     output_head.head.bias                 [1]      -",
        "unexpected  model.layers.0.blocks.0.norm3.weight  -        [4]",
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_any_tensor_too_many_or_too_few_is_refused(name):
    for key in list(network(name).state_dict())[::23]:
        weights = published(name)
        del weights[key]
        lines = refusal(weights, name)
        assert any(re.match(rf"missing +{re.escape(key)} ", line) for line in lines), key
    lines = refusal(published(name) | {"surprise.weight": torch.ones(2)}, name)
    assert lines[2:] == ["unexpected  surprise.weight  -        [2]"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("swift", {"embed_dim": 8}, "embed_dim is 8 by --set, and 4 by the tensors"),
        ("swift", {"depths": [2, 2]}, "depths is [2, 2] by --set, and [2, 1] by the tensors"),
        ("swift", {"patch_size": [1, 2, 2, 1], "img_size": [8, 8, 8, 4]}, "img_size is [8, 8, 8, 4] by --set"),
        ("tff2", {"bert_intermediate_size": 16}, "bert_intermediate_size is 16 by --set, and 40 by the tensors"),
        ("tff1", {"img_size": [33, 9, 9, 4]}, "into_bert.into_bert.weight"),
        ("brainlm", {"conv_kernel_size": 9}, "conv_kernel_size is 9 by --set, and 7 by the tensors"),
        ("brainlm-vitmae", {"image_size": 32}, "image_size is 32 by --set, and 24 by the tensors"),
    ],
)
def test_a_size_that_the_tensors_contradict_is_refused_with_both(name, change, said):
    lines = refusal(published(name), name, **change)
    assert any(line.startswith(("shape", "missing", "unexpected")) for line in lines)
    assert said in "\n".join(lines)


def test_a_contradiction_that_every_shape_survives_is_refused_too():
    words = {"dim": [9, 9, 9], "sequence_length": 5}
    with pytest.raises(
        UsageError, match=r"img_size is \[9, 9, 9, 4\] by --set, and \[9, 9, 9, 5\] by the tensors: say one"
    ):
        fit_weights(published("tff1"), "tff1", source="w.pt", told=[Told(by="--config", options=words), *told("tff1")])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    weights = published("tff3", dtype=torch.bfloat16)
    weights["regression_head.0.weight"][0, 3] = bad
    assert refusal(weights, "tff3")[2:] == [
        "not finite  regression_head.0.weight  numbers  1 of 32 NaN or infinite",
        "training diverged before this was saved, or the file is damaged: take an earlier checkpoint",
    ]


def test_values_that_are_not_finite_in_what_is_ignored_do_not_matter():
    weights = published("swift")
    weights["model.norm.weight"][0] = float("nan")
    assert "model.norm.weight" in fit_weights(weights, "swift", source="w.pt", told=told("swift")).ignored


def test_numbers_of_another_kind_are_refused():
    weights = published("swift")
    weights["output_head.head.bias"] = torch.ones(1, dtype=torch.int64)
    assert refusal(weights, "swift")[2:] == ["dtype  output_head.head.bias  float32  int64"]


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_without_axes_or_values_are_refused_and_not_stumbled_over(name):
    for anchor in FAMILIES[name].anchors:
        for tensor in (torch.tensor(1.0), torch.ones(0, 4), torch.ones(4, 0, 0, 0, 0, 0)):
            with pytest.raises((WeightsError, UsageError)):
                fit_weights(published(name) | {anchor: tensor}, name, source="w.pt", told=told(name))


def test_no_weights_at_all_are_refused():
    lines = refusal({}, "brainlm")
    assert lines[0].startswith("w.pt: refused as brainlm: 4 tensors do not fit (4 missing)")


def test_unknown_options_and_networks_are_told_with_the_nearest_name():
    with pytest.raises(UsageError, match="--set num_head: swift has no such option; did you mean num_heads"):
        fit_weights(published("swift"), "swift", source="w.pt", told=told("swift", num_head=[1, 2]))
    with pytest.raises(UsageError, match="there is no import for 'swin'; known: swift, tff1"):
        fit_weights({}, "swin", source="w.pt")


def test_settings_are_toml_values_or_words():
    assert setting("num_heads = [3, 6]") == ("num_heads", [3, 6])
    assert setting("last_layer_full_MSA=true") == ("last_layer_full_MSA", True)
    assert setting("layer_norm_eps=1e-12") == ("layer_norm_eps", 1e-12)
    assert setting("activation=sigmoid") == ("activation", "sigmoid")
    assert setting("a=1\nb = 2")[0] == "a"
    for text in ("num_heads", "=3"):
        with pytest.raises(UsageError, match="expected NAME=VALUE"):
            setting(text)


def test_a_long_table_says_what_it_leaves_out():
    rows = [Row(kind="missing", name=f"a{n}", model="[1]", file="-") for n in range(50)]
    rows += [Row(kind="unexpected", name="b", model="-", file="[1]")]
    lines = table(rows)
    assert len(lines) == 1 + 40 + 2
    assert lines[-2:] == ["... and 10 more missing", "... and 1 more unexpected"]
