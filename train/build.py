"""From a recipe and what its windows are to a network and its task, and what the network begins with."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal.recipes import expand
from fmristream.signal.steps import Global, Range, Temporal, TwoChannels, Voxelwise
from fmristream.storage import display_url
from train.config import Recipe
from train.data import Signal, signal_of_recipe
from train.extras import NO_EXTRAS, Extras
from train.models import Family, build_model, family_of, function_of
from train.models.brainlm_heads import FineTuned
from train.models.checkpoint_files import trained_options
from train.models.imported import ABOUT, imported_weights, read_about
from train.models.load import Loaded, WeightsError, read_weights
from train.models.series_masking import Masking
from train.models.tff_config import TffConfig
from train.objectives import Objective
from train.perceptual import feature_net
from train.reconstruction import SLICE_SHARES, FeatureNet
from train.scored import Weights, find_weights
from train.sections import StartConfig
from train.targets import blank_objectives, num_outputs
from train.tasks import Contrastive, Hiding, Inputs, JointlySupervised, Masked, Rebuilding, Supervised, Task

# As published for SwiFT.
_TEMPERATURE = 0.1
# A recipe's word for a masked loss -> that of train.masked_objectives.
_MASKED_LOSS = {"mse": "mse", "l1": "mae"}
# Modes that hide the end of a window, which statistics of the run must not know.
_FORECASTS = ("predict_last", "predict_last_pixel", "future")
# Options of [start] -> the beginning of the names of models that have them.
_BEGIN_OPTIONS = {"keep_cls": "tff", "brain": "mae4d"}
# Options that change what weights compute and may leave no trace in a shape: a wrong one loads without complaint.
_UNSEEN = ("patch_size", "num_heads", "num_attention_heads", "decoder_num_attention_heads", "decoder_heads")


def make_model(recipe: Recipe, signal: Signal, *, outputs: int | None, extras: Extras = NO_EXTRAS) -> nn.Module:
    """The network for windows as the data have them; `outputs` of a supervised one, `extras` of one that joins some.

    Raises:
        UsageError: it cannot learn so, takes other windows, or an option does not fit.
    """
    name, kind = recipe.model.name, recipe.objective.kind
    family = _family(recipe)
    if family.takes != signal.takes:
        needs = "'parcels'" if family.takes == "series" else "no parcels or components"
        raise UsageError(
            f"model.name {name!r} takes {family.takes}, got {signal.takes} by data.normalize {recipe.data.normalize!r}; "
            f"give a normalize with {needs}"
        )
    given = signal.sizes | extras.sizes | ({} if outputs is None else {"outputs": outputs})
    options = dict(recipe.model.options)
    if options.get("in_chans", signal.channels) != signal.channels:
        raise UsageError(
            f"model.in_chans {options['in_chans']!r}: data.normalize {recipe.data.normalize!r} gives {signal.channels} channels; "
            "leave it out of the recipe"
        )
    for option in given:
        if option in options and option != "in_chans":  # which recipes of the first releases say
            raise UsageError(f"model.{option} follows from the data and the objective; leave it out of the recipe")
    if name == "swift":
        options.setdefault("head", "emb" if kind == "contrastive" else "v1")
        if (options["head"] == "emb") != (kind == "contrastive"):
            raise UsageError(f"model.head {options['head']!r} is not one for objective.kind {kind!r}; leave it out")
    model = build_model(name, options | given)
    _tell_brain(model, signal)
    _freeze(model, recipe.start.freeze)
    return model


def _family(recipe: Recipe) -> Family:
    name = recipe.model.name
    family = family_of(name)
    for kind in (*recipe.targets.values(),) or (recipe.objective.kind,):
        if kind not in family.learns:
            raise UsageError(
                f"model.name {name!r} learns by {', '.join(family.learns)}, got objective.kind {recipe.objective.kind!r}"
            )
    return family


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError for options of network and objective that do not fit; what only the data can tell is not looked at."""
    signal, objectives = signal_of_recipe(recipe), blank_objectives(recipe)
    if signal is None:
        _family(recipe)
        return
    with torch.device("meta"):
        model = make_model(recipe, signal, outputs=num_outputs(objectives))
    make_task(recipe, model=model, signal=signal, objectives=objectives)


def make_task(
    recipe: Recipe,
    *,
    model: nn.Module,
    signal: Signal,
    objectives: tuple[Objective, ...] = (),
    extras: Extras = NO_EXTRAS,
) -> Task:
    """How the network learns.

    Args:
        recipe: of the run.
        model: the network itself.
        signal: what windows are.
        objectives: of a supervised network, in the order of its outputs.
        extras: that the network joins.

    Raises:
        UsageError: the objective does not fit the network or the data.
    """
    asked = recipe.objective
    inputs = _inputs(recipe, model, signal, extras)
    if asked.kind == "contrastive":
        return Contrastive(
            inputs=inputs, temperature=asked.temperature or _TEMPERATURE, group=max(2, recipe.train.batch_size)
        )
    if asked.kind == "reconstruct":
        return _rebuilding(recipe, inputs, signal, device=next(model.parameters()).device)
    if asked.kind == "masked":
        hiding, about = _hiding(recipe, model, signal)
        return Masked(inputs=inputs, hiding=hiding, loss=_masked_loss(recipe, model), about=about)
    assert objectives, "a supervised network has a target"
    is_joint = asked.reconstruction_weight is not None
    if isinstance(model, FineTuned) and (model.learning == "all") != is_joint:
        raise UsageError(
            f"model.learning {model.learning!r}: 'all' trains the decoder too, by objective.reconstruction_weight (published: "
            "0.5), and the others go without; set both or neither"
        )
    if asked.reconstruction_weight is None:
        return Supervised(objectives=objectives, inputs=inputs)
    if not isinstance(model, FineTuned):
        raise UsageError(
            f"model.name {recipe.model.name!r} completes nothing; leave objective.reconstruction_weight out"
        )
    hiding, _ = _hiding(recipe, model.model, signal)
    return JointlySupervised(
        objectives=objectives,
        inputs=inputs,
        hiding=hiding,
        loss=_masked_loss(recipe, model.model),
        weight=asked.reconstruction_weight,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a run began with: how many tensors, which were left out and why, and the run they are of, where they are of one."""

    tensors: int
    ignored: Mapping[str, str]
    origin: Weights | None


def begin(recipe: Recipe, model: nn.Module) -> Begun | None:
    """Put the weights that the recipe begins with into the network; None where it begins with none.

    Raises:
        UsageError: there is no such run or file.
        WeightsError: they do not fit.
    """
    source = recipe.start.from_
    if not source:
        return None
    name, function = recipe.model.name, function_of(family_of(recipe.model.name).begin)
    options: dict[str, Any] = {}
    for option, family in _BEGIN_OPTIONS.items():
        value = getattr(recipe.start, option)
        if value != getattr(StartConfig(), option):
            if not name.startswith(family):
                raise UsageError(f"start.{option} is of {family}, got model.name {name!r}; leave it out")
            options[option] = value
    weights, trained, origin = _weights_of(source)
    wrong = differing(trained, unseen_options(model))
    if wrong:
        raise WeightsError(
            f"start.from {source!r}: its weights were trained with another {wrong}, which no shape tells and which would "
            "compute something else; set the recipe's model section to what they were trained with"
        )
    loaded: Loaded = function(model, weights, source=source, **options)
    return Begun(tensors=loaded.tensors, ignored=loaded.ignored, origin=origin)


def shortened(error: RuntimeError) -> str:
    """The first two of torch's lines about weights that do not fit, and how many more there are."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:] if line.strip()]
    return "; ".join([*lines[:2], *([f"and {len(lines) - 2} more"] if len(lines) > 2 else [])]) or str(error)


def unseen_options(model: nn.Module) -> dict[str, Any]:
    """Those options of a network that its weights do not show, as JSON has them; a checkpoint keeps them beside the weights."""
    configs = (getattr(holder, "config", None) for holder in (model, getattr(model, "model", None)))
    config = next((found for found in configs if found is not None), None)
    if isinstance(config, TffConfig) and not hasattr(model, "transformer"):
        return {}  # phase 1 has heads in its options alone
    values = {name: getattr(config, name, None) for name in _UNSEEN}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }


def differing(trained: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which options of both are not the same, in words; empty where all are, and for what checkpoints of then do not say."""
    names = [name for name in now if trained.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} ({trained[name]}, the recipe's network has {now[name]})" for name in names)


def _weights_of(source: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Weights | None]:
    """A network's state, its unseen options, and the run it is of: as that was scored (`find_weights`), an import, or a file."""
    path = Path(source)
    if (path / ABOUT).is_file():
        return imported_weights(path), read_about(path)["options"], None
    if path.suffix == ".safetensors" and path.is_file():
        return read_weights(path), trained_options(path), None
    reasons = ""
    try:
        found = find_weights(source)
    except CorruptDataError as error:
        found, reasons = None, f"; {error}"
    if found is not None:
        return found.tensors, found.state.get("network", {}), found
    if (path / "model.safetensors").is_file():
        return read_weights(path / "model.safetensors"), trained_options(path / "model.safetensors"), None
    raise UsageError(
        f"start.from {display_url(source)!r}: expected a run, a checkpoint, or a .safetensors file, here or in a bucket; there "
        f"is {'no whole checkpoint in it' if reasons or path.is_dir() else 'no such folder'}{reasons}"
    )


def _tell_brain(model: Any, signal: Signal) -> None:
    """Say which voxels are stored to a network that leaves the others out."""
    if signal.brain is not None and hasattr(model, "set_brain"):
        model.set_brain(signal.brain)


def _freeze(model: nn.Module, beginnings: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UsageError(f"start.freeze: no parameter's name begins with {beginning!r}; the network has {tops}")
    for name, part in model.named_modules():
        is_moving = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training and part.track_running_stats
        if beginnings and is_moving and f"{name}.".startswith(beginnings):
            raise UsageError(
                f"start.freeze: {name!r} is a batch normalisation, whose running statistics would follow the windows all the "
                "same, and with them what is frozen; set model.freeze_cnn of cnn_rnn, take another norm, or freeze less"
            )
    for name, parameter in model.named_parameters():
        if name.startswith(beginnings):
            parameter.requires_grad_(False)
    if beginnings and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"start.freeze {list(beginnings)} leaves nothing to learn; freeze less")


def _inputs(recipe: Recipe, model: nn.Module, signal: Signal, extras: Extras) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    name = recipe.model.name
    if signal.varies and "lengths" not in parameters:
        raise UsageError(
            f"model.name {name!r} does not know the lengths of runs, and whole runs (data.window = 0) differ in theirs: it "
            "would take padding for signal; give data.window"
        )
    needs_xyz = "xyz" in parameters and parameters["xyz"].default is inspect.Parameter.empty
    if needs_xyz and signal.centres_mm is None:
        raise UsageError(
            f"model.name {name!r} needs to know where parcels lie, and data.normalize {recipe.data.normalize!r} does not end "
            "in parcels of volumes; give one that does"
        )
    return Inputs(
        takes=signal.takes,
        names=frozenset(parameters),
        parcels=None if signal.parcels is None else torch.from_numpy(signal.parcels),
        xyz=None if signal.centres_mm is None else torch.from_numpy(signal.centres_mm),
        extras=extras,
    )


def _rebuilding(recipe: Recipe, inputs: Inputs, signal: Signal, *, device: torch.device) -> Rebuilding:
    if signal.channels != 2:
        raise UsageError(
            f"objective.kind 'reconstruct' compares with the first of two channels (global z, voxel z), got {signal.channels} "
            f"by data.normalize {recipe.data.normalize!r}; use 'tff' or 'tff-hcp'"
        )
    asked = recipe.objective.perceptual
    features: FeatureNet | None = None
    if asked is not None:
        features = feature_net(None if asked == "random" else asked).to(device)
    return Rebuilding(
        inputs=inputs,
        seed=recipe.train.seed,
        features=features,
        share=SLICE_SHARES[recipe.model.name],
        perceptual=asked or "",
    )


def _hiding(recipe: Recipe, model: nn.Module, signal: Signal) -> tuple[Hiding, dict[str, Any]]:
    """What is hidden, and the same in words for checkpoints."""
    asked = recipe.objective
    is_told = "masking" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"mode": asked.masking, "ratio": asked.mask_ratio, "frames": asked.mask_frames}
    given = {name: value for name, value in options.items() if value is not None}
    masking: Any
    if is_told:
        masking = dataclasses.replace(_own_masking(model), **given)
        if masking.ratio == 0 and masking.frames is None:
            raise UsageError("objective.mask_ratio is 0 by the network's own options; nothing would be hidden: set it")
    else:
        masking = model.config.masking  # type: ignore[union-attr]
        if given:
            raise UsageError(
                f"model.name {recipe.model.name!r} says by its own options what is hidden; leave objective.masking and the "
                "other mask options out"
            )
    _require_unseen_future(recipe, _shown_frames(masking, model, signal.frames))
    size = _noise_size(model, signal.takes)
    return Hiding(seed=recipe.train.seed, masking=masking if is_told else None, size=size), {
        "hidden": dataclasses.asdict(masking)
    }


def _own_masking(model: Any) -> Masking:
    masking: Masking = model.masking
    return masking


def _noise_size(model: Any, takes: str) -> Callable[[torch.Size], int]:
    if takes == "series":
        return lambda shape: int(model.noise_size(shape[1], shape[2]))
    return lambda shape: int(model.noise_size(shape[-1]))


def _shown_frames(masking: Any, model: Any, frames: int) -> int | None:
    """How many frames at a window's beginning are shown where its end is predicted; None for other modes."""
    if masking.mode not in _FORECASTS:
        return None
    if isinstance(masking, Masking):
        return frames - masking.masked_frames(frames)
    times: int = model.config.times
    hidden: int = masking.hidden_tokens(places=1, times=times)
    return frames // times * (times - hidden)


def _require_unseen_future(recipe: Recipe, shown: int | None) -> None:
    """Raise UsageError where frames that are to be predicted have gone into the statistics of what is shown."""
    if shown is None:
        return
    data = recipe.data
    if data.stats == "run":
        own = (Voxelwise, Temporal, Range, Global, TwoChannels)
        if any(isinstance(step, own) for step in expand(data.normalize)):
            raise UsageError(
                f"data.normalize {data.normalize!r} takes statistics of whole runs, which know the frames to predict; set "
                f"data.stats = 'context' (or 'prefix') and data.context = {shown}, the frames that are shown"
            )
    elif data.context is not None and data.context > shown:
        raise UsageError(
            f"data.context {data.context} reaches into the frames to predict: {shown} of a window are shown; "
            f"set data.context = {shown}"
        )


def _masked_loss(recipe: Recipe, model: Any) -> str:
    asked = recipe.objective.loss if recipe.objective.kind == "masked" else None
    own: str = getattr(model.config, "loss_fn", "mse")
    return own if asked is None else _MASKED_LOSS[asked]


def make_inputs(recipe: Recipe, model: nn.Module, signal: Signal, extras: Extras = NO_EXTRAS) -> Inputs:
    """How a batch becomes what a network is called with, whatever it learns."""
    return _inputs(recipe, model, signal, extras)
