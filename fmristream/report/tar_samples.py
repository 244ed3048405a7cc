"""One window as two members of a tar: its array as .npy, and what it is as .json; opaque names where labels are not wanted."""

import hashlib
import hmac
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import UsageError
from fmristream.report.tar_bytes import member_header, npy_header, padding
from fmristream.report.tar_plan import TarPart, TarPlan
from fmristream.shards.digest import canonical_json
from fmristream.signal.measure import background_value
from fmristream.stream.window_reader import Scratch

# Hex digits of opaque names: 64 bits, no two of 100,000 runs are alike by chance.
_OPAQUE_DIGITS = 16


class SampleWriter:
    """Makes samples of one part; buffers for one window are kept from sample to sample. For one thread."""

    def __init__(self, plan: TarPlan, part: TarPart) -> None:
        self._plan = plan
        self._part = part
        self._options = plan.options
        self._scratch = Scratch()
        clips = part.clips
        self._packed = np.empty((clips.window, clips.voxels), dtype=np.float32)
        self._placed: dict[np.dtype[Any], NDArray[Any]] = {}

    def members(self, position: int, number: int) -> Iterator[bytes | memoryview]:
        """The bytes of a sample's two members, in pieces that are good until the next one is asked for.

        Args:
            position: of the sample in the shuffled order; names it.
            number: of its window in stored order.
        """
        run, start = self._part.clips.locate(number)
        values = self._values(run, start, number)
        key = f"{self._part.name}-{position:09d}"
        header = npy_header(values.dtype, values.shape)
        size = len(header) + values.nbytes
        yield member_header(f"{key}.bold.npy", size) + header
        yield values.reshape(-1).view(np.uint8).data
        record = canonical_json(self.record(run, start))
        yield padding(size) + member_header(f"{key}.json", len(record)) + record + padding(len(record))

    def record(self, run: Run, start: int) -> dict[str, Any]:
        """What the .json says of a window."""
        plan = self._plan
        found = {
            "fill": self._fill(run),
            "group": _opaque(plan.secret, "group", run.group),
            "normalize": self._options.normalize,
            "run": run.name if self._options.with_subjects else _opaque(plan.secret, "run", run.name),
            "space": run.space,
            "start": start,
            "subject": run.subject if self._options.with_subjects else _opaque(plan.secret, "subject", run.subject),
            "targets": {target.name: target.values.get(run.subject) for target in plan.targets},
            "task": run.task,
            "tr_s": run.tr_s,
        }
        if self._options.is_raw:
            found |= {"inter": run.inter, "slope": run.slope}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()
        }

    def _values(self, run: Run, start: int, number: int) -> NDArray[Any]:
        """(t, v) or (t, x, y, z) as the options say, C-contiguous, little-endian."""
        packed = self._read(run, start, number)
        if self._options.arrays == "packed":
            return packed
        clips = self._part.clips
        placed = self._placed.get(packed.dtype)
        if placed is None:
            self._placed.clear()
            placed = self._placed[packed.dtype] = np.empty((len(packed), math.prod(clips.grid)), dtype=packed.dtype)
        placed.fill(self._fill(run))
        inside = clips.positions >= 0
        placed[:, clips.positions[inside]] = packed[:, inside]
        return placed.reshape(len(packed), *clips.grid)

    def _read(self, run: Run, start: int, number: int) -> NDArray[Any]:
        if self._options.is_raw:
            stored = self._plan.dataset.reader(run).read_stored(start, start + self._part.clips.window)
            return np.ascontiguousarray(stored)
        self._part.clips.read_packed(number, self._packed[None], self._scratch)
        if self._options.dtype != "float16":
            return self._packed.astype("<f4", copy=False)
        with np.errstate(over="ignore"):
            half = self._packed.astype("<f2")
        if not np.isfinite(half).all():
            raise UsageError(
                f"run {run.name}, frames from {start}: a value of {np.abs(self._packed).max():.3g} does not fit float16, "
                "which ends at 65,504; use --dtype float32 and another target"
            )
        return half

    def _fill(self, run: Run) -> int | float | None:
        """What stands, or would stand, outside the mask; None where no stored value means 0."""
        if not self._options.is_raw:
            return float(self._part.clips.fill(run)[0])
        value, exists = background_value(run.numpy_dtype, run.slope, run.inter)
        if not exists:
            return None
        return float(value) if run.numpy_dtype.kind == "f" else int(value)


def _opaque(secret: str, kind: str, label: str) -> str:
    """A name that tells labels apart and tells nothing of them to whoever does not have the runs."""
    return hmac.new(bytes.fromhex(secret), f"{kind}|{label}".encode(), hashlib.sha256).hexdigest()[:_OPAQUE_DIGITS]
