"""Selected runs cut into numbered clips: what a number means in an epoch, how often it comes, by what the order is keyed."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.split import SplitPart
from fmristream.errors import UsageError
from fmristream.sampling.deal import Order, ShuffledOrder, StoredOrder
from fmristream.sampling.keys import key_of
from fmristream.sampling.views import Partners
from fmristream.sampling.weights import Quotas
from fmristream.sampling.window import ClipTable, EventTable, WholeRuns, Window, WindowTable
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import sha256, sha256_json
from fmristream.stream.cuts import Cut
from fmristream.stream.events import event_starts
from fmristream.stream.selection import quotas_of, words_of

Numbers = NDArray[np.int64]

_TOO_SHORT = "runs no longer than the context"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipPlan:
    """Clips of the selected runs, numbered. Nothing of it depends on the values that they have.

    Attributes:
        cut: what was asked for.
        runs: the selected ones.
        table: their clips.
        partners: of second views; None where samples have one view.
        quotas: how often each clip comes; None where all come once an epoch.
        left_out: what is not streamed, in words, and how many.
        split: the part that the runs are of.
        filters: conditions that chose them.
        content: digest of what the dataset says.
    """

    cut: Cut
    runs: RunTable
    table: ClipTable
    partners: Partners | None
    quotas: Quotas | None
    left_out: Counter[str]
    split: str | SplitPart | None
    filters: tuple[str, ...]
    content: str

    @cached_property
    def digest(self) -> str:
        """Of the selected runs, in order, and of what makes clips of them: what the order is keyed by."""
        window = {"length": self.cut.length, "stride": self.cut.stride}
        selection = {"runs": self.runs.column("digest"), "window": window}
        # Nothing of this where nothing of it was asked for: digests of the first release stay what they were.
        sampling = self._sampling()
        return sha256_json({**selection, "sampling": sampling} if sampling else selection)

    def _sampling(self) -> dict[str, Any]:
        """What decides which samples come, beside runs, length and stride."""
        cut, told = self.cut, dict[str, Any]()
        if cut.step != 1:
            told["step"] = cut.step
        if cut.random_phase:
            told["random_phase"] = True
        if cut.views is not None:
            told["views"] = cut.views
        if self.left_out[_TOO_SHORT]:
            told["longer_than"] = cut.context
        if isinstance(self.table, EventTable):
            told["events"] = sha256(
                self.table.first.astype("<i8").tobytes() + self.table.starts.astype("<i8").tobytes()
            )
        if self.quotas is not None:
            told["weights"] = self.quotas.digest
        if cut.locality is not None:
            told["locality"] = [cut.locality.windows, cut.locality.visits]
        if isinstance(self.split, SplitPart):
            told["split"] = [self.split.split.digest, self.split.part]
        return told

    @cached_property
    def order(self) -> Order:
        """What positions of a stream mean."""
        total = self.table.total
        if self.cut.seed is None:
            return StoredOrder(samples=total)
        return ShuffledOrder(
            samples=total if self.quotas is None else self.quotas.samples,
            seed=self.cut.seed,
            selection_digest=self.digest,
            quotas=self.quotas,
            locality=self.cut.locality,
        )

    @cached_property
    def settings(self) -> dict[str, str]:
        """What was asked for, in words; what was not is not there."""
        cut = self.cut
        asked = {
            "split": None if self.split is None else str(self.split),
            "where": " and ".join(f"({one})" for one in self.filters) or None,
            "step": None if cut.step == 1 else str(cut.step),
            "random_phase": "yes" if cut.random_phase else None,
            "views": cut.views,
            "events": None if cut.events is None else f"{cut.events}, {cut.delay_s:g} s later",
            "weights": None if self.quotas is None or cut.weights is None else words_of(cut.weights, self.quotas),
            "locality": None
            if cut.locality is None
            else f"{cut.locality.windows} windows, {cut.locality.visits} visits",
            "dataset": self.content,
        }
        return {name: words for name, words in asked.items() if words is not None}

    def locate(self, numbers: Numbers, slots: Numbers, epoch: int) -> list[tuple[Numbers, Numbers, Numbers]]:
        """(run positions, first frames, lengths) of each view of some samples of one epoch."""
        phase_key = self._key("phase", epoch) if self.cut.random_phase else None
        runs, starts, lengths = self.table.locate(numbers, phase_key=phase_key)
        first = (runs, starts, lengths)
        if self.partners is None:
            return [first]
        return [first, (*self.partners.draw(runs, starts, slots, key=self._key("view", epoch)), lengths)]

    def _key(self, what: str, epoch: int) -> int:
        return key_of(f"fmristream-{what}-v1", self.digest, self.cut.seed, epoch)


def plan_clips(dataset: Dataset, runs: RunTable, cut: Cut, *, split: str | SplitPart | None) -> ClipPlan:
    """Cut the selected runs into clips.

    Raises:
        UsageError: a column of events or weights is not known, or a context leaves nothing to predict.
    """
    left_out: Counter[str] = Counter()

    def columns() -> JoinedColumns:
        return JoinedColumns(runs, dataset.participant_columns)

    table, partners = _table_of(dataset, runs, cut, left_out, columns)
    _require_future(cut, table)
    quotas = None
    if cut.weights is not None:
        quotas, left_out["runs without a value to balance by"] = quotas_of(cut.weights, columns(), table)
    return ClipPlan(
        cut=cut,
        runs=runs,
        table=table,
        partners=partners,
        quotas=quotas,
        left_out=Counter({what: count for what, count in left_out.items() if count}),
        split=split,
        filters=tuple(dataset.filters),
        content=str(dataset.generation.document["content_digest"]),
    )


def tell_what_is_left_out(plan: ClipPlan, *, where: str) -> None:
    """One warning for whoever called the caller."""
    if plan.left_out:
        told = ", ".join(f"{count} {what}" for what, count in plan.left_out.items())
        warnings.warn(f"{where}: left out of {len(plan.runs)} selected runs: {told}", stacklevel=3)


def _table_of(
    dataset: Dataset, runs: RunTable, cut: Cut, left_out: Counter[str], columns: Callable[[], JoinedColumns]
) -> tuple[ClipTable, Partners | None]:
    """What there is to number: windows, clips at events, or runs; and who the second views are of."""
    frames = runs.numbers("frames").astype(np.int64)
    if cut.window is None:
        whole_runs = WholeRuns(frames, step=cut.step, longer_than=cut.context or 0)
        left_out[_TOO_SHORT] = len(frames) - whole_runs.total
        return whole_runs, None
    if cut.events is not None:
        found = event_starts(dataset, runs, cut.events, window=cut.window, delay_s=cut.delay_s)
        left_out.update(found.left_out)
        return EventTable(found.starts, cut.window), None
    left_out["runs shorter than the window"] = int((frames < cut.window.span).sum())
    if cut.views is None:
        return WindowTable(frames, cut.window), None
    groups = np.arange(len(runs), dtype=np.int64) if cut.views == "same-run" else columns().column("subject").values
    return _with_partners(frames, cut.window, groups, left_out)


def _with_partners(
    frames: Numbers, window: Window, groups: Numbers, left_out: Counter[str]
) -> tuple[WindowTable, Partners]:
    """Windows that have room for a second view beside them."""
    partners = Partners(frames, window, groups)
    table, every = WindowTable(frames, window, is_alone=partners.is_alone), WindowTable(frames, window)
    left_out["windows that leave no room for a second view"] = every.total - table.total
    left_out["runs too short for two views"] = int(((every.counts > 0) & (table.counts == 0)).sum())
    return table, partners


def _require_future(cut: Cut, table: ClipTable) -> None:
    """Raise UsageError where a context leaves nothing of a clip."""
    if cut.context is not None and cut.context >= table.longest:
        what = f"the window's {table.longest}" if cut.window is not None else "the longest run's"
        raise UsageError(f"context={cut.context}: expected fewer frames than {what}, to predict the rest")
