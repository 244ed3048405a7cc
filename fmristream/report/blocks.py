"""Runs in pieces that fit a piece of memory."""

from collections.abc import Iterator

from fmristream.catalog.run import Run
from fmristream.report.objects import PIECE_BYTES


def frame_blocks(run: Run) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive frames that fit a piece of memory."""
    step = max(1, PIECE_BYTES // max(1, run.voxels * run.numpy_dtype.itemsize))
    for start in range(0, run.frames, step):
        yield start, min(start + step, run.frames)
