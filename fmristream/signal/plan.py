"""What a recipe says, as a value, and what becomes of the places of a frame's values under it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import Atlas, Weights, centres_mm, weights_on
from fmristream.signal.prepared import Layout, RecipeSource
from fmristream.signal.reduce import cropped, parcelled, pooled
from fmristream.signal.steps import Cohort, Crop, ParcelMeans, Pool, Step


class Op(Protocol):
    """A step made ready: (..., t, v) float64 in, the same or fewer values out; may work in place."""

    def __call__(self, values: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]: ...

    def fill(self, fill: NDArray[np.float64]) -> NDArray[np.float64]:
        """What becomes of what stands outside the mask, (c,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What a recipe says; see `recipes.Recipe`."""

    steps: tuple[Step, ...]
    stats: str
    context: int | None
    fitted: tuple[Mapping[str, NDArray[np.float64]], ...]
    atlases: Mapping[str, Atlas]


def layout_of(plan: Plan, source: RecipeSource) -> Layout:
    """What the values of a frame are after all steps."""
    layout = source.layout
    for step in plan.steps:
        if isinstance(step, (Pool, Crop, ParcelMeans)):
            _, layout = reduction(step, layout, plan, source)
        elif isinstance(step, Cohort) and step.kind == "pca":
            layout = Layout(voxels=step.components)
    return layout


def parcel_centres_mm(plan: Plan, source: RecipeSource) -> NDArray[np.float64] | None:
    """(p, 3) of the parcels that the values are after all steps, NaN where one has no voxel; None where they are others."""
    layout, found = source.layout, None
    for step in plan.steps:
        if isinstance(step, ParcelMeans) and layout.mask is not None and layout.affine is not None:
            found = centres_mm(_weights(step, layout, plan, source), layout.mask, layout.affine)
        elif isinstance(step, Cohort) and step.kind == "pca":
            found = None
        if isinstance(step, (Pool, Crop, ParcelMeans)):
            _, layout = reduction(step, layout, plan, source)
    return found


def reduction(step: Step, layout: Layout, plan: Plan, source: RecipeSource) -> tuple[Op, Layout]:
    """The operation of a step that gives fewer values, and where these lie."""
    match step:
        case Pool():
            return pooled(layout, step)
        case Crop():
            return cropped(layout, step)
        case ParcelMeans():
            return parcelled(layout, _weights(step, layout, plan, source), what=source.where)
    raise AssertionError(f"{step.text} is no reduction")


def _weights(step: ParcelMeans, layout: Layout, plan: Plan, source: RecipeSource) -> Weights:
    if step.atlas in plan.atlases:
        if layout.mask is None or layout.affine is None:
            raise UsageError(f"{source.where}: {step.text} needs volumes, here are values without a grid")
        grid = Grid(shape=layout.mask.shape, affine=tuple(layout.affine.reshape(-1)))
        return weights_on(plan.atlases[step.atlas], grid, layout.mask)
    if layout is not source.layout:
        raise UsageError(
            f"{source.where}: {step.text} after pool, crop or parcels: the stored weights are for the stored voxels; put it "
            "first, or pass the atlas itself as atlases={name: atlas}"
        )
    return source.parcels(step.atlas).weights
