"""A trained network as it was left: its weights, its recipe, the coding of its target, the statistics that it was given.

    RUN, RUN/best, RUN/checkpoints/step-800, s3://bucket/run/checkpoints
             the weights that these mean (train/scored.py): as the run scored them
    IMPORT   weights of somebody else (docs/checkpoints.md), of which no coding is known

Everything is frozen: what a checkpoint says of the data that it was trained on is held against the data it is applied to.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fmristream.errors import UsageError
from fmristream.storage.urls import display_url
from train import build
from train.beyond.facts import parcel_places
from train.config import Recipe, load_recipe, recipe_from
from train.data import Signal, frozen_statistics
from train.evaluate import class_names
from train.extras import NO_EXTRAS, Column, Extras
from train.models.imported import ABOUT, load_imported, read_about
from train.objectives import Objective
from train.scored import Weights, find_weights

if TYPE_CHECKING:
    from fmristream.stream.fitted import Fitted

_IMPORTED_LATER = "the checkpoint does not say what data it was trained on (it is of an earlier release, or an import)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """What a checkpoint holds, put together.

    Attributes:
        source: as it was named.
        name: of the checkpoint, such as `step-800`.
        step: optimiser steps until then; 0 for an import.
        weights_are: which they are, in words.
        recipe: of its run.
        weights: of the network; None for an import, which `network` reads itself.
        objectives: the codings of its targets, in the order of its outputs; none without a target.
        extras: what it is given beside the signal, and the training subjects' means and SDs of that.
        facts: what is known of the training data (`facts.data_facts`); None where nothing is.
        options: of the network that no shape shows.
        folder: of the run, where its statistics and its report are; None for an import.
        notes: what the user is to be told.
        content_digest: of the training data; "" where nobody knows.
    """

    source: str
    name: str
    recipe: Recipe
    step: int = 0
    weights_are: str = "as they were imported"
    weights: Mapping[str, Tensor] | None
    objectives: tuple[Objective, ...]
    extras: Extras = NO_EXTRAS
    facts: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    content_digest: str = ""

    @property
    def signal(self) -> Signal:
        """What its windows are, by what the checkpoint says.

        Raises:
            UsageError: it says nothing.
        """
        facts = self.facts
        if facts is None:
            raise UsageError(f"{self.source}: {_IMPORTED_LATER}; give a run of this release, or use --task")
        if facts["grid"] is not None:
            x, y, z = facts["grid"]
            return Signal(takes="volume", grid=(x, y, z), channels=facts["channels"], frames=facts["frames"])
        centres = facts["centres_mm"]
        return Signal(
            takes="series",
            channels=1,
            frames=facts["frames"],
            parcels=parcel_places(facts),
            centres_mm=None if centres is None else np.array(centres, dtype=np.float32),
        )

    @property
    def statistics(self) -> "tuple[Fitted, ...]":
        """What was fitted to the training runs."""
        return frozen_statistics(self.recipe, self.folder)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the participants table that the network is given."""
        return tuple(column.name for column in self.extras.columns)

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """The words behind the codes of targets and columns, as training had them."""
        return {} if self.facts is None else self.facts["labels"]

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns that it predicts."""
        return tuple(objective.target for objective in self.objectives)

    def class_names(self, objective: Objective) -> tuple[str, ...]:
        """What the classes of a target are called, in the order of the scores; numbers where they have no words."""
        return class_names(objective, self.labels.get(objective.target, ()))

    def network(self, signal: Signal) -> nn.Module:
        """The network with its weights, in evaluation; `signal` is of the data that it is applied to.

        Raises:
            UsageError: it takes other windows.
        """
        if self.weights is None:
            return load_imported(Path(self.source)).eval()
        outputs = sum(objective.outputs for objective in self.objectives) or None
        model = build.make_model(self.recipe, self._as_trained(signal), outputs=outputs, extras=self.extras)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise UsageError(
                f"{self.source}: the weights do not fit the network that these data ask for: {build.shortened(error)}"
            ) from error
        if wrong := build.differing(self.options or {}, build.unseen_options(model)):
            raise UsageError(f"{self.source}: was trained with another {wrong}; its folder was changed, restore it")
        return model.eval()

    def _as_trained(self, signal: Signal) -> Signal:
        """The sizes of training where they are known: the longest of other data may be shorter."""
        return signal if self.facts is None else dataclasses.replace(signal, frames=int(self.facts["frames"]))


def load_trained(source: str, overrides: Sequence[str] = ()) -> Trained:
    """A network as its run scored it, one checkpoint, or an import.

    Args:
        source: a folder, or the URL of checkpoints.
        overrides: `a.b=c` for the recipe of an import, which says little of its data; of a run nothing may be changed.

    Raises:
        UsageError: there is none.
        CorruptDataError: the checkpoint is damaged.
        StorageError: the store cannot be reached.
    """
    if (Path(source) / ABOUT).is_file():
        return _imported(source, overrides)
    if overrides:
        raise UsageError(f"{source}: the recipe of a trained run is frozen; leave --set {overrides[0]} out")
    found = find_weights(source)
    if found is None:
        there = "none of these in it" if "://" in source or Path(source).is_dir() else "no such folder"
        raise UsageError(
            f"{display_url(source)}: expected the folder of a run, of a checkpoint or of an import; there is {there}"
        )
    return _of_run(source, found)


def remap(trained: Sequence[str], now: Sequence[str], *, column: str, where: str) -> np.ndarray:
    """(words of now,) float64: the code that each word had in training; NaN where training did not have it.

    Raises:
        UsageError: one of the two columns is of numbers, the other of words.
    """
    if bool(trained) != bool(now):
        kinds = ("words" if now else "numbers", "words" if trained else "numbers")
        raise UsageError(f"{where}: column {column!r} holds {kinds[0]}, in training it held {kinds[1]}; recode it")
    place = {word: code for code, word in enumerate(trained)}
    return np.array([place.get(word, np.nan) for word in now], dtype=np.float64)


def _of_run(source: str, found: Weights) -> Trained:
    recipe, state = recipe_from(found.state["recipe"]), dict(found.state["objective"])
    extras = _extras(state.pop("extras", None))
    facts = found.state.get("data")
    return Trained(
        source=source,
        name=found.name,
        step=found.step,
        weights_are=found.which,
        recipe=recipe,
        weights=found.tensors,
        objectives=_objectives(state) if recipe.objective.is_supervised else (),
        extras=extras,
        facts=facts,
        options=found.state.get("network", {}),
        folder=found.folder,
        notes=found.notes
        if facts is not None
        else (*found.notes, f"{_IMPORTED_LATER}; whether these data are alike is not looked at"),
        content_digest=found.state.get("dataset", {}).get("content_digest", ""),
    )


def _imported(source: str, overrides: Sequence[str]) -> Trained:
    about = read_about(Path(source))
    recipe = load_recipe(str(Path(source) / "recipe.toml"), overrides)
    coded: tuple[Objective, ...] = ()
    if recipe.objective.is_supervised and not about["backbone_only"]:
        kind: Any = recipe.objective.kind
        coded = (Objective(kind=kind, target=str(recipe.data.target)),)
    note = f"{_IMPORTED_LATER}, nor how its target was coded: scores are the network's own outputs"
    return Trained(source=source, name="import", recipe=recipe, weights=None, objectives=coded, notes=(note,))


def _objectives(state: Mapping[str, Any]) -> tuple[Objective, ...]:
    """The codings of one target or of several, as a checkpoint holds them."""
    return tuple(_objective(one) for one in state.get("objectives", [state]))


def _objective(state: Mapping[str, Any]) -> Objective:
    known = {name: state[name] for name in Objective.__dataclass_fields__ if name in state}
    lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Objective(**(known | lists))


def _extras(state: Mapping[str, Any] | None) -> Extras:
    if state is None:
        return NO_EXTRAS
    columns = tuple(Column(**{**one, "known": tuple(one["known"])}) for one in state["columns"])
    numbers = {name: tuple(state[name]) for name in ("side", "side_mean", "side_sd")}
    return Extras(columns=columns, **numbers)
