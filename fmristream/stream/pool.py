"""Memory of batches, reused as soon as nobody looks at it: fresh pages cost four times what filling them does."""

import weakref
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray


class BatchPool:
    """Lends (b, t, v) float32 buffers; one comes back when the last tensor that shares it is gone.

    A batch that is kept keeps its memory, so no batch ever changes under its owner's hands.

    Args:
        pinned: page-locked memory, from which copies to a GPU run beside its work.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._lock = Lock()

    def lend(self, shape: tuple[int, int, int]) -> tuple[NDArray[np.float32], torch.Tensor]:
        """(array to fill, tensor to hand out) over the same memory."""
        size = shape[0] * shape[1] * shape[2]
        with self._lock:
            fitting = next((buffer for buffer in self._free if buffer.numel() == size), None)
            self._free = [buffer for buffer in self._free if buffer is not fitting and buffer.numel() == size]
        buffer = torch.empty(size, dtype=torch.float32, pin_memory=self._pinned) if fitting is None else fitting
        # A tensor made of an array keeps that very array alive; its end is the buffer's return.
        array = buffer.numpy().view()
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return array.reshape(shape), torch.from_numpy(array).view(shape)

    def _give_back(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.append(buffer)
