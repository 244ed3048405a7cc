"""TFF parity: our three phases with a case's weights must give the published frames, vectors, scores, losses and gradients."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.golden import Case, GoldenError, formula_tensor
from tools.parity_swift import GRADIENT_TOLERANCE, TOLERANCE, Difference
from train.models.tff import EncoderTransformerHead, build_tff
from train.models.tff_config import tff_config
from train.models.tff_load import NEVER_USED, POOLER_OF_PHASE_2, load_tff
from train.reconstruction import intense_l1, intense_voxels, l1

# Published name of a size -> ours; what else a case's config says is no size of the network.
OPTIONS = {
    "inChannels": "in_chans",
    "outChannels": "out_chans",
    "model_depth": "model_depth",
    "intermediate_vec": "intermediate_vec",
    "transformer_hidden_layers": "transformer_hidden_layers",
    "bert_intermediate_size": "bert_intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
PHASES = {"phase1": "tff1", "phase2": "tff2", "phase3": "tff3"}
INPUTS = {"x", "target_binary", "target_regression"}
# The gradients that a case without a note about them is of.
GRADIENT_LOSSES = {
    "phase1": "phase1.loss_reconstruction",
    "phase2": "phase2.loss_reconstruction",
    "phase3": "phase3.loss_binary",
}
# Activation -> the phase and the part that gives it, and what is kept of that part's output.
ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "act.transformer.sequence": ("phase2", "transformer", lambda sequence: sequence[:, 1:]),
}


def check_tff(case: Case) -> list[Difference]:
    """A small case: everything is stored, and the gradients of a loss per phase are checked too."""
    io, weights = case.tensors("io"), case.tensors("weights")
    keys = case["phase_keys"]
    x, ours, rows = io["x"].float(), {}, _shape_rows(case)  # x is stored as float16
    for phase in PHASES:
        model = _network(case, phase, {name: weights[name] for name in keys[phase]}, x)
        found = _outputs(phase, model, x, io)
        found |= _losses(phase, found, io)
        rows += _gradient_rows(case, phase, model, found)
        ours |= {name: value.detach() for name, value in found.items()}
    if "intense_voxels" in io:
        ours["intense_voxels"] = intense_voxels(x[:, 1:])
    return [*rows, *_compared(ours, io)]


def check_published_tff(case: Case, phases: Iterable[str] = tuple(PHASES)) -> list[Difference]:
    """A published size: weights and input come from a formula, large tensors are stored as every k-th element."""
    io, stats = case.tensors("io"), case["stats"]
    x = _from_formula(case, case["inputs"])["x"]
    formulas = {name: entry for name, entry in case["tensors"].items() if entry["formula"]}
    ours, rows = {}, _shape_rows(case)
    for phase in phases:
        about = [entry for name, entry in stats.items() if name.startswith(f"{phase}.")]
        if not about:
            raise GoldenError(f"{case.name}.json says nothing about {phase}; fetch the case again")
        keys = [name for name in about[0]["keys"] if name in formulas]
        model = _network(case, phase, _from_formula(case, {name: formulas[name] for name in keys}), x)
        with torch.no_grad():
            ours |= _outputs(phase, model, x, io)
        rows.append(_parameter_row(case, phase, model, about[0]))
        del model  # before the next one is made: the published phases 2 and 3 take 440 MB each
    for name, expected in ((name, stats[name]) for name in stats if name.startswith(tuple(phases))):
        rows += _stats_rows(name, ours[name], expected)
        if "sample_step" in expected:
            ours[f"{name}.sample"] = ours[name].contiguous().flatten()[:: expected["sample_step"]]
    return [*rows, *_compared(ours, io)]


def _network(case: Case, phase: str, weights: Mapping[str, Tensor], x: Tensor) -> nn.Module:
    config = case["config"]
    options = {ours: config[published] for published, ours in OPTIONS.items() if published in config}
    with torch.device("meta"):  # the published size has 110 million weights: random values first would be for nothing
        model = build_tff(PHASES[phase], {"img_size": [*config["dim"], x.shape[5]], **options})
    model = model.to_empty(device="cpu").eval()
    load_tff(model, weights, source=f"{case.name} {phase}")
    return model


def _outputs(phase: str, model: nn.Module, x: Tensor, io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a phase gives, and the activations that the case asks of it."""
    with _recorded(phase, model, io) as acts:
        if not isinstance(model, EncoderTransformerHead):
            return {f"{phase}.reconstructed": model(x)} | acts
        pooled = model.summarise(x)
        linear = model.regression_head(pooled)
    scores = {"phase3.binary_classification": linear.sigmoid(), "phase3.regression": F.leaky_relu(linear)}
    return scores | {"act.transformer.cls": pooled} | acts


@contextmanager
def _recorded(phase: str, model: nn.Module, wanted: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the parts of phase 2 that `wanted` names, such as act.encoder."""
    acts: dict[str, Tensor] = {}
    parts = dict(model.named_modules())

    def keep(name: str, change: Callable[[Tensor], Tensor]) -> Any:
        return lambda _module, _inputs, output: acts.__setitem__(name, change(output))

    with ExitStack() as hooks:
        for name in wanted:
            of_phase, part, change = ACTIVATIONS.get(name, ("phase2", name.removeprefix("act."), lambda output: output))
            if name.startswith("act.") and of_phase == phase and part in parts:
                hooks.callback(parts[part].register_forward_hook(keep(name, change)).remove)
        yield acts


def _losses(phase: str, ours: Mapping[str, Tensor], io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if phase == "phase3":
        losses = {
            "phase3.loss_binary": F.binary_cross_entropy(ours["phase3.binary_classification"], io["target_binary"]),
            "phase3.loss_regression": F.l1_loss(ours["phase3.regression"], io["target_regression"]),
        }
    else:
        x, rebuilt = io["x"].float(), ours[f"{phase}.reconstructed"]
        losses = {
            f"{phase}.loss_reconstruction": l1(rebuilt, x[:, :1]),
            f"{phase}.loss_intensity": intense_l1(rebuilt, x[:, :1], intense_voxels(x[:, 1:])),
        }
    return {name: loss.reshape(1) for name, loss in losses.items()}


def _from_formula(case: Case, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        name: formula_tensor(
            case["seed"], entry.get("key", name), shape=entry["shape"], scale=entry["scale"], offset=entry["offset"]
        )
        for name, entry in entries.items()
    }


def _compared(ours: Mapping[str, Tensor], io: Mapping[str, Tensor]) -> list[Difference]:
    """Every stored tensor beside ours; one that nothing here computes is said to be so."""
    if not any(name.startswith("phase") for name in io):
        raise GoldenError("the case holds no output of a phase to compare with; fetch it again")
    rows = [_compare(name, ours[name], expected) for name, expected in io.items() if name in ours]
    uncompared = sorted(set(io) - set(ours) - INPUTS)
    return rows + [Difference(group="not compared", name=name, value=0, tolerance=0) for name in uncompared]


def _compare(name: str, ours: Tensor, expected: Tensor) -> Difference:
    if ours.shape != expected.shape:
        raise GoldenError(f"{name}: ours has shape {list(ours.shape)}, the case {list(expected.shape)}")
    value = (ours.double() - expected.double()).abs().max().item()
    tolerance = 0 if expected.dtype == torch.bool else TOLERANCE
    return Difference(group=_group(name), name=name, value=value, tolerance=tolerance)


def _group(name: str) -> str:
    if name.startswith("act."):
        return "activations"
    return "losses" if ".loss_" in name else "frames" if ".reconstructed" in name else "scores and masks"


def _gradient_rows(case: Case, phase: str, model: nn.Module, found: Mapping[str, Tensor]) -> list[Difference]:
    """Norms relative to the published ones; a parameter without a gradient there must have none, or not be, here."""
    norms = case.about.get(f"grad_l2_{phase}")
    if norms is None:
        return []
    noted = re.search(rf"grad_l2_{phase} of (?:loss )?(\w+\.\w+)", case.about.get("grad_note", ""))
    torch.autograd.backward(found[noted[1] if noted else GRADIENT_LOSSES[phase]].sum())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [_gradient_row(f"{phase} {name}", gradients.get(name), norm) for name, norm in norms.items()]


def _gradient_row(name: str, gradient: Tensor | None, expected: float | None) -> Difference:
    if gradient is None or expected is None:
        value = 0.0 if gradient is None and expected is None else float("inf")
    else:
        value = abs(gradient.double().norm().item() - expected) / max(expected, 1e-3)
    return Difference(group="gradients (relative)", name=name, value=value, tolerance=GRADIENT_TOLERANCE)


def _stats_rows(name: str, ours: Tensor, expected: Mapping[str, Any]) -> list[Difference]:
    if list(ours.shape) != list(expected["shape"]):
        raise GoldenError(f"{name}: ours has shape {list(ours.shape)}, the case {expected['shape']}")
    values = ours.double()
    found = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
    return [
        Difference(
            group="statistics",
            name=f"{name} {statistic}",
            value=abs(value.item() - expected[statistic]),
            tolerance=TOLERANCE,
        )
        for statistic, value in found.items()
    ]


def _shape_rows(case: Case) -> list[Difference]:
    """The grids between the stages; `img_size` is all that they follow from."""
    config = tff_config({"img_size": [*case["config"]["dim"], 1]})
    return [
        Difference(
            group="grids", name=name, value=float(list(config.stage_grid(int(name[-1]))) != list(grid)), tolerance=0
        )
        for name, grid in case.about.get("shapes", {}).items()
    ]


def _parameter_row(case: Case, phase: str, model: nn.Module, about: Mapping[str, Any]) -> Difference:
    """The published count includes what is never used."""
    names = tuple(NEVER_USED | POOLER_OF_PHASE_2)
    own = dict(model.named_parameters())
    unused = [name for name in about["keys"] if name.startswith(names) and name not in own]
    sizes = [torch.Size(case["tensors"][name]["shape"]).numel() for name in unused if case["tensors"][name]["formula"]]
    count = sum(parameter.numel() for parameter in own.values()) + sum(sizes)
    return Difference(group="parameters", name=phase, value=abs(count - about["params"]), tolerance=0)
