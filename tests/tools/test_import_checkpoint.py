"""The command brings published checkpoints in whole, golden ones too, and says plainly why it does not."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.models.tiny_networks import NETWORKS, OPTIONS, published, unseen
from tools import import_checkpoint
from tools.golden import formula_tensor, read_case
from train.config import load_recipe
from train.models.imported import load_imported, read_about

GOLDEN = Path(__file__).parents[1] / "golden"
WHOLE_GOLDEN = os.environ.get("FMRISTREAM_GOLDEN", "")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Harmful:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def settings(options):
    return [word for name, value in options.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def given(folder, name, layout="state_dict", **changed):
    """A published file and the words of the command that import it."""
    path = folder / {"Lightning": "last.ckpt", "tff": "last.pth", "state_dict": "pytorch_model.bin"}[layout]
    state = published(name) | changed
    content = {
        "Lightning": {"state_dict": state, "hyper_parameters": unseen(name), "epoch": 9},
        "tff": {"model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "lr": [1e-3]},
        "state_dict": state,
    }[layout]
    torch.save(content, path)
    words = [] if layout == "Lightning" else settings(unseen(name))
    return [str(path), "--as", name, *words]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", ["Lightning", "tff", "state_dict"])
def test_every_family_is_imported_from_every_layout(tmp_path, capsys, name, layout):
    assert import_checkpoint.main([*given(tmp_path, name, layout), "--out", str(tmp_path / "out")]) == 0
    weights, stored = published(name), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in stored.items())
    assert load_recipe(str(tmp_path / "out" / "recipe.toml")).model.name == name
    told = capsys.readouterr().out
    assert f"network    {name}: {len(stored)} tensors ({len(stored)} float32)" in told
    assert ("stripped   module." in told) is (layout == "tff")
    assert all(f"option     {option} = " in told for option in OPTIONS[name])
    assert "licence    " in told


def test_options_come_from_a_published_config_or_a_recipe(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(OPTIONS["brainlm"] | {"architectures": ["BrainLM"], "torch_dtype": "x"})
    )
    (tmp_path / "recipe.toml").write_text("[data]\nwindow = 20\n[model]\nnum_timepoints_per_voxel = 20\n")
    for config in ("config.json", "recipe.toml"):
        words = [
            *given(tmp_path, "brainlm")[:3],
            "--config",
            str(tmp_path / config),
            "--out",
            str(tmp_path / config[:6]),
        ]
        assert import_checkpoint.main(words) == 0
        assert "option     num_timepoints_per_voxel = 20  (--config)" in capsys.readouterr().out
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        words = [
            *given(tmp_path, "brainlm")[:3],
            "--config",
            str(tmp_path / "config.json"),
            "--out",
            str(tmp_path / "no"),
        ]
        assert import_checkpoint.main(words) == 2
        assert "config.json: " in capsys.readouterr().err


def refused(words, folder, capsys, status=1):
    """What the command says; it must have written nothing."""
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    assert import_checkpoint.main([*words, "--out", str(folder / "out")]) == status
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before
    return capsys.readouterr().err.splitlines()


def test_a_wrong_file_is_refused_with_a_readable_table(tmp_path, capsys):
    changed = {"model.surprise": torch.ones(2, 3), "model.layers.0.blocks.1.norm2.bias": torch.ones(5)}
    assert refused(given(tmp_path, "swift", **changed), tmp_path, capsys) == [
        "import_checkpoint: pytorch_model.bin: refused as swift: 2 tensors do not fit (1 shape, 1 unexpected, "
        "of 47 expected); nothing is taken from it",
        "            tensor                              network  file",
        "shape       model.layers.0.blocks.1.norm2.bias  [4]      [5]",
        "unexpected  model.surprise                      -        [2, 3]",
    ]


def test_a_file_of_another_family_is_refused_and_named(tmp_path, capsys):
    lines = refused([given(tmp_path, "tff2")[0], "--as", "swift"], tmp_path, capsys)
    assert lines[0].startswith("import_checkpoint: pytorch_model.bin: refused as swift: ")
    assert lines[2].split() == ["missing", "model.patch_embed.fc.weight", "any", "size", "-"]
    assert len({line.index("any size") for line in lines[2:7]}) == 1, "columns stand below each other"
    assert lines[-2].startswith("... and ")
    assert lines[-2].endswith(" more unexpected")
    assert lines[-1] == "these are names of tff2: did you mean --as tff2?"


def test_a_file_with_too_few_words_beside_it_is_not_guessed_at(tmp_path, capsys):
    lines = refused(given(tmp_path, "swift")[:3], tmp_path, capsys, status=2)
    assert "5 options cannot be seen in the tensors" in lines[0]
    assert lines[1].split()[0] == "patch_size"


def test_a_harmful_pickle_is_refused_before_it_runs(tmp_path, capsys):
    for number, write in enumerate((torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)))):
        path = tmp_path / f"bad{number}.ckpt"
        write({"state_dict": published("swift"), "callbacks": Harmful(tmp_path / "marker")}, path)
        lines = refused([str(path), "--as", "swift"], tmp_path, capsys)
        assert lines[0].startswith(f"import_checkpoint: {path}: ")
    assert not (tmp_path / "marker").exists()


def test_names_that_would_move_a_cursor_are_shown_without_doing_it(tmp_path, capsys):
    lines = refused(given(tmp_path, "swift", **{"a\x1b[2J\rb\nc": torch.ones(2)}), tmp_path, capsys)
    assert lines[2:] == ["unexpected  a?[2J?b?c  -        [2]"]
    torch.save({"state_dict": {"a\x1b[2J": 3}}, tmp_path / "pytorch_model.bin")
    (line,) = refused([str(tmp_path / "pytorch_model.bin"), "--as", "swift"], tmp_path, capsys)
    assert "got other values for a?[2J;" in line


def test_truncated_files_and_values_that_are_not_numbers_are_refused(tmp_path, capsys):
    words = given(tmp_path, "swift", **{"output_head.head.bias": torch.full((1,), torch.nan)})
    lines = refused(words, tmp_path, capsys)
    assert lines[2] == "not finite  output_head.head.bias  numbers  1 of 1 NaN or infinite"
    path = Path(words[0])
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole file" in refused(words, tmp_path, capsys)[0]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    words = [*given(tmp_path, "swift"), "--out", str(tmp_path / "out")]
    assert [import_checkpoint.main(words) for _ in range(2)] == [0, 2]
    assert "is there already" in capsys.readouterr().err
    assert import_checkpoint.main([*words, "--force"]) == 0


def test_no_place_is_written_down(tmp_path):
    assert import_checkpoint.main([*given(tmp_path, "swift", "Lightning"), "--out", str(tmp_path / "out")]) == 0
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def golden(name):
    """A case of the repository, or of the whole folder of them."""
    folder = GOLDEN if (GOLDEN / f"{name}.json").exists() else WHOLE_GOLDEN
    if not folder:
        pytest.skip(f"{name}: FMRISTREAM_GOLDEN names no folder of golden cases")
    return read_case(Path(folder), name)


def import_golden(case, folder, network, weights, config):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    words = [str(folder / "weights.safetensors"), "--as", network, "--config", str(folder / "config.json")]
    assert import_checkpoint.main([*words, "--out", str(folder / "out")]) == 0
    stored = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored.items())
    assert set(weights) == set(stored) | set(read_about(folder / "out")["ignored"])
    return load_imported(folder / "out").eval()


@pytest.mark.parametrize("name", ["swift_a1", "swift_a2", "swift_a3"])
def test_golden_swifts_are_imported_and_give_the_golden_logits(tmp_path, name):
    case = golden(name)
    model = import_golden(case, tmp_path, "swift", case.tensors("weights"), case["config"])
    io = case.tensors("io")
    with torch.no_grad():
        torch.testing.assert_close(model(io["x"].float()), io["clf_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_golden_tffs_are_imported_and_give_the_golden_frames_and_scores(tmp_path, phase):
    case = golden("tff_a")
    io, weights = case.tensors("io"), case.tensors("weights")
    state = {name: weights[name] for name in case["phase_keys"][f"phase{phase}"]}
    model = import_golden(case, tmp_path, f"tff{phase}", state, case["config"])
    expected = io[f"phase{phase}.reconstructed"] if phase < 3 else io["phase3.binary_classification"].logit()
    with torch.no_grad():
        torch.testing.assert_close(model(io["x"].float()), expected, rtol=0, atol=1e-4)


def test_the_golden_brainlm_is_imported_and_gives_the_golden_series(tmp_path):
    case = golden("brainlm_a")
    model = import_golden(case, tmp_path, "brainlm", case.tensors("weights"), case["config"])
    io = case.tensors("io")
    with torch.no_grad():
        series = model(io["signal_vectors"], io["xyz_vectors"], noise=io["noise"]).series
    torch.testing.assert_close(series.unflatten(2, (-1, model.patch)), io["logits"], rtol=0, atol=1e-4)


def test_the_golden_image_model_is_imported_and_gives_the_golden_picture(tmp_path):
    case = golden("brainlm_vitmae_a")
    model = import_golden(case, tmp_path, "brainlm-vitmae", case.tensors("weights"), case["config"])
    io = case.tensors("io")
    with torch.no_grad():
        series = model(io["signal"].float(), noise=io["auto_encode.noise"]).series
    torch.testing.assert_close(series, io["auto_encode.logits"], rtol=0, atol=1e-4)


def published_size(case, network):
    """Weights of a published size by the closed formula, under the names of a checkpoint."""
    entries = dict(case["tensors"])
    if network == "tff1":
        entries = {name: entries[name] for name in case["stats"]["phase1.reconstructed"]["keys"]}
    if network == "swift":
        entries = {f"model.{name}": entry for name, entry in entries.items()}
        entries |= {f"output_head.{name}": entry for name, entry in case["head_tensors"]["clf_mlp (seed)"].items()}
    return {
        name: formula_tensor(case["seed"], name, shape=entry["shape"], scale=entry["scale"], offset=entry["offset"])
        if entry["formula"]
        else torch.zeros(entry["shape"])
        for name, entry in entries.items()
    }


@pytest.mark.parametrize(
    ("name", "network", "learning"),
    [
        ("pub_swift_36", "swift", 4_315_212 - 576 + 289),
        ("pub_tff_a", "tff1", 7_271_359),
        pytest.param("pub_brainlm_256", "brainlm", 5_047_724 - 197_376, marks=pytest.mark.full),
        pytest.param("pub_brainlm_vitmae_111m_a", "brainlm-vitmae", 112_590_080 - 934_400, marks=pytest.mark.full),
    ],
)
def test_published_sizes_are_imported(tmp_path, name, network, learning):
    case = golden(name)
    model = import_golden(case, tmp_path, network, published_size(case, network), case["config"])
    assert sum(parameter.numel() for parameter in model.parameters()) == learning
