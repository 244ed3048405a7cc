"""tools/parity.py passes BrainLM cases of any shape whose numbers are right, and only those.

The cases are made here by the plain oracle, gradients included.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.models.plain_brainlm import plain_brainlm, plain_vitmae
from tests.train.models.test_brainlm import IMAGE, TOKENS, series_and_xyz, small
from tools.parity import main


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of so small a network only wait for each other beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder, name, weights, io, **about):
    about["weights"], about["io"] = (
        {key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]} for key, tensor in part.items()}
        for part in (weights, io)
    )
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / f"{name}.weights.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in io.items()}, folder / f"{name}.io.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(about))


def norms(weights, loss, buffers):
    wanted = {name: tensor for name, tensor in weights.items() if not any(part in name for part in buffers)}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    found = {name: gradient.norm().item() for name, gradient in zip(wanted, gradients, strict=True)}
    return {name: found.get(name) for name in weights if not name.endswith(".pe")}


def learnable(model):
    return {name: tensor.double().requires_grad_() for name, tensor in model.state_dict().items()}


def token_case(folder, name="brainlm_x", **options):
    options = {"loss_fn": "mae", "mask_ratio": 0.75, "conv_kernel_size": 5} | options
    model, (series, xyz) = small("brainlm", **options), series_and_xyz(batch=3, parcels=5)
    weights, noise = learnable(model), torch.rand(3, 20, generator=torch.Generator().manual_seed(4))
    places = xyz.expand(3, 5, 3)
    latent, predicted = plain_brainlm(series.double(), places.double(), weights, model.config, noise, 0.75)
    restore = noise.argsort(1).argsort(1)
    mask = restore >= 5
    loss = (predicted - series).abs().view(3, 20, 5)[mask].mean()
    unmasked = plain_brainlm(
        series.double(), places.double(), weights, model.config, torch.arange(20).expand(3, 20), 0.0
    )[0]
    io = {
        "signal_vectors": series,
        "xyz_vectors": places,
        "noise": noise,
        "mask": mask.view(3, 5, 4).to(torch.uint8),
        "ids_restore": restore.int(),
        "latent": latent.detach().float(),
        "logits": predicted.detach().float().view(3, 5, 4, 5),
        "loss": loss.detach().float().view(1),
        "unmasked.cls": unmasked[:, 0].detach().float(),
        "unmasked.mean_tokens": unmasked[:, 1:].mean(1).detach().float(),
    }
    gradients = norms(weights, loss, (".pe",)) | {"decoder.decoder_pred.weight": None}
    stored = {key: tensor.detach().float() for key, tensor in weights.items()}
    stored["decoder.decoder_pred.weight"] = torch.zeros(12, 16)
    config = TOKENS | options | {"return_dict": True, "image_size": 2, "patch_size": 2}
    write(folder, name, stored, io, config=config, grad_l2=gradients, len_keep=5)


def image_case(folder, name="brainlm_vitmae_x", **options):
    model, (series, _) = small("vitmae", **options), series_and_xyz(batch=2, parcels=19, frames=13)
    series, config = series.half().float(), model.config
    io, modes = {"signal": series.half()}, {}
    tokens = config.grid**2
    for mode in ("auto_encode", "predict_last", "predict_last_pixel"):
        noise, blank, weights = torch.rand(2, tokens, generator=torch.Generator().manual_seed(4)), 0, learnable(model)
        left, frames = (config.image_size - 13) // 2, int(13 * config.mask_ratio)
        if mode != "auto_encode":
            column = torch.arange(config.grid) * config.patch_size
            row = (column >= left + 13 - frames) & (column < left + 13)
            noise, blank = row.float().repeat(2, config.grid), frames * (mode == "predict_last_pixel")
        order = noise.argsort(1)
        kept = int(tokens * (1 - config.mask_ratio)) if mode == "auto_encode" else int((noise[0] == 0).sum())
        restore = order.argsort(1)
        latent, predicted = plain_vitmae(series.double(), weights, config, order, kept, blank)
        token_mask = restore >= kept
        patch, top = config.patch_size, (config.image_size - 19) // 2
        grid = token_mask.view(2, config.grid, config.grid)
        mask = grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, top : top + 19, left : left + 13].clone()
        if blank:
            mask[:, :, -blank:] = True
        loss = (predicted - series).square()[mask].mean()
        results = {"noise": noise, "ids_restore": restore.int(), "token_mask": token_mask.to(torch.uint8)}
        results |= {"latent": latent.detach().float(), "logits": predicted.detach().float()}
        results |= {"mask": mask.to(torch.uint8), "loss": loss.detach().float().view(1)}
        io |= {f"{mode}.{key}": tensor for key, tensor in results.items()}
        gradients = norms(weights, loss, ("position_embeddings", "decoder_pos_embed"))
        modes[mode] = {"grad_l2": gradients, "n_masked_tokens": int(token_mask.sum()), "n_tokens": 2 * tokens}
        modes[mode]["n_masked_pixels"] = int(mask.sum())
    stored = {key: tensor.detach().float() for key, tensor in weights.items()}
    write(folder, name, stored, io, config=IMAGE | options | {"model_type": "vit_mae"}, modes=modes, padding_value=-1.0)


@pytest.mark.parametrize("options", [{}, {"use_tanh_decoder": True, "decoder_num_hidden_layers": 3}])
def test_a_token_case_of_another_shape_passes(tmp_path, capsys, options):
    token_case(tmp_path, **options)
    assert main([str(tmp_path)]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "brainlm_x: ok" in out
    assert "not compared" not in out


@pytest.mark.parametrize("options", [{}, {"patch_size": 3, "mask_ratio": 0.5, "qkv_bias": False}])
def test_an_image_case_of_another_shape_passes_in_every_mode(tmp_path, capsys, options):
    image_case(tmp_path, **options)
    assert main([str(tmp_path)]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "brainlm_vitmae_x: ok" in out
    assert "not compared" not in out


@pytest.mark.parametrize("name", ["logits", "latent", "loss", "unmasked.cls", "unmasked.mean_tokens"])
def test_a_changed_output_of_a_token_case_fails(tmp_path, capsys, name):
    token_case(tmp_path)
    change(tmp_path / "brainlm_x.io.safetensors", name)
    assert main([str(tmp_path)]) == 1
    assert f"past tolerance: {name} differs by" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["auto_encode.logits", "predict_last.latent", "predict_last_pixel.loss"])
def test_a_changed_output_of_an_image_case_fails(tmp_path, capsys, name):
    image_case(tmp_path)
    change(tmp_path / "brainlm_vitmae_x.io.safetensors", name)
    assert main([str(tmp_path)]) == 1
    assert f"past tolerance: {name} differs by" in capsys.readouterr().out


@pytest.mark.parametrize("norm", [0.5, None])
def test_a_changed_gradient_norm_fails(tmp_path, norm):
    token_case(tmp_path)
    about = json.loads((tmp_path / "brainlm_x.json").read_text())
    about["grad_l2"]["decoder.mask_token"] = norm
    (tmp_path / "brainlm_x.json").write_text(json.dumps(about))
    assert main([str(tmp_path)]) == 1


def test_another_padding_is_refused(tmp_path, capsys):
    image_case(tmp_path)
    about = json.loads((tmp_path / "brainlm_vitmae_x.json").read_text())
    (tmp_path / "brainlm_vitmae_x.json").write_text(json.dumps(about | {"padding_value": 0.0}))
    assert main([str(tmp_path)]) == 1
    assert "pads with 0.0; expected -1.0" in capsys.readouterr().out


def change(path, name):
    tensors = load_file(path)
    tensors[name] = tensors[name] + np.float32(3e-4)
    save_file(tensors, path)
