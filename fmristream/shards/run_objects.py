"""What a run has beside its frames: vectors, metadata, statistics; small objects that are created together."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.shards import codec
from fmristream.shards.hashing import bulk_hexdigest
from fmristream.storage import Store, put_all


@dataclass(slots=True)
class RunObjects:
    """The small objects of a run: collected, then published together; knows their keys, should they have to go.

    Attributes:
        store: the dataset.
        group: key of the run's Zarr group.
        space_digest: of the run's voxels.
        bulk_digest: which digest objects get.
    """

    store: Store
    group: str
    space_digest: str
    bulk_digest: str
    _objects: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, data: bytes, *, relative_to: str = "") -> StoredFile:
        """An object of the group; its name in the table is relative to an array."""
        self._put(f"{self.group}/{name}", data)
        digest = bulk_hexdigest(data, self.bulk_digest)
        return StoredFile(name=name.removeprefix(f"{relative_to}/"), bytes=len(data), digest=digest)

    def put_array(self, name: str, values: NDArray[Any], *, names: tuple[str, ...]) -> StoredArray:
        """An array of one chunk."""
        from fmristream.shards.zarr_metadata import plain_metadata

        chunk = _padded(values)
        metadata = plain_metadata(shape=values.shape, chunks=chunk.shape, dtype=values.dtype.str, names=names)
        chunk_name = "/".join(["c", *("0" for _ in values.shape)])
        files = (
            self.put(f"{name}/{chunk_name}", codec.encode(chunk), relative_to=name),
            self.put(f"{name}/zarr.json", metadata, relative_to=name),
        )
        return self.row(name, values.dtype, encoding="direct", shape=values.shape, files=files)

    def put_stats(self, values: NDArray[np.float32]) -> StoredArray:
        """(2, v) exact mean and SD, one encoded chunk outside the group."""
        data = codec.encode(_padded(values))
        key = "stats/" + self.group.removeprefix("runs/").partition(".")[0]
        self._put(key, data)
        file = StoredFile(name="", bytes=len(data), digest=bulk_hexdigest(data, self.bulk_digest))
        return StoredArray(
            name="stats", object=key, space_digest=self.space_digest, dtype="<f4", encoding="blob", shape=values.shape,
            files=(file,),
        )  # fmt: skip

    def put_group(self, attributes: dict[str, Any], *, dtype: "np.dtype[Any]") -> StoredArray:
        """The group's zarr.json."""
        from fmristream.shards.zarr_metadata import group_metadata

        return self.row(
            "", dtype, encoding="group", shape=(), files=(self.put("zarr.json", group_metadata(attributes)),)
        )

    def row(self, name: str, dtype: "np.dtype[Any]", **rest: Any) -> StoredArray:
        """The row of the arrays table."""
        folder = f"{self.group}/{name}" if name else self.group
        return StoredArray(name=name, object=folder, space_digest=self.space_digest, dtype=dtype.str, **rest)

    def publish(self) -> None:
        """Create all of them."""
        put_all(self.store, self._objects)

    def delete(self, *, also: Iterable[str]) -> None:
        """Remove what was or may have been created."""
        for key in (*also, *self._objects):
            self.store.delete(key)

    def _put(self, key: str, data: bytes) -> None:
        self._objects[key] = data


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    """The values with their last axis padded to a whole chunk."""
    shape = (*values.shape[:-1], codec.padded_length(values.shape[-1]))
    chunk = np.full(shape, codec.fill_value(values.dtype), dtype=values.dtype)
    chunk[..., : values.shape[-1]] = values
    return chunk
