"""BrainLM parity: both models with a case's weights must give the published tokens, series, losses and gradients."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden import Case, GoldenError
from tools.parity_rows import (
    count_row,
    formula_tensors,
    gradient_rows,
    statistics_rows,
    tensor_row,
    uncompared_rows,
)
from tools.parity_swift import Difference
from train.masked_objectives import MASKED_LOSSES, masked_mse
from train.models.brainlm import Brainlm, load_brainlm
from train.models.brainlm_config import published_brainlm, published_vitmae
from train.models.brainlm_vitmae import PADDING_VALUE, BrainlmVitmae, load_vitmae
from train.models.series_masking import Masking, Reconstruction

INPUTS = {"signal_vectors", "xyz_vectors", "noise", "signal"}


def check_brainlm(case: Case) -> list[Difference]:
    """A small case of the token model: everything is stored, gradients of the masked loss too."""
    io = case.tensors("io")
    model = Brainlm(published_brainlm(case["config"])).eval()
    load_brainlm(model, case.tensors("weights"), source=f"{case.name}.weights.safetensors")
    series, xyz = io["signal_vectors"].float(), io["xyz_vectors"].float()
    with _recorded(model, io) as ours:
        result = model(series, xyz, noise=io["noise"])
    loss = MASKED_LOSSES[model.config.loss_fn](result.series, series, result.hidden)
    with torch.no_grad():
        unmasked = model.features(series, xyz)
    ours |= _token_outputs(model, result) | {
        "loss": loss.reshape(1),
        "unmasked.cls": unmasked[:, 0],
        "unmasked.mean_tokens": unmasked[:, 1:].mean(1),
    }
    rows = _rows(case, io, ours)
    if "len_keep" in case.about:
        rows.append(count_row("len_keep", result.latent.shape[1] - 1, case["len_keep"]))
    if "grad_l2" in case.about:
        torch.autograd.backward(loss)
        rows += gradient_rows(case["grad_l2"], model)
    return rows


def check_vitmae(case: Case) -> list[Difference]:
    """A small case of the image model, in each of the modes that it holds."""
    io = case.tensors("io")
    _check_padding(case)
    model = BrainlmVitmae(published_vitmae(case["config"])).eval()
    load_vitmae(model, case.tensors("weights"), source=f"{case.name}.weights.safetensors")
    series, ours, rows = io["signal"].float(), {}, []
    for mode, about in case["modes"].items():
        model.zero_grad(set_to_none=True)
        masking = Masking(mode=mode, ratio=about.get("mask_ratio", model.config.mask_ratio))
        result = model(series, masking=masking, noise=_order_noise(io, mode))
        loss = masked_mse(result.series, series, result.hidden)
        named = _image_outputs(result) | {"loss": loss.reshape(1)}
        if mode != "auto_encode":
            named["noise"] = result.hidden_tokens
        ours |= {f"{mode}.{name}": tensor for name, tensor in named.items()}
        rows += _count_rows(mode, about, result)
        if "grad_l2" in about:
            torch.autograd.backward(loss)
            rows += gradient_rows(about["grad_l2"], model, prefix=f"{mode}: ")
    return _rows(case, io, ours, inputs={"signal", "auto_encode.noise"}) + rows


def check_published_brainlm(case: Case) -> list[Difference]:
    """A published size of the token model: weights and inputs come from the formula, large tensors are sampled."""
    model = Brainlm(published_brainlm(case["config"])).eval()
    load_brainlm(model, _formula_weights(case, model), source=f"{case.name}.json")
    inputs = formula_tensors(case["seed"], case["inputs"])
    series = inputs["signal_vectors"]
    with torch.no_grad():
        result = model(series, inputs["xyz_vectors"], noise=inputs["noise"])
    loss = MASKED_LOSSES[model.config.loss_fn](result.series, series, result.hidden)
    return [*_published_rows(case, _token_outputs(model, result) | {"loss": loss.reshape(1)}), _parameters(case, model)]


def check_published_vitmae(case: Case) -> list[Difference]:
    """A published size of the image model."""
    _check_padding(case)
    model = BrainlmVitmae(published_vitmae(case["config"])).eval()
    load_vitmae(model, _formula_weights(case, model), source=f"{case.name}.json")
    inputs = formula_tensors(case["seed"], case["inputs"])
    masking = Masking(mode=case.about.get("train_mode", model.config.train_mode), ratio=model.config.mask_ratio)
    noise = inputs.get("noise") if masking.mode == "auto_encode" else None
    with torch.no_grad():
        result = model(inputs["signal"], masking=masking, noise=noise)
    loss = masked_mse(result.series, inputs["signal"], result.hidden)
    return [*_published_rows(case, _image_outputs(result) | {"loss": loss.reshape(1)}), _parameters(case, model)]


def _token_outputs(model: Brainlm, result: Reconstruction) -> dict[str, Tensor]:
    """What a case holds of the token model, in the published shapes: (b, parcels, patches, frames)."""
    logits = result.series.unflatten(2, (-1, model.patch))
    return {
        "logits": logits,
        "latent": result.latent,
        "mask": result.hidden_tokens.view(logits.shape[:3]),
        "ids_restore": result.restore,
    }


def _image_outputs(result: Reconstruction) -> dict[str, Tensor]:
    return {
        "logits": result.series,
        "latent": result.latent,
        "mask": result.hidden,
        "token_mask": result.hidden_tokens,
        "ids_restore": result.restore,
    }


def _order_noise(io: Mapping[str, Tensor], mode: str) -> Tensor | None:
    """In the predicting modes the published noise is 0 and 1, and its ties fell as the stored order says."""
    if mode == "auto_encode":
        return io[f"{mode}.noise"]
    restore = io.get(f"{mode}.ids_restore")
    return None if restore is None else restore.float()


def _count_rows(mode: str, about: Mapping[str, Any], result: Reconstruction) -> list[Difference]:
    """Numbers of tokens and values; a description may count one window or the batch."""
    hidden = {"n_masked_tokens": result.hidden_tokens, "n_masked_pixels": result.hidden}
    ours = {name: int(mask.sum()) for name, mask in hidden.items()} | {"n_tokens": result.hidden_tokens.numel()}
    batch = len(result.hidden)
    return [
        count_row(f"{mode}: {name}", count // batch if count == about[name] * batch else count, about[name])
        for name, count in ours.items()
        if name in about
    ]


@contextmanager
def _recorded(model: Brainlm, wanted: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """The activations that `wanted` names: act.encoder.hidden.N is what enters layer N, act.decoder.layer.N what leaves it."""
    acts: dict[str, Tensor] = {}
    encoder, decoder = list(model.vit.encoder.layer), list(model.decoder.decoder_layers)

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: acts.__setitem__(name, output)

    with ExitStack() as hooks:
        for name in wanted:
            match = re.fullmatch(r"act\.(encoder\.hidden|decoder\.layer)\.(\d+)", name)
            if match is None:
                continue
            number = int(match[2])
            parts: list[nn.Module] = [model.vit.embeddings, *encoder] if "encoder" in match[1] else decoder
            if number >= len(parts):
                raise GoldenError(f"{name}: the model has no such layer; fetch the case again")
            hooks.callback(parts[number].register_forward_hook(keep(name)).remove)
        yield acts


def _formula_weights(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the formula, and the tables that are kept as built."""
    entries, own = case["tensors"], model.state_dict()
    built = {name: own[name] for name, entry in entries.items() if not entry["formula"] and name in own}
    return formula_tensors(case["seed"], entries) | built


def _published_rows(case: Case, ours: dict[str, Tensor]) -> list[Difference]:
    ours = ours | {"latent.cls": ours["latent"][:, 0]}
    stats = {name: about for name, about in case["stats"].items() if name in ours}
    samples = {
        f"{name}.sample": ours[name].contiguous().flatten()[:: about["sample_step"]] for name, about in stats.items()
    }
    rows = _rows(case, case.tensors("io"), ours | samples)
    return rows + [row for name, about in stats.items() for row in statistics_rows(name, ours[name], about)]


def _rows(
    case: Case, io: Mapping[str, Tensor], ours: Mapping[str, Tensor], inputs: set[str] = INPUTS
) -> list[Difference]:
    """Every stored tensor that is computed here; a case without outputs proves nothing."""
    compared = {name: expected for name, expected in io.items() if name in ours}
    if not any("logits" in name for name in compared):
        raise GoldenError(f"{case.name} holds no logits to compare with; fetch it again")
    rows = [tensor_row(_group(name), name, ours[name], expected) for name, expected in compared.items()]
    return rows + uncompared_rows(set(io) - inputs, ours)


def _group(name: str) -> str:
    if name.split(".")[-1] in ("mask", "token_mask", "ids_restore", "noise"):
        return "masking"
    return "activations" if name.startswith("act.") else "losses" if "loss" in name else "outputs"


def _check_padding(case: Case) -> None:
    if case.about.get("padding_value", PADDING_VALUE) != PADDING_VALUE:
        raise GoldenError(f"{case.name}: pads with {case['padding_value']}; expected {PADDING_VALUE}")


def _parameters(case: Case, model: nn.Module) -> Difference:
    """The published count: ours, what is never applied, and the image model's position tables, which do not learn."""
    own = dict(model.named_parameters())
    tables = {name for name, _ in model.named_buffers() if not name.endswith(".pe")}
    listed = case["tensors"]
    others = [name for name in listed if name in tables or name not in model.state_dict()]
    count = sum(parameter.numel() for parameter in own.values())
    return count_row(
        "parameters", count + sum(torch.Size(listed[name]["shape"]).numel() for name in others), case["params"]
    )
