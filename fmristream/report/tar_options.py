"""What a conversion to tar shards may be told."""

from dataclasses import dataclass
from typing import Literal

from fmristream.errors import UsageError
from fmristream.signal.grid import Shape3
from fmristream.signal.normalize import recipe

Arrays = Literal["packed", "placed"]

# Values as they are stored, in the stored dtype; everything else is a recipe of fmristream.signal.normalize.
RAW = "raw"

# Large enough that opening a shard costs little, small enough to deal hundreds of them to workers; WebDataset's own advice.
SHARD_BYTES = 256 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class TarOptions:
    """Everything about tar shards but the dataset and the target.

    Attributes:
        window: frames of a sample.
        stride: frames from one sample's start to the next; `window` where not given.
        parts: which parts of the split, each into a folder of its own; None for all that the dataset has.
        normalize: `raw` (stored values, with slope and intercept beside them), or a recipe such as `voxel-zscore`.
        dtype: of normalised values, `float32` or `float16`; None: float32. Raw values keep the stored dtype.
        arrays: `packed` (t, v) in-mask values, or `placed` (t, x, y, z) on the grid.
        grid: of placed arrays: (x, y, z) to pad or cut the native grid to, centred.
        samples_per_shard: None: as many as fit into SHARD_BYTES.
        seed: another seed, another order.
        targets: columns of the participants table that samples carry.
        with_subjects: write subject labels and run names; otherwise opaque ones stand in their place.
        mix_spaces: allow runs whose voxels do not correspond (unaligned subjects).
        workers: shards written at the same time, in threads.
    """

    window: int = 20
    stride: int | None = None
    parts: tuple[str, ...] | None = None
    normalize: str = RAW
    dtype: Literal["float16", "float32"] | None = None
    arrays: Arrays = "packed"
    grid: Shape3 | None = None
    samples_per_shard: int | None = None
    seed: int = 0
    targets: tuple[str, ...] = ()
    with_subjects: bool = False
    mix_spaces: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.normalize != RAW:
            recipe(self.normalize)
        if self.dtype not in (None, "float16", "float32"):
            raise UsageError(f"--dtype {self.dtype}: expected float16 or float32")
        if self.is_raw and self.dtype is not None:
            raise UsageError(f"--dtype {self.dtype}: raw values keep the stored dtype; add --normalize RECIPE")
        if self.normalize == "none" and self.dtype == "float16":
            raise UsageError("--dtype float16 rounds a signal that is not normalised by up to 1 in 2,000; use float32")
        if self.arrays not in ("packed", "placed"):
            raise UsageError(f"--arrays {self.arrays}: expected packed or placed")
        if self.grid is not None and self.arrays == "packed":
            raise UsageError("--grid is for arrays on the grid; add --arrays placed")
        for name in ("samples_per_shard", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        for name in ("parts", "targets"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise UsageError(f"--{name} {','.join(values)}: names something twice; give it once")

    @property
    def is_raw(self) -> bool:
        """Whether values are those that are stored."""
        return self.normalize == RAW
