"""Another kind of space: grayordinates, vertices of surfaces and voxels of a volume in one list, as CIFTI-2 has them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.shards.digest import sha256, sha256_json
from fmristream.signal.grid import Grid, Shape3

KIND = "brain-models"

# A list has no place in millimetres; that of its voxel models is in `volume`.
NO_AFFINE = (0.0,) * 16

INDEX_DTYPE = np.dtype("<i4")
NO_INDEX = -1

_SURFACE, _VOXELS = "surface", "voxels"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrainModel:
    """A stretch of the list: vertices of one surface, or voxels of one structure."""

    structure: str  # CIFTI_STRUCTURE_CORTEX_LEFT, ...
    count: int
    surface_vertices: int | None = None  # of the whole surface; None for voxels

    @property
    def is_surface(self) -> bool:
        """Whether its grayordinates are vertices."""
        return self.surface_vertices is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class BrainModels:
    """What each grayordinate of a frame is.

    Attributes:
        models: in the order of the list, without gaps.
        indices: (g, 3) int32: vertex, -1, -1 on a surface; i, j, k in the volume.
        volume: the grid that voxels are numbered in; None where there are none.
    """

    models: tuple[BrainModel, ...]
    indices: NDArray[np.int32]
    volume: Grid | None = None

    @property
    def voxels(self) -> int:
        """Number of stored values of a frame: of grayordinates."""
        return len(self.indices)

    @property
    def frame_shape(self) -> Shape3:
        """What tables call the shape of a run: a list, as CIFTI puts it into NIfTI's sizes."""
        return self.voxels, 1, 1

    @cached_property
    def digest(self) -> str:
        """Hex digest of everything that the models say, however an XML file puts it."""
        return sha256_json(document_of(self))

    def slices(self) -> list[tuple[BrainModel, slice]]:
        """Each model and where its grayordinates stand."""
        stops = np.cumsum([model.count for model in self.models]).tolist()
        return [(model, slice(stop - model.count, stop)) for model, stop in zip(self.models, stops, strict=True)]


def document_of(space: BrainModels) -> dict[str, Any]:
    """What the digest is taken of."""
    volume = space.volume
    return {
        "affine": list(NO_AFFINE),
        "indices_sha256": sha256(np.ascontiguousarray(space.indices, dtype=INDEX_DTYPE).tobytes()),
        "kind": KIND,
        "models": [_model(model) for model in space.models],
        "shape": list(space.frame_shape),
        "volume": None
        if volume is None
        else {"affine": [float(number) for number in volume.affine], "shape": list(volume.shape)},
    }


def models_of(document: Any, indices: NDArray[np.int32]) -> BrainModels:
    """The space that a generation describes, with its indices."""
    told = document["volume"]
    volume = None
    if told is not None:
        x, y, z = (int(size) for size in told["shape"])
        volume = Grid(shape=(x, y, z), affine=tuple(float(number) for number in told["affine"]))
    models = tuple(
        BrainModel(structure=str(one["structure"]), count=int(one["count"]), surface_vertices=one.get("vertices"))
        for one in document["models"]
    )
    return BrainModels(models=models, indices=indices, volume=volume)


def _model(model: BrainModel) -> dict[str, Any]:
    kind = {"type": _SURFACE, "vertices": model.surface_vertices} if model.is_surface else {"type": _VOXELS}
    return {"count": model.count, "structure": model.structure, **kind}
