"""Which clips are asked for, as one value: arguments that exclude each other are refused before anything is read."""

from dataclasses import dataclass

from fmristream.errors import UsageError
from fmristream.sampling.order import Locality
from fmristream.sampling.views import VIEWS
from fmristream.sampling.window import Window
from fmristream.stream.selection import Weights, whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """How runs are cut into clips, and in which order and how often these come; see `StreamingDataset`.

    Attributes:
        window: length, stride and step of a window; None for whole runs.
        step: frames from one frame of a clip to the next.
        random_phase: whether windows shift in each epoch.
        views: where second views come from; None for samples of one view.
        events: the condition for clips at events.
        delay_s: from an event to its clip.
        weights: how often windows come.
        locality: which windows stay together.
        seed: of the order; None for stored order.
        context: frames at a clip's beginning from which the rest is predicted.
    """

    window: Window | None
    step: int
    random_phase: bool
    views: str | None
    events: str | None
    delay_s: float
    weights: Weights | None
    locality: Locality | None
    seed: int | None
    context: int | None

    @property
    def length(self) -> int | None:
        """Frames of a clip; None for whole runs."""
        return None if self.window is None else self.window.length

    @property
    def stride(self) -> int:
        """Frames from one window's start to the next; 1 where there are no windows."""
        return 1 if self.window is None else self.window.stride


def cut_of(
    *,
    window: int | None,
    stride: int | None,
    step: int,
    random_phase: bool,
    views: str | None,
    events: str | None,
    delay_s: float,
    weights: Weights | None,
    locality: int | Locality | None,
    seed: int | None,
    context: int | None,
) -> Cut:
    """What the arguments ask for.

    Raises:
        UsageError: they make no sense, or exclude each other.
    """
    if step is None:
        raise UsageError("step=None: expected a whole number; 1 is every frame")
    step = whole("step", step)
    cut = Cut(
        window=_window(whole("window", window), whole("stride", stride), step),
        step=step,
        random_phase=bool(random_phase),
        views=views,
        events=events,
        delay_s=delay_s,
        weights=weights,
        locality=locality if isinstance(locality, Locality | None) else Locality(windows=whole("locality", locality)),
        seed=whole("seed", seed),
        context=whole("context", context),
    )
    _require_sense(cut, has_stride=stride is not None)
    return cut


def _window(length: int | None, stride: int | None, step: int) -> Window | None:
    if length is None:
        Window(length=1, stride=1, step=step)  # refuses a step below 1
        return None
    spanned = Window(length=length, stride=1 if stride is None else stride, step=step)
    return spanned if stride is not None else Window(length=length, stride=spanned.span, step=step)


def _require_sense(cut: Cut, *, has_stride: bool) -> None:
    """Raise UsageError for arguments that exclude each other."""
    if cut.views is not None and cut.views not in VIEWS:
        raise UsageError(f"views={cut.views!r}: expected {' or '.join(map(repr, VIEWS))}")
    if cut.events is None and cut.delay_s != 0:
        raise UsageError(f"delay_s={cut.delay_s}: a delay of events, but no events are asked for")
    if cut.seed is None and (cut.random_phase or cut.weights is not None or cut.locality is not None):
        raise UsageError("random_phase, weights and locality are of a shuffled order; give a seed")
    kind = "whole runs (window=None)" if cut.window is None else "clips at events" if cut.events is not None else ""
    others = {"stride": has_stride, "random_phase": cut.random_phase, "views": cut.views is not None}
    given = [name for name, is_given in others.items() if is_given]
    if kind and given:
        raise UsageError(f"{kind} have no {' and no '.join(given)}; leave {'it' if len(given) == 1 else 'them'} away")
    if cut.window is None and cut.events is not None:
        raise UsageError("events with window=None: clips at events need a length; give window")
