"""tools/parity.py passes whole golden cases, and only those."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tools.golden import formula_noise
from tools.parity import main

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of so small a network only wait for each other beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    for path in GOLDEN.glob("swift_a3.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def change(path, name, function):
    tensors = load_file(path)
    tensors[name] = function(tensors[name])
    save_file(tensors, path)


def test_a_whole_case_passes_and_a_strange_one_is_only_listed(folder, capsys):
    (folder / "strange_a.json").write_text("{}")
    (folder / "tolerances.json").write_text("{}")
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "swift_a3: ok" in out
    assert "not known: strange_a\n" in out
    assert "1 of 1 known cases within tolerance" in out


@pytest.mark.parametrize("name", ["feature", "clf_v2_logits", "emb_g", "act.pos_embeds.1", "loss_reg", "ntxent_loss"])
def test_a_changed_output_fails(folder, capsys, name):
    change(folder / "swift_a3.io.safetensors", name, lambda values: values + np.float32(3e-4))
    assert main([str(folder)]) == 1
    assert f"past tolerance: {name} differs by" in capsys.readouterr().out


def test_an_output_that_is_not_a_number_fails(folder):
    change(folder / "swift_a3.io.safetensors", "feature", lambda values: values * np.float32("nan"))
    assert main([str(folder)]) == 1


def test_changed_weights_fail(folder):
    name = "model.layers.0.blocks.1.attn.qkv.weight"
    change(folder / "swift_a3.weights.safetensors", name, lambda values: values * np.float32(1.01))
    assert main([str(folder)]) == 1


@pytest.mark.parametrize("norm", [0.5, None])
def test_a_changed_gradient_norm_fails(folder, norm):
    about = json.loads((folder / "swift_a3.json").read_text())
    about["grad_l2"]["model.patch_embed.fc.bias"] = norm
    (folder / "swift_a3.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 1


@pytest.mark.parametrize("part", ["json", "io.safetensors", "weights.safetensors", "heads.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_missing_or_damaged_file_fails_without_stopping_the_others(folder, capsys, part, damage):
    shutil.copy(GOLDEN / "swift_a1.json", folder / "swift_a0.json")
    path = folder / f"swift_a3.{part}"
    whole = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "swift_a0: FAILED" in out
    assert "swift_a3: FAILED" in out


def test_a_case_whose_description_lists_something_else_fails(folder, capsys):
    about = json.loads((folder / "swift_a3.json").read_text())
    del about["io"]["emb_l"]
    (folder / "swift_a3.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 1
    assert "emb_l not as swift_a3.json lists them" in capsys.readouterr().out


PREPARED = ("prep_swift_a", "prep_tff_a", "prep_brainlm_ukb_a", "prep_brainlm_toolkit_a")


def test_published_preprocessing_comes_out_of_the_stream_under_public_names(tmp_path, capsys):
    for case in PREPARED:
        for path in GOLDEN.glob(f"{case}.*"):
            shutil.copy(path, tmp_path)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"{case}: ok" in out for case in PREPARED)
    assert "4 of 4 known cases within tolerance" in out


@pytest.mark.parametrize(
    ("case", "name"),
    [("prep_tff_a", "expected.global"), ("prep_brainlm_ukb_a", "val.Per_Voxel_All_Patient_Normalized_Recording")],
)
def test_changed_preprocessing_fails(tmp_path, capsys, case, name):
    for path in GOLDEN.glob(f"{case}.*"):
        shutil.copy(path, tmp_path)
    change(tmp_path / f"{case}.io.safetensors", name, lambda values: values + np.float32(3e-4))
    assert main([str(tmp_path)]) == 1
    assert "differs by" in capsys.readouterr().out


def test_a_folder_without_a_known_case_fails(tmp_path, capsys):
    (tmp_path / "strange_a.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    assert "no known case" in capsys.readouterr().out


def test_no_folder_is_wrong_usage(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "none")])
    assert caught.value.code == 2


def test_the_closed_formula_gives_its_published_values():
    np.testing.assert_array_equal(
        formula_noise(7, "x", 3), np.float32([0.9806958436965942, -0.14084529876708984, -0.03275442123413086])
    )
