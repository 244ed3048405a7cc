"""What the values of a window are made with, in words, for the state of a stream: who goes on goes on with the same."""

import numpy as np

from fmristream.errors import ResumeError
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.fitted import encode_object
from fmristream.signal.grid import Shape3
from fmristream.signal.parcellate import Atlas
from fmristream.signal.recipes import FittedValues, Recipe
from fmristream.signal.steps import Cohort, ParcelMeans
from fmristream.stream.run_source import RunSource

# Of a sha256: enough to tell two sets of statistics apart, short enough to be read in an error.
_DIGITS = 16


def words_of_values(
    recipe: Recipe, source: RunSource, *, exact: bool, grid: Shape3 | None, orientation: str
) -> dict[str, str]:
    """What decides the values of every window, beside the runs themselves; what was not asked for is not there.

    In which form a loader hands them out (dtype, packed or placed) is not part of it.

    Args:
        recipe: of normalisation.
        source: the first of the runs, which tells what its stored parcels are.
        exact: whether float32 moments are used where float16 ones are stored.
        grid: that windows are placed in; None where there is none.
        orientation: where its axes run to; "" where nobody knows.
    """
    told = {
        "normalize": recipe.text,
        "stats": None if recipe.stats == "run" else f"{recipe.stats} of {recipe.context} frames",
        "fitted": ", ".join(_fitted_digest(one) for one in recipe.fitted),
        "atlases": ", ".join(_atlas_digest(s, recipe, source) for s in recipe.steps if isinstance(s, ParcelMeans)),
        "exact": "yes" if exact else None,
        "grid": None if grid is None else " x ".join(map(str, grid)),
        "orientation": orientation,
    }
    return {name: words for name, words in told.items() if words}


def inputs_of(recipe: Recipe) -> str:
    """Digests of what is given to the steps of a recipe beside their text: atlases that are passed, fitted statistics."""
    passed = (s.atlas for s in recipe.steps if isinstance(s, ParcelMeans) and s.atlas in recipe.atlases)
    atlases = [_digest_of(recipe.atlases[name])[:_DIGITS] for name in passed]
    return ", ".join([*atlases, *(_fitted_digest(one) for one in recipe.fitted)])


def require_same_inputs(recipe: Recipe, *, where: str) -> None:
    """Raise ResumeError where fitted statistics are of what other atlases or other statistics gave under the same names."""
    places = [place for place, step in enumerate(recipe.steps) if isinstance(step, Cohort)]
    for number, (place, one) in enumerate(zip(places, recipe.fitted, strict=True)):
        before = Recipe(steps=recipe.steps[:place], fitted=recipe.fitted[:number], atlases=recipe.atlases)
        if one.inputs and one.inputs != (here := inputs_of(before)):
            raise ResumeError(
                f"{where}: the statistics of {recipe.steps[place].text} were fitted to {one.recipe!r} with atlases or statistics "
                f"{one.inputs}, here are {here}; pass the same ones, or fit them again"
            )


def _fitted_digest(fitted: FittedValues) -> str:
    """Of the numbers: the same ones under another name are the same."""
    return sha256(encode_object({"kind": fitted.kind, "recipe": fitted.recipe}, fitted.arrays))[:_DIGITS]


def _atlas_digest(step: ParcelMeans, recipe: Recipe, source: RunSource) -> str:
    if step.atlas in recipe.atlases:
        return _digest_of(recipe.atlases[step.atlas])[:_DIGITS]
    return source.parcel_digest(step.atlas)[:_DIGITS]


def _digest_of(atlas: Atlas) -> str:
    arrays = {"labels": "<i8", "indptr": "<i8", "positions": "<i8", "weights": "<f4"}
    parts = {
        name: sha256(np.ascontiguousarray(getattr(atlas, name), dtype=dtype).tobytes())
        for name, dtype in arrays.items()
    }
    grid = {"shape": list(atlas.grid.shape), "affine": [float(value) for value in atlas.grid.affine]}
    return sha256_json({"kind": atlas.kind, "grid": grid, **parts})
