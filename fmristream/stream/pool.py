"""Memory of batches, reused as soon as nobody looks at it: fresh pages cost four times what filling them does."""

import math
import weakref
from collections import deque
from typing import Any

import torch
from numpy.typing import NDArray


class BatchPool:
    """Lends buffers of batches; one comes back when the last tensor that shares it is gone.

    A batch that is kept keeps its memory, so no batch ever changes under its owner's hands.

    Args:
        pinned: page-locked memory, from which copies to a GPU run beside its work.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        # No lock: buffers come back whenever garbage is collected, in any thread, even amid lend.
        self._free: deque[torch.Tensor] = deque()

    def lend(self, shape: tuple[int, ...], dtype: str = "float32") -> tuple[NDArray[Any], torch.Tensor]:
        """(array to fill, tensor to hand out) over the same memory; float32, float16 or int16."""
        kind: torch.dtype = getattr(torch, dtype)
        if self._pinned:
            # A copy to the GPU may still read memory that Python has let go; torch's own pool waits for it, ours could not.
            tensor = torch.empty(shape, dtype=kind, pin_memory=True)
            return tensor.numpy(), tensor
        size = math.prod(shape) * kind.itemsize
        buffer = self._take(size)
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8)
        # A tensor made of an array keeps that very array alive; its end is the buffer's return.
        array = buffer.numpy().view(dtype)
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return array.reshape(shape), torch.from_numpy(array).view(shape)

    def device(self) -> int | None:
        """The GPU that this thread has chosen, as another thread that lends for it has to; None where none is."""
        return torch.cuda.current_device() if self._pinned else None

    def _take(self, size: int) -> torch.Tensor | None:
        """A free buffer of this size; others on the way are let go."""
        while True:
            try:
                buffer = self._free.popleft()
            except IndexError:
                return None
            if buffer.numel() == size:
                return buffer
