"""Put published weights into a model strictly: every name is loaded, or ignored for a stated reason, or the load is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fmristream.errors import FmriStreamError, UsageError

# Beginnings of published names that belong to no parameter of ours, and why.
NEVER_APPLIED = {
    "model.norm.": "made by the published code but never applied",
    "model.head.": "the classifier of older releases, which later ones keep under output_head",
}
HEAD_OF_ANOTHER_TASK = {"output_head.": "the head of the task that the weights were trained on"}
_ROWS_SHOWN = 20


class WeightsError(FmriStreamError):
    """Weights that do not fit the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """One name on which weights and model disagree; a shape is None where there is no such tensor."""

    name: str
    model: tuple[int, ...] | None
    weights: tuple[int, ...] | None

    def __str__(self) -> str:
        kind = "missing" if self.weights is None else "unexpected" if self.model is None else "shape"
        return f"{kind:10} {self.name}  model {_shape_text(self.model)}  weights {_shape_text(self.weights)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a load did: how many tensors it copied, and which names it left out, with the reason."""

    tensors: int
    ignored: Mapping[str, str]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; pickled checkpoints are refused, because reading one runs what it contains."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise UsageError(f"{path}: weights are read from .safetensors only; convert the file's state_dict first")
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file of weights") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def load_model(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load a backbone with its head: `model.*` and `output_head.*`; `source` names the weights in errors."""
    return _load(model, _unwrapped(weights), source=source, ignored=NEVER_APPLIED)


def load_backbone(backbone: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load the backbone alone, from `model.*` or from names without that prefix, whatever head the weights have."""
    weights = _unwrapped(weights)
    if not any(name.startswith("model.") for name in weights):
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    holder = nn.Module()
    holder.model = backbone
    return _load(holder, weights, source=source, ignored=NEVER_APPLIED | HEAD_OF_ANOTHER_TASK)


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], *, source: str, ignored: Mapping[str, str]
) -> Loaded:
    """Load every name, but for those that the module lacks and `ignored` gives a reason for, by how they begin."""
    return _load(module, _unwrapped(weights), source=source, ignored=ignored)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module.` that DDP puts before every name."""
    wrapped = bool(weights) and all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}


def _load(module: nn.Module, weights: Mapping[str, Tensor], *, source: str, ignored: Mapping[str, str]) -> Loaded:
    own = module.state_dict()
    left_out = {name: reason for name in weights if name not in own and (reason := _reason(name, ignored))}
    wanted = {name: tensor for name, tensor in weights.items() if name not in left_out}
    misfits = find_misfits(own, wanted)
    if misfits:
        rows = [str(row) for row in misfits[:_ROWS_SHOWN]]
        more = [f"... and {len(misfits) - _ROWS_SHOWN} more"] if len(misfits) > _ROWS_SHOWN else []
        raise WeightsError(
            f"{source}: {len(misfits)} names do not fit the model, of {len(own)} expected; "
            "build the model with the sizes that the weights were trained with\n" + "\n".join(rows + more)
        )
    module.load_state_dict(wanted, strict=True)
    return Loaded(tensors=len(wanted), ignored=left_out)


def find_misfits(model: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Misfit]:
    """Names that one side lacks, or whose shapes differ, in the model's order and then the weights'."""
    names = [*model, *(name for name in weights if name not in model)]
    rows = [Misfit(name=name, model=_shape(model, name), weights=_shape(weights, name)) for name in names]
    return [row for row in rows if row.model != row.weights]


def _reason(name: str, ignored: Mapping[str, str]) -> str:
    return next((reason for beginning, reason in ignored.items() if name.startswith(beginning)), "")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else str(list(shape))
