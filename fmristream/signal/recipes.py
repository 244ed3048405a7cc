"""Recipes of normalisation: steps joined by ` | `, made ready for one run at a time, computed from the one raw store.

    detrend | confounds:motion24 | voxel-zscore | clip:5

Names of single steps: `fmristream.signal.steps`. What a run's statistics may see is part of a recipe: all of the run, or
for whoever predicts the future only what lies before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import UsageError
from fmristream.signal.composed import ClipPrepared, RunPrepared, scrubs
from fmristream.signal.normalize import RECIPES, Normalization, fill_of
from fmristream.signal.normalize import prepare as prepare_single
from fmristream.signal.parcellate import Atlas
from fmristream.signal.plan import Plan, layout_of, parcel_centres_mm
from fmristream.signal.prepared import Layout, Prepared, RecipeSource
from fmristream.signal.steps import (
    ALIASES,
    REDUCTIONS,
    Clip,
    Cohort,
    Divide,
    Framewise,
    Global,
    Range,
    Scaled,
    Skip,
    Step,
    Temporal,
    TwoChannels,
    Voxelwise,
    parse_step,
)

STATS = ("run", "prefix", "context")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedValues:
    """Statistics of a cohort, as a recipe uses them.

    Attributes:
        kind: `moments`, `robust`, `range`, `voxel-range`, `frame-range` or `pca`.
        recipe: the steps whose output they are of (`Recipe.text`).
        arrays: float64 by name.
        inputs: digests of atlases and statistics that these steps were given, which their text only names; "" where they
            were given none, and where nobody noted it.
    """

    kind: str
    recipe: str
    arrays: Mapping[str, NDArray[np.float64]]
    inputs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """Steps, and what their statistics may see.

    Attributes:
        steps: in order.
        stats: `run` (all frames), `prefix` (frames before the end of the clip's context), `context` (the context's).
        context: frames at a clip's beginning that are known; None for `run`.
        fitted: statistics of cohorts, one for each step that needs some, in order.
        atlases: by the name that `parcels:NAME` has.
    """

    steps: tuple[Step, ...]
    stats: str = "run"
    context: int | None = None
    fitted: tuple[FittedValues, ...] = ()
    atlases: Mapping[str, Atlas] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The recipe as it is written, published names resolved."""
        some = [step.text for step in self.steps if not isinstance(step, Scaled)]
        return " | ".join(some) or "none"

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return 2 if any(isinstance(step, TwoChannels) for step in self.steps) else 1

    @property
    def reduces(self) -> bool:
        """Whether the output has other voxels than what is stored."""
        return any(isinstance(step, REDUCTIONS) or _is_pca(step) for step in self.steps)

    @property
    def scrubs(self) -> bool:
        """Whether frames of a run may be left out of its statistics by what its confounds tell of them."""
        return scrubs(self.steps)

    @property
    def single(self) -> Normalization | None:
        """The one normalisation that this is, where statistics stored with the run are all it takes."""
        return RECIPES.get(self.text) if self.stats == "run" else None

    def layout(self, source: RecipeSource) -> Layout:
        """What the values of a frame are, for runs of the source's space."""
        return layout_of(self._plan, source)

    def parcel_centres_mm(self, source: RecipeSource) -> NDArray[np.float64] | None:
        """(p, 3) where the parcels of the output lie, for runs of the source's space; None where it has none."""
        return parcel_centres_mm(self._plan, source)

    def width(self, source: RecipeSource) -> int:
        """Values of a frame, for runs of the source's space."""
        return self.layout(source).voxels if self.reduces else source.run.voxels

    def fill(self, run: Run) -> NDArray[np.float32] | None:
        """(c,) what stands outside the mask where the run's row alone tells it; None where the run must be read."""
        single = self.single
        if single is not None:
            return np.array([fill_of(single, run)], dtype=np.float32)
        first = self.steps[0]
        if isinstance(first, (Global, TwoChannels)):
            return None
        later = [isinstance(step, (Global, TwoChannels, Divide)) for step in self.steps]
        if any(later) or any(isinstance(step, Clip) and not step.low <= 0 <= step.high for step in self.steps):
            return None
        return np.zeros(self.channels, dtype=np.float32)

    @property
    def _plan(self) -> Plan:
        return Plan(
            steps=self.steps,
            stats=self.stats,
            context=self.context,
            fitted=tuple(one.arrays for one in self.fitted),
            atlases=self.atlases,
        )


def parse_recipe(
    text: str,
    *,
    stats: str = "run",
    context: int | None = None,
    fitted: Sequence[FittedValues] = (),
    atlases: Mapping[str, Atlas] | None = None,
) -> Recipe:
    """The recipe that is written so.

    Args:
        text: steps joined by `|`, or a published name.
        stats: see `Recipe`.
        context: see `Recipe`.
        fitted: what steps named `cohort-...` and `pca` may use.
        atlases: see `Recipe`.

    Raises:
        UsageError: a step is not known, the steps do not fit together, or a statistic would see the future.
    """
    if not isinstance(text, str):
        raise UsageError(
            f"normalize={text!r}: expected a recipe as text, such as 'voxel-zscore'; 'none' leaves values alone"
        )
    if stats not in STATS:
        raise UsageError(f"stats={stats!r}: expected one of {', '.join(STATS)}")
    if (context is None) != (stats == "run") or (context is not None and context < 1):
        raise UsageError(
            f"stats={stats!r} with context={context}: expected the number of frames at a clip's beginning that are known for "
            "'prefix' and 'context', and none for 'run'"
        )
    steps = tuple(expand(text))
    if stats != "run":
        _refuse_future(steps, stats)
        if not any(isinstance(step, (Voxelwise, Temporal, Range, Global)) for step in steps):
            stats, context = "run", None  # nothing is taken of the run: each frame is done by itself
    _require_order(steps, text)
    recipe = Recipe(steps=steps, stats=stats, context=context, atlases=dict(atlases or {}))
    found = [_fitted_for(recipe, place, fitted) for place, step in enumerate(steps) if isinstance(step, Cohort)]
    return Recipe(steps=steps, stats=stats, context=context, fitted=tuple(found), atlases=recipe.atlases)


def prepare(recipe: Recipe, source: RecipeSource, *, exact: bool = False) -> Prepared:
    """The recipe made ready for a run; its first use reads the run once for each whole-run statistic that is not stored.

    Args:
        recipe: the recipe.
        source: the run.
        exact: voxel-wise z by float32 moments also where float16 ones are stored.

    Raises:
        CorruptDataError: the run cannot be normalised.
        UsageError: the run lacks what the recipe needs.
    """
    if recipe.single is not None:
        return prepare_single(recipe.single, source, exact=exact)
    if recipe.stats == "run":
        return RunPrepared(recipe._plan, source, exact=exact, channels=recipe.channels)
    return ClipPrepared(recipe._plan, source)


def expand(text: str) -> list[Step]:
    """Its steps, published names resolved.

    Raises:
        UsageError: one is not known.
    """
    steps: list[Step] = []
    for part in text.split("|"):
        name = part.strip()
        if not name:
            raise UsageError(f"normalize={text!r}: a step is empty; join steps with one '|' each")
        steps += expand(ALIASES[name]) if name in ALIASES else [parse_step(name)]
    return steps


def _refuse_future(steps: Sequence[Step], stats: str) -> None:
    """Raise UsageError where a step knows the whole run by its nature."""
    for step in steps:
        reason = ""
        if isinstance(step, TwoChannels) or (isinstance(step, Global) and step.normalization.background == "min"):
            reason = "its background is a statistic of the run; use the -zeroback variant"
        elif isinstance(step, Temporal) and step.strategy is not None and step.strategy.sees_whole_run:
            reason = "its components were computed from the whole run; use motion, wmcsf or global signals"
        elif isinstance(step, Temporal) and step.strategy is not None and step.strategy.scrubs:
            reason = "frames are marked by their neighbours on both sides"
        elif isinstance(step, Temporal) and step.kind == "bandpass":
            reason = "its filter runs over the whole run; use highpass"
        if reason:
            raise UsageError(f"{step.text} with stats={stats!r}: {reason}")


def _require_order(steps: Sequence[Step], text: str) -> None:
    """Raise UsageError where a step cannot take what the one before it gives."""
    is_split = False
    for place, step in enumerate(steps):
        if isinstance(step, Skip) and any(not isinstance(one, (Skip, *REDUCTIONS)) for one in steps[:place]):
            raise UsageError(f"normalize={text!r}: {step.text} comes before every statistic; move it to the front")
        if is_split and not isinstance(step, (Clip, Divide, Framewise)):
            raise UsageError(f"normalize={text!r}: {step.text} takes one channel, tff gives two; move it before tff")
        is_split = is_split or isinstance(step, TwoChannels)
    if not any(not isinstance(step, Skip) for step in steps):
        raise UsageError(f"normalize={text!r}: no step makes anything of the signal; add one, or 'none'")


def _fitted_for(recipe: Recipe, place: int, fitted: Sequence[FittedValues]) -> FittedValues:
    """The statistics of what comes before a step.

    Raises:
        UsageError: there are none of this kind and of these steps.
    """
    step: Any = recipe.steps[place]
    key = Recipe(steps=recipe.steps[:place]).text
    for one in fitted:
        if one.kind == step.kind and one.recipe == key:
            if step.kind == "pca" and len(one.arrays["components"]) < step.components:
                raise UsageError(
                    f"{step.text}: {len(one.arrays['components'])} components were fitted; fit {step.components} or more"
                )
            return one
    given = "; ".join(f"{one.kind} of {one.recipe!r}" for one in fitted) or "none"
    raise UsageError(
        f"{step.text}: needs statistics of kind {step.kind!r} fitted to the training runs after {key!r}, given were: {given}; "
        f"make them with fmristream.fit(clips, ...) over normalize={key!r} and pass fitted=[...]"
    )


def _is_pca(step: Step) -> bool:
    return isinstance(step, Cohort) and step.kind == "pca"
