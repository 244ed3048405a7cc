"""SwiFT parity: our network with a case's weights must give the published features, heads, losses and gradients."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.golden import Case, GoldenError, formula_tensor
from train.models.heads import HeadedModel, build_head, nt_xent
from train.models.load import load_backbone, load_model
from train.models.swift import Swift
from train.models.swift_config import swift_config

TOLERANCE = 1e-4
# Relative. The reference itself moves by 3e-5 from one thread to two.
GRADIENT_TOLERANCE = 1e-3
# What the published hyper-parameters say about its trainer and head; the backbone has no such option.
NOT_BACKBONE = ("precision", "clf_head_version", "attn_drop_rate", "to_float")
# Published name of a head -> ours, and the outputs that a case may hold of it.
HEADS = {
    "clf_mlp": ("v1", ("clf_logits",)),
    "reg_mlp": ("v1", ("reg_out",)),
    "clf_mlp_v2": ("v2", ("clf_v2_logits",)),
    "emb_mlp": ("emb", ("emb_g", "emb_l")),
}
INPUTS = {"x", "target_clf", "target_reg", "ntxent_z1", "ntxent_z2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One compared number or tensor; a NaN difference is within no tolerance."""

    group: str
    name: str
    value: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.value <= self.tolerance


def check_swift(case: Case) -> list[Difference]:
    """A small case: everything is stored, and the gradients of the classification loss are checked too."""
    io = case.tensors("io")
    model = HeadedModel(_backbone(case), _head(case["config"].get("clf_head_version", "v1"), case)).eval()
    load_model(model, case.tensors("weights"), source=f"{case.name}.weights.safetensors")
    x = io["x"].float().requires_grad_()
    with _recorded(model.model, io) as ours:
        features = model.model(x)
    ours |= {"feature": features, "clf_logits": model.output_head(features)}
    if "heads_file" in case.about:
        ours |= _further_heads(case, features)
    ours |= _losses(case, ours, io)
    rows = [_compare(name, ours[name], expected) for name, expected in io.items() if name in ours]
    if "grad_l2" in case.about:
        torch.autograd.backward(ours["loss_clf"].sum())
        rows += _gradient_rows(case, model, x)
    return rows + _uncompared(io, ours)


def check_published_swift(case: Case) -> list[Difference]:
    """A published size: weights and input come from a formula, large tensors are stored as every k-th element."""
    io, seed, stats = case.tensors("io"), case["seed"], case["stats"]
    backbone = _backbone(case).eval()
    entries = {name: entry for name, entry in case["tensors"].items() if entry["formula"]}
    load_backbone(backbone, _from_formula(seed, entries), source=f"{case.name}.json")
    (x,) = _from_formula(seed, case["inputs"]).values()
    with torch.no_grad(), _recorded(backbone, stats) as acts:
        ours = {"feature": backbone(x)}
        for label, tensors in case["head_tensors"].items():
            ours |= _formula_head(case, label, tensors, ours["feature"])
    acts = {name: acts[name].contiguous() for name in acts}
    ours |= {f"{name}.sample": act.flatten()[:: stats[name]["sample_step"]] for name, act in acts.items()}
    rows = [_compare(name, ours[name], expected) for name, expected in io.items() if name in ours]
    rows += [row for name, act in acts.items() for row in _stats_rows(name, act, stats[name])]
    return [*rows, _parameter_row(case, backbone), *_uncompared(io, ours)]


def _backbone(case: Case) -> Swift:
    if case["config"].get("attn_drop_rate", 0.0):
        raise GoldenError(f"{case.name}: dropout {case['config']['attn_drop_rate']} is unknown here; expected 0")
    return Swift(swift_config({name: value for name, value in case["config"].items() if name not in NOT_BACKBONE}))


def _head(kind: str, case: Case) -> nn.Module:
    config = case["config"]
    channels = config["embed_dim"] * config["c_multiplier"] ** (len(config["depths"]) - 1)
    return build_head(kind, channels=channels, outputs=128 if kind == "emb" else 1)


def _further_heads(case: Case, features: Tensor) -> dict[str, Tensor]:
    weights = case.tensors("heads")
    outputs: dict[str, Tensor] = {}
    for published in sorted({name.split(".")[0] for name in weights} & set(HEADS)):
        kind, names = HEADS[published]
        head = _head(kind, case).eval()
        head.load_state_dict(
            {name.split(".", 1)[1]: tensor for name, tensor in weights.items() if name.startswith(f"{published}.")}
        )
        outputs |= dict.fromkeys(names, head(features))
    return outputs


def _formula_head(
    case: Case, label: str, tensors: Mapping[str, Mapping[str, Any]], features: Tensor
) -> dict[str, Tensor]:
    """`label` is a published head and its seed, such as `reg_mlp (seed+1)`."""
    match = re.fullmatch(r"(\w+) \(seed(?:\+(\d+))?\)", label)
    if match is None or match[1] not in HEADS:
        raise GoldenError(f"{case.name}: head {label!r} is unknown; expected one of {', '.join(HEADS)} with (seed+N)")
    kind, names = HEADS[match[1]]
    if match[1] == "clf_mlp":
        kind = case["config"].get("clf_head_version", "v1")
    head = _head(kind, case).eval()
    head.load_state_dict(_from_formula(case["seed"] + int(match[2] or 0), tensors))
    return dict.fromkeys(names, head(features))


def _from_formula(seed: int, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        name: formula_tensor(
            seed, entry.get("key", name), shape=entry["shape"], scale=entry["scale"], offset=entry["offset"]
        )
        for name, entry in entries.items()
    }


@contextmanager
def _recorded(backbone: nn.Module, wanted: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the parts that `wanted` names, such as act.layers.0, in the published order of axes."""
    acts: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: acts.__setitem__(name, output.permute(0, 5, 1, 2, 3, 4))

    with ExitStack() as hooks:
        for name in wanted:
            if re.fullmatch(r"act\.(layers|pos_embeds)\.\d+", name):
                part = backbone.get_submodule(name.removeprefix("act."))
                hooks.callback(part.register_forward_hook(keep(name)).remove)
        yield acts


def _losses(case: Case, ours: Mapping[str, Tensor], io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    losses = {"loss_clf": F.binary_cross_entropy_with_logits(ours["clf_logits"].squeeze(1), io["target_clf"])}
    if "reg_out" in ours and "target_reg" in io:
        losses["loss_reg"] = F.mse_loss(ours["reg_out"], io["target_reg"])
    if "ntxent_z1" in io:
        setting = case["ntxent"]
        losses["ntxent_loss"] = nt_xent(
            io["ntxent_z1"],
            io["ntxent_z2"],
            temperature=setting["temperature"],
            cosine=setting["use_cosine_similarity"],
        )
    return {name: loss.reshape(1) for name, loss in losses.items()}


def _compare(name: str, ours: Tensor, expected: Tensor) -> Difference:
    if ours.shape != expected.shape:
        raise GoldenError(f"{name}: ours has shape {list(ours.shape)}, the case {list(expected.shape)}")
    value = (ours.detach().double() - expected.double()).abs().max().item()
    return Difference(group=_group(name), name=name, value=value, tolerance=TOLERANCE)


def _group(name: str) -> str:
    if name == "feature":
        return "features"
    return "activations" if name.startswith("act.") else "losses" if "loss" in name else "heads"


def _gradient_rows(case: Case, model: nn.Module, x: Tensor) -> list[Difference]:
    """Norms relative to the published ones; a parameter without a gradient there must have none here."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = dict(case["grad_l2"])
    if "grad_input_l2" in case.about:
        ours["input"], norms["input"] = x.grad, case["grad_input_l2"]
    return [_gradient_row(name, ours.get(name), norm) for name, norm in norms.items()]


def _gradient_row(name: str, gradient: Tensor | None, expected: float | None) -> Difference:
    if gradient is None or expected is None:
        value = 0.0 if gradient is None and expected is None else float("inf")
    else:
        value = abs(gradient.double().norm().item() - expected) / max(expected, 1e-3)
    return Difference(group="gradients (relative)", name=name, value=value, tolerance=GRADIENT_TOLERANCE)


def _stats_rows(name: str, act: Tensor, expected: Mapping[str, Any]) -> list[Difference]:
    values = act.double()
    if list(act.shape) != list(expected["shape"]):
        raise GoldenError(f"{name}: ours has shape {list(act.shape)}, the case {expected['shape']}")
    ours = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
    return [
        Difference(
            group="statistics",
            name=f"{name} {statistic}",
            value=abs(value.item() - expected[statistic]),
            tolerance=TOLERANCE,
        )
        for statistic, value in ours.items()
    ]


def _parameter_row(case: Case, backbone: nn.Module) -> Difference:
    """The published count includes the norm that is never applied."""
    count = sum(parameter.numel() for parameter in backbone.parameters())
    unused = sum(case["tensors"][name]["shape"][0] for name in ("norm.weight", "norm.bias"))
    return Difference(group="parameters", name="count", value=abs(count + unused - case["params"]), tolerance=0)


def _uncompared(io: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[Difference]:
    """A stored tensor that nothing here computes is said to be so; a case without features proves nothing."""
    if "feature" not in io:
        raise GoldenError("the case holds no feature to compare with; fetch it again")
    return [
        Difference(group="not compared", name=name, value=0, tolerance=0)
        for name in sorted(set(io) - set(ours) - INPUTS)
    ]
