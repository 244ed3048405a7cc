"""tools/parity.py compares everything that a TFF case holds, whatever its sizes, and passes no changed one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tools.golden import formula_tensor, read_case
from tools.parity import CHECKS, main
from train.models.tff import build_tff
from train.models.tff_load import hand_over
from train.reconstruction import intense_l1, intense_voxels, l1

# Odd sizes, a bottleneck that needs the linear map, other widths and depths than the published ones.
CONFIG = {
    "dim": [11, 9, 17],
    "intermediate_vec": 24,
    "transformer_hidden_layers": 1,
    "bert_intermediate_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "model_depth": 4,
    "inChannels": 2,
    "outChannels": 1,
    "batch_size": 2,
    "sequence_length": 3,
}
SHAPES = {"dim_0": [11, 9, 17], "dim_1": [6, 5, 9], "dim_2": [3, 3, 5], "dim_3": [2, 2, 3]}
PHASES = {"phase1": "tff1", "phase2": "tff2", "phase3": "tff3"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def networks():
    """The three phases with the same weights."""
    options = {name: CONFIG[name] for name in list(CONFIG)[1:7]} | {"img_size": [*CONFIG["dim"], 3]}
    torch.manual_seed(0)
    found = {phase: build_tff(name, options).eval() for phase, name in PHASES.items()}
    hand_over(found["phase2"], found["phase1"].state_dict(), source="phase1")
    hand_over(found["phase3"], found["phase2"].state_dict(), source="phase2", keep_cls=True)
    return found


def unused():
    return {
        "transformer.bert.embeddings.position_ids": torch.arange(12).unsqueeze(0),
        "transformer.bert.embeddings.word_embeddings.weight": torch.ones(1, 24),
    }


def listed(tensors):
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for name, t in tensors.items()}


def norms(loss, model, names):
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    return {name: found.get(name) for name in names if not name.endswith("position_ids")}


@pytest.fixture
def folder(tmp_path):
    """A case of our own numbers: it shows what the tool compares, where the published cases show that we are right."""
    models, x = networks(), torch.randn(2, 2, 11, 9, 17, 3).half()
    weights = models["phase3"].state_dict() | models["phase1"].state_dict() | unused()
    bold, keys = x.float(), {phase: list(model.state_dict()) for phase, model in models.items()}
    pooler = [name for name in weights if ".pooler." in name]
    keys["phase2"] += [*unused(), *pooler]
    keys["phase3"] += list(unused())
    intense, io, gradients = intense_voxels(bold[:, 1:]), {"x": x}, {}
    for phase in ("phase1", "phase2"):
        rebuilt = models[phase](bold)
        loss = l1(rebuilt, bold[:, :1])
        io |= {f"{phase}.reconstructed": rebuilt, f"{phase}.loss_reconstruction": loss.reshape(1)}
        io[f"{phase}.loss_intensity"] = intense_l1(rebuilt, bold[:, :1], intense).reshape(1)
        gradients[f"grad_l2_{phase}"] = norms(loss, models[phase], keys[phase])
    encoder = models["phase2"].encoder
    vectors = models["phase2"].encode(bold)
    sequence = models["phase2"].transformer(vectors)[:, 1:]
    linear = models["phase3"](bold)
    io |= {
        "act.encoder": encoder(bold.permute(0, 5, 1, 2, 3, 4).flatten(0, 1)),
        "act.into_bert": vectors.flatten(0, 1),
        "act.transformer.sequence": sequence,
        "act.transformer.cls": models["phase3"].summarise(bold),
        "act.from_bert": models["phase2"].from_bert(sequence.flatten(0, 1)),
        "intense_voxels": intense,
        "phase3.binary_classification": linear.sigmoid(),
        "phase3.regression": F.leaky_relu(linear),
        "target_binary": torch.tensor([[0.0], [1.0]]),
        "target_regression": torch.tensor([[0.3], [-0.2]]),
    }
    binary = F.binary_cross_entropy(io["phase3.binary_classification"], io["target_binary"])
    io["phase3.loss_binary"] = binary.reshape(1)
    io["phase3.loss_regression"] = F.l1_loss(io["phase3.regression"], io["target_regression"]).reshape(1)
    gradients["grad_l2_phase3"] = norms(binary, models["phase3"], keys["phase3"])
    io = {name: tensor.detach().contiguous() for name, tensor in io.items()}
    save_file(io, tmp_path / "tff_z.io.safetensors")
    save_file(weights, tmp_path / "tff_z.weights.safetensors")
    note = "grad_l2_phase2 of loss phase2.loss_reconstruction; grad_l2_phase3 of phase3.loss_binary"
    about = {"config": CONFIG, "shapes": SHAPES, "phase_keys": keys, "grad_note": note, **gradients}
    about |= {"io": listed(io), "weights": listed(weights)}
    (tmp_path / "tff_z.json").write_text(json.dumps(about))
    return tmp_path


def change(path, name, function):
    tensors = load_file(path)
    tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, path)


def test_a_whole_case_of_other_sizes_passes_and_everything_in_it_is_compared(folder, capsys):
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "tff_z: ok" in out
    assert "not compared" not in out
    for group in ("grids", "frames", "activations", "losses", "scores and masks", "gradients (relative)"):
        assert group in out


@pytest.mark.parametrize(
    "name",
    [
        "phase1.reconstructed",
        "phase2.reconstructed",
        "phase2.loss_intensity",
        "phase3.loss_regression",
        "phase3.binary_classification",
        "act.encoder",
        "act.into_bert",
        "act.transformer.sequence",
        "act.transformer.cls",
        "act.from_bert",
    ],
)
def test_a_changed_output_fails(folder, capsys, name):
    change(folder / "tff_z.io.safetensors", name, lambda values: values + 3e-4)
    assert main([str(folder)]) == 1
    assert f"past tolerance: {name} differs by" in capsys.readouterr().out


def test_one_voxel_of_the_mask_fails(folder):
    def flip(mask):
        mask[0, 0, 3, 3, 3, 1] ^= True
        return mask

    change(folder / "tff_z.io.safetensors", "intense_voxels", flip)
    assert main([str(folder)]) == 1


@pytest.mark.parametrize("norm", [0.5, None])
def test_a_changed_gradient_norm_fails(folder, norm):
    about = json.loads((folder / "tff_z.json").read_text())
    about["grad_l2_phase2"]["encoder.down_block1.conv0.bias"] = norm
    (folder / "tff_z.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 1


def test_a_name_that_a_phase_does_not_have_fails_with_the_table(folder, capsys):
    about = json.loads((folder / "tff_z.json").read_text())
    about["phase_keys"]["phase1"].append("regression_head.0.bias")
    (folder / "tff_z.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 1
    assert "unexpected regression_head.0.bias  model -  weights [1]" in capsys.readouterr().out


def test_what_nothing_computes_is_listed(folder, capsys):
    path = folder / "tff_z.io.safetensors"
    change(path, "x", lambda x: x)
    save_file(load_file(path) | {"phase1.loss_perceptual": torch.ones(1)}, path)
    about = json.loads((folder / "tff_z.json").read_text())
    about["io"]["phase1.loss_perceptual"] = {"shape": [1], "dtype": "float32"}
    (folder / "tff_z.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 0
    assert "not compared" in capsys.readouterr().out


def published(tmp_path):
    """A case of the other kind: weights and input by formula, every third element stored."""
    models, seed = networks(), 77
    weights = models["phase3"].state_dict() | models["phase1"].state_dict() | unused()
    entries = {
        name: {"shape": list(t.shape), "formula": not name.endswith("position_ids"), "scale": 0.1, "offset": 0.01}
        for name, t in weights.items()
    }
    inputs = {"x": {"shape": [1, 2, 11, 9, 17, 2], "scale": 1.0, "offset": 0.0}}
    x = formula_tensor(seed, "x", **inputs["x"])
    made = {
        name: formula_tensor(seed, name, shape=entry["shape"], scale=0.1, offset=0.01)
        for name, entry in entries.items()
    }
    io, stats = {}, {}
    for phase, model in models.items():
        keys = [*model.state_dict(), *(unused() if phase != "phase1" else ())]
        keys += [name for name in weights if ".pooler." in name and phase == "phase2"]
        model.load_state_dict({name: made[name] for name in model.state_dict()})
        with torch.no_grad():
            out = model(x).sigmoid() if phase == "phase3" else model(x)
        name = f"{phase}.{'binary_classification' if phase == 'phase3' else 'reconstructed'}"
        params = sum(np.prod(entries[key]["shape"]) for key in keys if entries[key]["formula"])
        about = {"shape": list(out.shape), "keys": keys, "params": int(params)}
        about |= {"mean": out.double().mean().item(), "std": out.double().std(correction=0).item()}
        stats[name] = about | {"min": out.min().item(), "max": out.max().item()}
        if phase != "phase3":
            stats[name]["sample_step"] = 3
        io[f"{name}.sample" if phase != "phase3" else name] = out.flatten()[::3].clone() if phase != "phase3" else out
    save_file(io, tmp_path / "pub_tff_z.io.safetensors")
    about = {"config": CONFIG, "shapes": SHAPES, "seed": seed, "tensors": entries, "inputs": inputs, "stats": stats}
    (tmp_path / "pub_tff_z.json").write_text(json.dumps(about | {"io": listed(io)}))


def test_a_case_by_formula_passes_and_a_changed_sample_or_count_fails(tmp_path, capsys):
    published(tmp_path)
    assert main([str(tmp_path)]) == 0
    about = json.loads((tmp_path / "pub_tff_z.json").read_text())
    about["stats"]["phase2.reconstructed"]["params"] += 1
    (tmp_path / "pub_tff_z.json").write_text(json.dumps(about))
    change(tmp_path / "pub_tff_z.io.safetensors", "phase1.reconstructed.sample", lambda values: values + 3e-4)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "past tolerance: phase2 differs by 1.000e+00" in out
    assert "past tolerance: phase1.reconstructed.sample differs" in out


@pytest.mark.skipif("FMRISTREAM_GOLDEN" not in os.environ, reason="FMRISTREAM_GOLDEN names no folder of golden cases")
def test_every_published_case_of_tff_in_the_folder_passes():
    folder = Path(os.environ["FMRISTREAM_GOLDEN"])
    names = sorted(path.stem for path in folder.glob("*tff_*.json") if path.stem.startswith(("tff_", "pub_tff_")))
    assert names
    for name in names:
        (check,) = [check for beginning, check in CHECKS.items() if name.startswith(beginning)]
        rows = check(read_case(folder, name))
        assert [row.name for row in rows if not row.is_within or row.group == "not compared"] == []
