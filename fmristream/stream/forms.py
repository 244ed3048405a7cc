"""The forms in which a loader hands out batches, and which clips can have which: said when the loader is made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmristream.errors import SpaceError, UsageError
from fmristream.stream.selection import whole

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset
    from fmristream.stream.mixture import Mixture

DTYPES = ("float32", "float16", "int16")
OUTPUTS = ("packed", "placed")


def require_form(dtype: str, output: str) -> None:
    """Raise UsageError for a form that there is not."""
    if dtype not in DTYPES or output not in OUTPUTS:
        raise UsageError(
            f"dtype={dtype!r}, output={output!r}: expected one of {', '.join(DTYPES)} and one of {', '.join(OUTPUTS)}"
        )
    if dtype == "int16" and output == "placed":
        raise UsageError("dtype='int16', output='placed': residuals have no background; use output='packed'")


def counts_of(**given: object) -> tuple[int, ...]:
    """The counts as int, which states and JSON take: numpy's become Python's.

    Raises:
        UsageError: one is no whole number, or below 1.
    """
    counts = tuple(0 if count is None else whole(name, count) for name, count in given.items())
    if min(counts) < 1:
        shown = ", ".join(f"{name} {count}" for name, count in given.items())
        raise UsageError(f"{shown}: expected 1 or more each")
    return counts


def require_endless(seed: int | None) -> None:
    """Raise UsageError where a stream has an end."""
    if seed is None:
        raise UsageError("stored order (seed=None) is one pass; give the clips a seed to go on for ever")


def require_room(
    clips: "StreamingDataset | Mixture", members: "Sequence[StreamingDataset]", *, dtype: str, output: str
) -> None:
    """Raise where batches of these clips cannot have the form that is asked for.

    Raises:
        UsageError: residuals of what has none.
        SpaceError: packed rows of several masks.
    """
    if dtype == "int16" and not clips.has_windows:
        raise UsageError("dtype='int16' with window=None: residuals have no background to pad runs with; use float16")
    if output == "packed" and len(members) > 1 and not clips.shares_mask:  # type: ignore[union-attr]
        raise SpaceError(
            "the members of the mixture lie on different masks, so packed batches cannot hold them; use output='placed' "
            "with one grid, or convert all with one --mask"
        )
    for member in members if dtype == "int16" else ():
        _require_residuals(member)


def _require_residuals(clips: "StreamingDataset") -> None:
    """Raise UsageError where windows are no residuals of 16 bits that one scale and offset for each voxel make values of.

    Tables tell; nothing is read.
    """
    single, runs = clips.recipe.single, clips.runs
    wide = [dtype for dtype in runs.counts("dtype") if np.dtype(dtype).kind not in "iu" or np.dtype(dtype).itemsize > 2]
    wraps = np.flatnonzero(np.array(runs.column("residual_wraps"), dtype=bool))
    if wide:
        found = f"{', '.join(wide)} is stored"
    elif len(wraps):
        found = f"the residuals of run {runs[int(wraps[0])].name} do not fit 16 bits"
    elif single is None or single.kind not in ("voxel-z", "none"):
        found = f"normalize={clips.normalize!r} is more than that"
    else:
        return
    raise UsageError(
        f"{clips.dataset.store.name}: dtype='int16' hands out residuals, which takes 8- or 16-bit integers and a recipe that is "
        f"one scale and offset for each voxel ('voxel-zscore' or 'none'), {found}; use dtype='float16' or another recipe"
    )
