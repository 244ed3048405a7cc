"""Which columns of a run's confounds table a strategy takes out, and which frames it leaves out. Names are fMRIPrep's.

Strategies are those of nilearn's `load_confounds`, by shorter names: `motion6`, `motion12`, `motion24`, `wmcsf`, `global`,
`cosine`, `acompcor[N]`, `tcompcor[N]`, `compcor-wm[N]`, `compcor-csf[N]`, `steady`, `scrub`, `aroma`, `aroma-aggressive`,
`fix`; joined with `+`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError

Table = Mapping[str, Any]  # (t,) float64 by name

_MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_EXPANSION = {
    "motion6": ("",),
    "motion12": ("", "_derivative1"),
    "motion24": ("", "_derivative1", "_power2", "_derivative1_power2"),
}
_FIXED = {
    **{name: tuple(axis + suffix for axis in _MOTION for suffix in of) for name, of in _EXPANSION.items()},
    "wmcsf": ("white_matter", "csf"),
    "global": ("global_signal",),
}
# Name -> what its columns begin with; a number behind the name takes the first so many.
_NUMBERED = {
    "cosine": "cosine",
    "acompcor": "a_comp_cor_",
    "tcompcor": "t_comp_cor_",
    "compcor-wm": "w_comp_cor_",
    "compcor-csf": "c_comp_cor_",
    "aroma-aggressive": "aroma_motion_",
}
# Name -> (beginning of the columns of noise, beginnings under which all components may stand): non-aggressive.
_COMPONENTS = {
    "aroma": ("aroma_motion_", ("melodic_", "ica_")),
    "fix": ("fix_noise_", ("ica_", "melodic_")),
}
_FRAMES = ("scrub", "steady")
# Fitted by somebody to the whole run: no statistic of a clip's past.
_OF_WHOLE_RUN = frozenset({"acompcor", "tcompcor", "compcor-wm", "compcor-csf", "aroma-aggressive", *_COMPONENTS})
STRATEGIES = (*_FIXED, *_NUMBERED, *_COMPONENTS, *_FRAMES)

# nilearn's defaults: frames displaced by more than .5 mm or with std DVARS above 1.5, and what is left between them that is
# shorter than 5 frames.
FD_MM = 0.5
STD_DVARS = 1.5
MIN_SEGMENT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """What a recipe's `confounds:` step asks for."""

    names: tuple[str, ...]

    @property
    def sees_whole_run(self) -> bool:
        """Whether some columns were computed from all frames of the run."""
        return any(_split(name)[0] in _OF_WHOLE_RUN for name in self.names)

    @property
    def scrubs(self) -> bool:
        """Whether frames are left out."""
        return any(name in _FRAMES for name in self.names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Confounds:
    """What a strategy finds in a table.

    Attributes:
        removed: (t, k) columns to take out.
        beside: (t, s) columns that are fitted along and stay; None unless non-aggressive.
        is_left_out: (t,) bool, frames that no statistic uses.
    """

    removed: NDArray[np.float64]
    beside: NDArray[np.float64] | None = None
    is_left_out: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))


def parse_strategy(text: str) -> Strategy:
    """The strategies of `motion24+wmcsf+scrub`.

    Raises:
        UsageError: one is not known, or non-aggressive ones are joined with others.
    """
    names = tuple(part.strip() for part in text.split("+"))
    for name in names:
        base, number = _split(name)
        if base not in STRATEGIES or (number is not None and base not in _NUMBERED):
            raise UsageError(
                f"confounds:{text}: no strategy {name!r}; there are {', '.join(STRATEGIES)}, joined with '+', and numbers of "
                "components as in acompcor5"
            )
    if len(names) > 1 and any(name in _COMPONENTS for name in names):
        raise UsageError(f"confounds:{text}: aroma and fix fit all components together; give them a step of their own")
    if len(set(names)) < len(names) or sum(name in _EXPANSION for name in names) > 1:
        raise UsageError(f"confounds:{text}: a strategy comes twice; name each once")
    return Strategy(names=names)


def select(strategy: Strategy, table: Table | None, *, frames: int, where: str) -> Confounds:
    """The columns and frames of a strategy in a run's table.

    Args:
        strategy: which.
        table: of the run; None where it has none.
        frames: of the run.
        where: dataset and run, for errors.

    Raises:
        UsageError: the run has no such columns, or values are missing in them.
    """
    if table is None:
        raise UsageError(
            f"{where}: the recipe takes out confounds, the run has no table of them; convert a source that "
            "has one, or leave the run out"
        )
    (name,) = strategy.names if len(strategy.names) == 1 else ("",)
    if name in _COMPONENTS:
        return _components(name, table, frames=frames, where=where)
    wanted = [column for one in strategy.names for column in _columns_of(one, table, where=where)]
    left_out = np.zeros(frames, dtype=bool)
    for one in strategy.names:
        if one == "scrub":
            left_out |= _scrubbed(table, frames=frames, where=where)
        elif one == "steady":
            left_out |= _marked(table, "non_steady_state", frames=frames)
    return Confounds(removed=_matrix(table, wanted, frames=frames, where=where), is_left_out=left_out)


def _split(name: str) -> tuple[str, int | None]:
    """Name and number of `acompcor5`; motion's numbers belong to its names."""
    if name in STRATEGIES:
        return name, None
    match = re.fullmatch(r"(.*?[a-z])([0-9]+)", name)
    return (match.group(1), int(match.group(2))) if match else (name, None)


def _columns_of(name: str, table: Table, *, where: str) -> Sequence[str]:
    if name in _FRAMES:
        return ()
    if name in _FIXED:
        return [_require(column, table, name, where=where) for column in _FIXED[name]]
    base, number = _split(name)
    found = _numbered(table, _NUMBERED[base])
    if not found or (number is not None and len(found) < number):
        raise UsageError(
            f"{where}: confounds:{name}: the table has {len(found)} columns {_NUMBERED[base]}*, expected "
            f"{number or 'some'}; it has {_shown(table)}"
        )
    return found if number is None else found[:number]


def _components(name: str, table: Table, *, frames: int, where: str) -> Confounds:
    """Noise and the rest of an ICA; noise columns carry the numbers of their components."""
    prefix, all_prefixes = _COMPONENTS[name]
    noise = _numbered(table, prefix)
    every = next((found for found in (_numbered(table, one) for one in all_prefixes) if found), [])
    numbers = {int(column.removeprefix(prefix)) for column in noise}
    rest = [column for column in every if int(re.sub(r"\D", "", column)) not in numbers]
    if not noise or len(every) - len(rest) != len(noise):
        raise UsageError(
            f"{where}: confounds:{name}: non-aggressive regression needs the courses of all components "
            f"({' or '.join(one + 'N' for one in all_prefixes)}) beside those of noise ({prefix}N), the table has {len(every)} "
            f"and {len(noise)}; store the mixing matrix in the table"
            + (", or use aroma-aggressive" if name == "aroma" else "")
        )
    return Confounds(
        removed=_matrix(table, noise, frames=frames, where=where),
        beside=_matrix(table, rest, frames=frames, where=where),
        is_left_out=np.zeros(frames, dtype=bool),
    )


def _numbered(table: Table, prefix: str) -> list[str]:
    """Columns of this beginning and a number, by number."""
    found = [name for name in table if re.fullmatch(re.escape(prefix) + "[0-9]+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


def _require(column: str, table: Table, name: str, *, where: str) -> str:
    if column not in table:
        raise UsageError(f"{where}: confounds:{name}: the table has no column {column!r}; it has {_shown(table)}")
    return column


def _shown(table: Table) -> str:
    names = sorted(table)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _matrix(table: Table, names: Sequence[str], *, frames: int, where: str) -> NDArray[np.float64]:
    """(t, k); a first row that is missing, as of derivatives, is the second one's, as in nilearn."""
    if not names:
        return np.zeros((frames, 0))
    columns = np.stack([np.asarray(table[name], dtype=np.float64) for name in names], axis=1)
    if frames > 1:
        columns[0] = np.where(np.isnan(columns[0]), columns[1], columns[0])
    missing = [name for name, column in zip(names, columns.T, strict=True) if not np.isfinite(column).all()]
    if missing:
        raise UsageError(
            f"{where}: the confound {missing[0]!r} has no value in some frames beyond the first; repair the table, or use "
            "a strategy without it"
        )
    return columns


def _marked(table: Table, beginning: str, *, frames: int) -> NDArray[np.bool_]:
    """Frames that one-hot columns of this beginning mark."""
    marked = np.zeros(frames, dtype=bool)
    for name in table:
        if name.startswith(beginning):
            marked |= np.asarray(table[name], dtype=np.float64) > 0
    return marked


def _scrubbed(table: Table, *, frames: int, where: str) -> NDArray[np.bool_]:
    """Frames that moved, and short stretches between them."""
    for column in ("framewise_displacement", "std_dvars"):
        _require(column, table, "scrub", where=where)
    with np.errstate(invalid="ignore"):  # the first frame has no displacement
        bad = np.asarray(table["framewise_displacement"]) > FD_MM
        bad |= np.asarray(table["std_dvars"]) > STD_DVARS
    if not bad.any():
        return np.asarray(bad)
    edges = np.flatnonzero(np.diff(np.concatenate([[True], bad, [True]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start < MIN_SEGMENT:
            bad[start:stop] = True
    return np.asarray(bad)
