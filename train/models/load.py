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
# What DataParallel and DDP, and torch.compile, put before every name.
WRAPPERS = ("module.", "_orig_mod.")
_ROWS_SHOWN = 20


class WeightsError(FmriStreamError):
    """Weights that do not fit the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """One name on which weights and model disagree; a shape is None where there is no such tensor."""

    name: str
    model: tuple[int, ...] | None
    weights: tuple[int, ...] | None

    @property
    def kind(self) -> str:
        """What is wrong, in a word."""
        return "missing" if self.weights is None else "unexpected" if self.model is None else "shape"

    def __str__(self) -> str:
        return f"{self.kind:10} {self.name}  model {shape_text(self.model)}  weights {shape_text(self.weights)}"


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
        raise UsageError(
            f"{path}: weights are read from .safetensors only; bring other files in by tools/import_checkpoint.py"
        )
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file of weights") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def load_model(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load a backbone with its head: `model.*` and `output_head.*`; `source` names the weights in errors."""
    return _load(model, unwrapped(weights)[0], source=source, ignored=NEVER_APPLIED)


def load_backbone(backbone: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Load the backbone alone, from `model.*` or from names without that prefix, whatever head the weights have."""
    holder = nn.Module()
    holder.model = backbone
    weights = under_model(unwrapped(weights)[0])
    return _load(holder, weights, source=source, ignored=NEVER_APPLIED | HEAD_OF_ANOTHER_TASK)


def load_named(module: nn.Module, weights: Mapping[str, Tensor], *, source: str, ignored: Mapping[str, str]) -> Loaded:
    """Load any module by the names it has itself; `ignored` maps beginnings of names that it lacks to the reason."""
    return _load(module, unwrapped(weights)[0], source=source, ignored=ignored)


def under_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a backbone as they are where it has a head beside it: with `model.` before them."""
    if any(name.startswith("model.") for name in weights):
        return dict(weights)
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def unwrapped(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names without what wrappers put before every one of them, and what that was."""
    beginning = ""
    while weights:
        found = next((word for word in WRAPPERS if all(name.startswith(beginning + word) for name in weights)), "")
        if not found:
            break
        beginning += found
    return {name.removeprefix(beginning): tensor for name, tensor in weights.items()}, beginning


def leave_out(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, ignored: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that a model with the tensors `own` must take, and the names it leaves out, with the reason.

    `ignored` maps beginnings of names to reasons; a name that the model has itself is never left out.
    """
    left_out = {name: reason for name in weights if name not in own and (reason := _reason(name, ignored))}
    return {name: tensor for name, tensor in weights.items() if name not in left_out}, left_out


def _load(module: nn.Module, weights: Mapping[str, Tensor], *, source: str, ignored: Mapping[str, str]) -> Loaded:
    own = module.state_dict()
    wanted, left_out = leave_out(own, weights, ignored=ignored)
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


def printable(text: str) -> str:
    """The text of a file of others as a terminal may show it: without line breaks and what moves a cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape in a table, such as [4, 2]."""
    return "-" if shape is None else str(list(shape))
