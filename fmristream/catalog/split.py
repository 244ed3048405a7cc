"""Who trains, who validates, who tests: decided once, at conversion, by subject."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from fmristream.errors import SplitError, UsageError

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
