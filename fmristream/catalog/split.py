"""Who trains, who validates, who tests: decided at conversion, or when a dataset is opened; never within a subject."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fmristream.errors import SplitError, UsageError

if TYPE_CHECKING:
    from fmristream.catalog.columns import JoinedColumns

PARTS = ("train", "val", "test")
DEFAULT_RATIOS = (0.70, 0.15, 0.15)


def hash_fraction(group: str, *, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the label alone, so that adding subjects moves nobody."""
    digest = hashlib.sha256(f"fmristream-split-v1|{seed}|{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_by_hash(groups: Iterable[str], *, ratios: Sequence[float] = DEFAULT_RATIOS, seed: int = 0) -> dict[str, str]:
    """Each group's part by threshold on its hash: stable on append, shares only approximate."""
    ratios = checked_ratios(ratios)
    parts = {}
    for group in set(groups):
        fraction = hash_fraction(group, seed=seed)
        parts[group] = PARTS[0] if fraction < ratios[0] else PARTS[1] if fraction < ratios[0] + ratios[1] else PARTS[2]
    return parts


def split_exactly(groups: Iterable[str], *, ratios: Sequence[float] = DEFAULT_RATIOS, seed: int = 0) -> dict[str, str]:
    """Groups ranked by hash and cut at the ratios: exact shares, but adding subjects may move some.

    A part with a ratio above 0 gets at least one group wherever there are enough groups.
    """
    ratios = checked_ratios(ratios)
    ranked = sorted(set(groups), key=lambda group: (hash_fraction(group, seed=seed), group))
    sizes = _shares(len(ranked), ratios)
    parts = {}
    start = 0
    for part, size in zip(PARTS, sizes, strict=True):
        parts.update(dict.fromkeys(ranked[start : start + size], part))
        start += size
    return parts


def split_as_listed(groups: Iterable[str], listed: Mapping[str, str]) -> dict[str, str]:
    """The parts that a given table names; every group must be in it.

    Raises:
        SplitError: a group is missing, or a part has an unknown name.
    """
    wrong = sorted({part for part in listed.values() if part not in PARTS})
    if wrong:
        raise SplitError(f"the split file has the parts {', '.join(wrong)}; expected {', '.join(PARTS)}")
    missing = sorted(set(groups) - set(listed))
    if missing:
        shown = ", ".join(missing[:5])
        raise SplitError(f"the split file does not name {len(missing)} of the subjects ({shown}); add a line for each")
    return {group: listed[group] for group in set(groups)}


def require_no_empty_part(parts: Mapping[str, str], ratios: Sequence[float] = DEFAULT_RATIOS) -> None:
    """Raise SplitError if a part that should hold somebody holds nobody."""
    counts = {part: sum(1 for p in parts.values() if p == part) for part in PARTS}
    empty = [part for part, ratio in zip(PARTS, ratios, strict=True) if ratio > 0 and counts[part] == 0]
    if empty:
        shown = ", ".join(f"{part} {count}" for part, count in counts.items())
        raise SplitError(
            f"the split of {len(parts)} subjects leaves {' and '.join(empty)} empty ({shown}); use --split exact "
            "(from 3 subjects on), --split none, another --split-seed or --split-ratios, or a split file"
        )


def checked_ratios(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Three shares that add up to 1, or UsageError."""
    if len(ratios) != 3 or any(not 0 <= ratio <= 1 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-9:
        raise UsageError(f"split ratios {tuple(ratios)}: expected three shares of train, val and test that add up to 1")
    return (float(ratios[0]), float(ratios[1]), float(ratios[2]))


def _shares(count: int, ratios: tuple[float, float, float]) -> list[int]:
    sizes = [int(count * ratio) for ratio in ratios]
    order = sorted(range(3), key=lambda i: (-(count * ratios[i] - sizes[i]), i))
    for i in range(count - sum(sizes)):
        sizes[order[i % 3]] += 1
    for i in range(3):  # nobody is left without anyone while another part has two to give
        if ratios[i] > 0 and sizes[i] == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Who trains, who validates, who tests, decided when a dataset is opened.

    Attributes:
        by: columns whose values are never divided; subjects and the groups that were stored at conversion never are.
        fractions: shares of train, val and test, of groups.
        seed: of the drawing.
        method: `exact` shares, or `hash`, where subjects that are added later move nobody.
        parts: subject -> part.
        ungrouped: subjects for whom a column says nothing: they are groups of their own.
    """

    by: tuple[str, ...]
    fractions: tuple[float, float, float]
    seed: int
    method: str
    parts: Mapping[str, str] = field(repr=False)  # labels of subjects stand in no log
    ungrouped: int

    @property
    def digest(self) -> str:
        """Of every subject's part; order, rounding and how it came about do not count."""
        text = json.dumps(sorted(self.parts.items()), separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"fmristream-parts-v1" + text.encode()).hexdigest()

    @property
    def train(self) -> "SplitPart":
        """Those to train on."""
        return self["train"]

    @property
    def val(self) -> "SplitPart":
        """Those to choose by."""
        return self["val"]

    @property
    def test(self) -> "SplitPart":
        """Those to report."""
        return self["test"]

    def __getitem__(self, part: str) -> "SplitPart":
        """A part by its name."""
        if part not in PARTS:
            raise UsageError(f"a split has no part {part!r}; it has {', '.join(PARTS)}")
        return SplitPart(split=self, part=part)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPart:
    """One part of a split, to be streamed: `StreamingDataset(..., split=SPLIT.train)`."""

    split: Split
    part: str

    def __str__(self) -> str:
        return f"{self.part} of the split {self.split.digest[:16]} by {' and '.join(self.split.by)}"

    def has(self, subject: str) -> bool:
        """Whether a subject is in this part.

        Raises:
            SplitError: the split was made without it.
        """
        if subject not in self.split.parts:
            raise SplitError(
                "the split does not know some subjects of this dataset; make it with fmristream.split of this very dataset"
            )
        return self.split.parts[subject] == self.part


def split_into_parts(
    columns: "JoinedColumns",
    *,
    by: str | Sequence[str] = "subject",
    fractions: Sequence[float] = DEFAULT_RATIOS,
    seed: int = 0,
    method: str = "exact",
) -> Split:
    """Part the subjects of some runs; see `fmristream.split`."""
    names = (by,) if isinstance(by, str) else tuple(by)
    ratios = checked_ratios(fractions)
    if method not in ("exact", "hash") or not names:
        raise UsageError(f"method={method!r}, by={by!r}: expected 'exact' or 'hash', and a column or more")
    labels, ungrouped = _labels_of_groups(columns, names)
    make = split_exactly if method == "exact" else split_by_hash
    of_group = make(labels.values(), ratios=ratios, seed=seed)
    counts = {part: sum(1 for one in of_group.values() if one == part) for part in PARTS}
    empty = [part for part, ratio in zip(PARTS, ratios, strict=True) if ratio > 0 and not counts[part]]
    if empty:
        raise SplitError(
            f"the split by {' and '.join(names)} has {len(of_group)} groups and leaves {' and '.join(empty)} empty; choose "
            "other fractions (0 for a part that is not needed), another seed, method='exact', or a finer column"
        )
    return Split(
        by=names,
        fractions=ratios,
        seed=seed,
        method=method,
        parts={subject: of_group[label] for subject, label in sorted(labels.items())},
        ungrouped=ungrouped,
    )


def _labels_of_groups(columns: "JoinedColumns", names: Sequence[str]) -> tuple[dict[str, str], int]:
    """(subject -> label of its group, subjects without a value of a column): what is linked in any way is one group."""
    subjects = columns.column("subject").texts()
    group = "runs.group" if "runs.group" in columns.names else "group"
    root: dict[str, str] = {f"subject={subject}": f"subject={subject}" for subject in subjects}
    without: set[str] = set()
    for name in dict.fromkeys([group, *names]):
        column = columns.column(name)
        cells = column.texts() if column.words is not None else column.values
        known = column.is_known
        without |= set(subjects[~known].tolist()) if name in names else set()
        for subject, cell in set(zip(subjects[known].tolist(), cells[known].tolist(), strict=True)):
            value = f"{name}={cell}"
            one, other = sorted((_root(root, f"subject={subject}"), _root(root, root.setdefault(value, value))))
            root[other] = one
    # A group is called by the first of what it is split by, so that others who join it later change nothing.
    prefixes = tuple(f"{name}=" for name in names)
    label: dict[str, str] = {}
    for node in sorted(root, key=lambda node: (not node.startswith(prefixes), node)):
        label.setdefault(_root(root, node), node)
    found = {subject: label[_root(root, f"subject={subject}")] for subject in set(subjects.tolist())}
    return found, len(without)


def _root(root: dict[str, str], node: str) -> str:
    while root[node] != node:
        root[node] = root[root[node]]
        node = root[node]
    return node
