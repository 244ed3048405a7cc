"""Packed values onto a grid where the model is: dequantised, turned, padded and scattered by one index map, in torch.

The CPU has a kernel of its own for the scatter; every device gives the same bits where it has the dtype.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fmristream.errors import FmriStreamError
from fmristream.signal import kernels
from fmristream.signal.grid import Shape3
from fmristream.stream.forms import require_endless

if TYPE_CHECKING:
    from fmristream.storage.fetch import Counts
    from fmristream.stream.augment import Compose
    from fmristream.stream.batch import Batch
    from fmristream.stream.loader import StreamingLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What int16 values mean: value = packed x scale[row] + offset[row].

    Attributes:
        scale: (n, v) float32.
        offset: (n, v) float32.
        row: (b,) int64, which of the n rows each sample takes.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    row: torch.Tensor

    def values(self, packed: torch.Tensor) -> torch.Tensor:
        """(b, c, t, v) integers as float32; one multiplication and one addition, each rounded, on every device."""
        row = self.row.to(packed.device)
        scale = self.scale[row][:, None, None]
        # One pass on a GPU; on a CPU, torch multiplies mixed types at half the speed of two passes. The numbers are the same.
        values = packed.float().mul_(scale) if packed.device.type == "cpu" else packed * scale
        return values.add_(self.offset[row][:, None, None])


@dataclass(frozen=True, slots=True)
class Scatter:
    """One space's index map on one device.

    Attributes:
        source: (k,) int64, the packed voxels that lie in the grid; None where all do.
        target: (k,) int64, where they lie in it.
    """

    source: torch.Tensor | None
    target: torch.Tensor


# Index maps live as long as the positions they were made of, on every device that asked for them.
_maps: MutableMapping[torch.Tensor, dict[torch.device, list[Scatter]]] = WeakTensorKeyDictionary()
_maps_lock = Lock()


def place(
    packed: torch.Tensor,
    positions: torch.Tensor,
    grid: Shape3,
    fill: torch.Tensor,
    *,
    row: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scatter (b, c, t, v) onto (b, c, t, x, y, z), each sample and channel filled with its own background.

    Args:
        packed: floats on any device.
        positions: (v,), or (m, v) where samples lie in different spaces, int64 on the host; negative: not in the grid.
        grid: (x, y, z).
        fill: (b, c) on the device of `packed`.
        row: (b,) int64 on the host, which positions each sample has; None: the first.
        dtype: of the result; that of `packed` where not given.
    """
    size = grid[0] * grid[1] * grid[2]
    placed = torch.empty((*packed.shape[:3], size), dtype=dtype or packed.dtype, device=packed.device)
    placed.copy_(fill[:, :, None, None].expand(placed.shape))
    packed = packed.to(placed.dtype)
    spaces = positions[None] if positions.ndim == 1 else positions
    groups = (
        [(slice(None), 0)] if row is None else [(slice(i, i + 1), int(space)) for i, space in enumerate(row.tolist())]
    )
    for samples, space in groups:
        if packed.device.type == "cpu" and packed.element_size() in _BITS:
            _scatter_on_host(packed[samples], spaces[space], placed[samples])
        else:
            scatter_by_torch(packed[samples], _maps_on(positions, packed.device)[space], placed[samples])
    return placed.view(*packed.shape[:3], *grid)


# The kernel moves bits: numba has no float16.
_BITS = {2: torch.int16, 4: torch.int32}


def _scatter_on_host(packed: torch.Tensor, positions: torch.Tensor, placed: torch.Tensor) -> None:
    bits = _BITS[packed.element_size()]
    target, source, where = placed.view(bits).numpy(), packed.detach().view(bits).numpy(), positions.numpy()
    for sample in range(len(packed)):  # ten times torch's index_copy_, which does not run along the last axis
        for channel in range(packed.shape[1]):
            kernels.place(source[sample, channel], where, target[sample, channel])


def scatter_by_torch(packed: torch.Tensor, where: Scatter, placed: torch.Tensor) -> None:
    """Write (b, c, t, v) into (b, c, t, size) on any device, without waiting for it."""
    values = packed if where.source is None else packed.index_select(-1, where.source)
    placed.index_copy_(-1, where.target, values)


def scatter_of(positions: torch.Tensor, device: torch.device | str) -> Scatter:
    """The index map of (v,) positions; which voxels are inside is found on the host, so that no device is waited for."""
    source = torch.nonzero(positions >= 0).flatten()
    target = positions[source]
    is_whole = len(source) == len(positions)
    return Scatter(None if is_whole else source.to(device), target.to(device))


def _maps_on(positions: torch.Tensor, device: torch.device) -> list[Scatter]:
    with _maps_lock:
        known = _maps.setdefault(positions, {})
        if device not in known:
            known[device] = [scatter_of(one, device) for one in (positions[None] if positions.ndim == 1 else positions)]
        return known[device]


class DeviceLoader:
    """A loader's batches on a device, prepared beside the model's work: copied, placed and augmented one batch ahead.

    On CUDA that happens on a stream of its own; elsewhere it is the same without one. Resume from this object's state: the
    loader below has always read further.

    Args:
        loader: where batches come from; it is closed with this.
        device: where they go.
        augment: what happens to them there.
        dtype: of the placed signal; see `Batch.to`.
        ahead: how many batches may wait on the device.
    """

    def __init__(
        self,
        loader: "StreamingLoader",
        device: torch.device | str,
        *,
        augment: "Compose | None" = None,
        dtype: torch.dtype | None = None,
        ahead: int = 1,
    ) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self._augment, self._dtype, self._ahead = augment, dtype, ahead
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._state = self._left = loader.state_dict()  # of the batch in hand; of the loader, as this object left it

    @property
    def epoch(self) -> int:
        """Epoch of the batch that is handed out next, however far the loader has read."""
        return self.loader.epoch_at(self._next_position())

    def __len__(self) -> int:
        """Batches that start in this epoch; epochs may differ by one."""
        return self.loader.batches_at(self._next_position())

    def __iter__(self) -> Iterator["Batch"]:
        """The rest of this epoch's batches; what was prepared and never handed out comes again."""
        self._rewind()
        waiting: deque[tuple[Batch, Any, dict[str, Any]]] = deque()
        source, failure = iter(self.loader), None
        is_open = True
        while is_open or waiting:
            while is_open and len(waiting) <= self._ahead:
                try:
                    batch = next(source)
                except StopIteration:
                    is_open = False
                except FmriStreamError as error:  # due when the batches before it are through
                    failure, is_open = error, False
                else:
                    self._left = self.loader.state_dict()
                    waiting.append((*self._moved(batch), self._left))
            if waiting:
                moved, ready, self._state = waiting.popleft()
                self._take_over(moved, ready)
                yield moved
        if failure is not None:
            raise failure
        self._state = self._left = self.loader.state_dict()

    def forever(self) -> Iterator["Batch"]:
        """Batches of this epoch and all that follow, without end.

        Raises:
            UsageError: stored order is one pass.
        """
        require_endless(self.loader.clips.seed)
        while True:
            yield from self

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch that starts in an epoch; nothing happens in that epoch itself, as `StreamingLoader` has it.

        Raises:
            UsageError: it is negative, or epochs are shorter than a batch.
        """
        if epoch != self.epoch:
            self._rewind()
            self.loader.set_epoch(epoch)
            self._state = self._left = self.loader.state_dict()

    @property
    def counts(self) -> "Counts | None":
        """Requests and bytes so far; None where files are read in place."""
        return self.loader.counts

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, by this or by the loader itself."""
        self.loader.load_state_dict(state)
        self._state = self._left = self.loader.state_dict()

    def close(self) -> None:
        """Close the loader."""
        self.loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rewind(self) -> None:
        """Put the loader back to the batch in hand, unless it was put elsewhere; without a seed it begins anew anyway."""
        if self.loader.state_dict() == self._left != self._state and self.loader.clips.seed is not None:
            self.loader.load_state_dict(self._state)
        self._state = self._left = self.loader.state_dict()

    def _next_position(self) -> int:
        """Samples before the batch that is handed out next: the loader has read further, or was put elsewhere."""
        now = self.loader.state_dict()
        return int((self._state if now == self._left else now)["consumed"])

    def _moved(self, batch: "Batch") -> tuple["Batch", Any]:
        move: Callable[[], Batch] = lambda: batch.to(self.device, dtype=self._dtype, augment=self._augment)  # noqa: E731
        if self._stream is None:
            return move(), None
        with torch.cuda.stream(self._stream):
            moved = move()
            return moved, self._stream.record_event()

    def _take_over(self, batch: "Batch", ready: Any) -> None:
        """Let the model's stream wait for the batch, and the allocator know that it uses this memory."""
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in batch.tensors():
                if tensor.device.type == "cuda":
                    tensor.record_stream(current)
