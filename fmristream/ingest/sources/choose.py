"""Choose runs by their labels: `--task rest --space MNI152NLin2009cAsym --res 2`, on any source that has them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from fmristream.errors import UsageError
from fmristream.ingest.sources.listing import Listing, Skipped, SourceRun

NONE = "none"  # stands for "has no such label"
_PREFIXES = {"subject": "sub-", "session": "ses-"}
_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityFilter:
    """The labels that are wanted; an empty tuple wants all. `none` wants runs without the label."""

    subject: tuple[str, ...] = ()
    session: tuple[str, ...] = ()
    task: tuple[str, ...] = ()
    acq: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    echo: tuple[str, ...] = ()
    space: tuple[str, ...] = ()
    res: tuple[str, ...] = ()
    den: tuple[str, ...] = ()
    desc: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, wanted in self.items():
            prefix = _PREFIXES.get(name, f"{name}-")
            if any(not label.strip() for label in wanted):
                raise UsageError(f"--{name}: an empty label; give one, or {NONE} for runs that have none")
            object.__setattr__(self, name, tuple(label.strip().removeprefix(prefix) for label in wanted))

    def items(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every label's name with what is wanted of it."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def choose(listing: Listing, wanted: EntityFilter) -> Listing:
    """Only the runs with the wanted labels; the others are left out by choice.

    Raises:
        UsageError: a label that no run has, or no run that has all of them.
    """
    runs, skipped = list(listing.runs), list(listing.skipped)
    for name, labels in wanted.items():
        if not labels:
            continue
        _require_known(listing, name, labels)
        fits = _matcher(name, labels)
        skipped += [
            Skipped(key=run.key, reason=f"{name} {getattr(run, name) or NONE}, not chosen", by_choice=True)
            for run in runs
            if not fits(run)
        ]
        runs = [run for run in runs if fits(run)]
    if not runs:
        asked = " ".join(f"--{name} {label}" for name, labels in wanted.items() for label in labels)
        raise UsageError(f"none of {len(listing.runs)} runs has all of {asked}; leave one out")
    notes = (*listing.notes, *_several_forms(runs))
    ordered = tuple(sorted(skipped, key=lambda file: file.key))
    return replace(listing, runs=tuple(runs), skipped=ordered, notes=notes)


def _matcher(name: str, labels: Sequence[str]) -> Callable[[SourceRun], bool]:
    known = {_canonical(name, label) for label in labels}
    return lambda run: _canonical(name, getattr(run, name) or NONE) in known


def _canonical(name: str, label: str) -> str:
    # BIDS indexes are numbers with any zeros before them: run-1 is run-01. All other labels are text: sub-1 is not sub-01.
    return str(int(label)) if name in ("run", "echo") and label.isdecimal() else label


def _require_known(listing: Listing, name: str, labels: Sequence[str]) -> None:
    there = Counter(getattr(run, name) or NONE for run in listing.runs)
    known = {_canonical(name, label) for label in there}
    unknown = [label for label in labels if _canonical(name, label) not in known]
    if unknown:
        shown = ", ".join(f"{label} ({count})" for label, count in sorted(there.items())[:_SHOWN])
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        raise UsageError(f"--{name} {', '.join(unknown)}: no run has that; there are {shown}{more}")


def _several_forms(runs: Sequence[SourceRun]) -> tuple[str, ...]:
    """Warn of runs that are there twice: the same frames in two resolutions or with two descriptions."""
    forms = defaultdict(set)
    for run in runs:
        same = (run.subject, run.session, run.task, run.acq, run.run, run.echo, run.space)
        forms[same].add((run.res, run.desc, run.den))
    several = [found for found in forms.values() if len(found) > 1]
    if not several:
        return ()
    labels = {
        name: sorted({form[place] or NONE for found in several for form in found})
        for place, name in enumerate(("res", "desc", "den"))
    }
    ways = [f"--{name} {'|'.join(those)}" for name, those in labels.items() if len(those) > 1]
    return (
        f"{len(several)} runs are there in several forms, and each form is converted; choose with {' '.join(ways)}",
    )
