"""What the XML of a CIFTI-2 dense series says of its axes, read without believing it.

A document type is refused, and with it every entity that could grow or reach out; text is kept only where a number is
expected; sizes are compared with those of the header before anything is made by them. Metadata, provenance and names
that people gave are never looked at.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SourceError
from fmristream.shards.grayordinates import INDEX_DTYPE, NO_INDEX, BrainModel, BrainModels
from fmristream.signal.grid import Grid

# Structures of the CIFTI-2 specification; any other text in their place might be somebody's name.
_SIDED = (
    "ACCUMBENS", "AMYGDALA", "CAUDATE", "CEREBELLAR_WHITE_MATTER", "CEREBELLUM", "CEREBRAL_WHITE_MATTER", "CORTEX",
    "DIENCEPHALON_VENTRAL", "HIPPOCAMPUS", "PALLIDUM", "PUTAMEN", "THALAMUS",
)  # fmt: skip
_WHOLE = (
    "ALL", "ALL_GREY_MATTER", "ALL_WHITE_MATTER", "BRAIN_STEM", "CEREBELLUM", "CORTEX", "OTHER", "OTHER_GREY_MATTER",
    "OTHER_WHITE_MATTER",
)  # fmt: skip
STRUCTURES = frozenset(
    f"CIFTI_STRUCTURE_{name}"
    for name in (*_WHOLE, *(f"{name}_{side}" for name in _SIDED for side in ("LEFT", "RIGHT")))
)

# The 91,282 grayordinates of HCP take 0.6 MB, two whole surfaces of 164,000 vertices 3 MB.
MAX_XML_BYTES = 8 * 2**20
# A number and what separates it from the next one.
_LEAST_INDEX_BYTES = 2
# A dense series has some 30 elements, and a few for each piece of metadata.
_MAX_ELEMENTS = 20_000
_MAX_DEPTH = 32

_MAP = ("CIFTI", "Matrix", "MatrixIndicesMap")
_NUMBERS = {
    (*_MAP, "BrainModel", "VertexIndices"),
    (*_MAP, "BrainModel", "VoxelIndicesIJK"),
    (*_MAP, "Volume", "TransformationMatrixVoxelIndicesIJKtoXYZ"),
}
_SERIES, _MODELS = "CIFTI_INDEX_TYPE_SERIES", "CIFTI_INDEX_TYPE_BRAIN_MODELS"
_SURFACE, _VOXELS = "CIFTI_MODEL_TYPE_SURFACE", "CIFTI_MODEL_TYPE_VOXELS"
_NOT_WHOLE_NUMBERS = re.compile(r"[^0-9\s]|[0-9]{10}")
_PLAUSIBLE_TR_S = (0.05, 30.0)
_MILLIMETRE_EXPONENT = -3
# Meshes that exist in this space only: of 32,492 vertices (32k, of the 91k grayordinates) and 59,292 (59k, of the 170k).
_FSLR_VERTICES = frozenset({32492, 59292})


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The two axes of a dense series."""

    models: BrainModels
    tr_s: float | None
    space: str  # "fsLR" where the meshes are those of that space, else "unknown"
    notes: tuple[str, ...]


def parse_axes(xml: bytes, name: str, *, frames: int, grayordinates: int) -> Axes:
    """Read the axes of a series of this size.

    Raises:
        SourceError: not a dense series, or one that contradicts itself or the header.
    """
    found = _Reader(name).read(xml)
    series, models = found.maps.get(0), found.maps.get(1)
    if series is None or models is None or len(found.maps) != 2:
        raise SourceError(f"{name}: its CIFTI XML describes the axes {sorted(found.maps)}; expected 0 and 1")
    kinds = (series.kind, models.kind)
    if kinds != (_SERIES, _MODELS):
        shown = " by ".join(kind.removeprefix("CIFTI_INDEX_TYPE_").lower() for kind in kinds)
        raise SourceError(
            f"{name}: a CIFTI-2 file of {shown[:80]}; of CIFTI-2 dense time series (.dtseries: series by brain_models) are "
            "converted"
        )
    if grayordinates > len(xml) // _LEAST_INDEX_BYTES:
        raise SourceError(f"{name}: {len(xml)} bytes of CIFTI XML cannot list the {grayordinates} values of a frame")
    tr_s, notes = _series(series.attributes, frames, name)
    space = _brain_models(models, grayordinates, name)
    meshes = {model.surface_vertices for model in space.models if model.is_surface}
    label = "fsLR" if meshes and meshes <= _FSLR_VERTICES else "unknown"
    return Axes(models=space, tr_s=tr_s, space=label, notes=notes)


@dataclass(slots=True)
class _Element:
    """An element with the numbers in it."""

    attributes: Mapping[str, str]
    texts: dict[str, list[str]] = field(default_factory=dict)
    within: dict[str, Mapping[str, str]] = field(default_factory=dict)  # attributes of elements inside

    def text(self, name: str) -> str:
        return "".join(self.texts.get(name, ()))


@dataclass(slots=True)
class _Map:
    """A MatrixIndicesMap."""

    attributes: Mapping[str, str]
    models: list[_Element] = field(default_factory=list)
    volumes: list[_Element] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.attributes.get("IndicesMapToDataType", "")


class _Reader:
    """Collects the maps of a document."""

    def __init__(self, name: str) -> None:
        self.maps: dict[int, _Map] = {}
        self._name = name
        self._path: list[str] = []
        self._elements = 0
        self._map: _Map | None = None
        self._text: list[str] | None = None
        self._version = ""

    def read(self, xml: bytes) -> "_Reader":
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse
        parser.EntityDeclHandler = self._refuse
        parser.ExternalEntityRefHandler = self._refuse
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        try:
            parser.Parse(xml, True)
        except (expat.ExpatError, ValueError, LookupError) as error:
            raise SourceError(f"{self._name}: its CIFTI XML cannot be read: {error}") from error
        if self._version.partition(".")[0] != "2":
            raise SourceError(f"{self._name}: CIFTI version {self._version[:20] or 'unknown'}; version 2 is converted")
        return self

    def _refuse(self, *_: object) -> NoReturn:
        raise SourceError(
            f"{self._name}: its CIFTI XML declares a document type or entities, which no CIFTI file needs"
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        self._elements += 1
        if self._elements > _MAX_ELEMENTS or len(self._path) > _MAX_DEPTH:
            raise SourceError(f"{self._name}: its CIFTI XML has more elements than any CIFTI file")
        path = tuple(self._path)
        if path == ("CIFTI",):
            self._version = attributes.get("Version", "")
        elif path == _MAP:
            self._map = _Map(attributes=attributes)
            self._take(self._map)
        elif self._map is not None and path == (*_MAP, "BrainModel"):
            self._map.models.append(_Element(attributes))
        elif self._map is not None and path == (*_MAP, "Volume"):
            self._map.volumes.append(_Element(attributes))
        elif self._map is not None and path in _NUMBERS:
            owner = (self._map.models if path[3] == "BrainModel" else self._map.volumes)[-1]
            owner.within[tag] = attributes
            self._text = owner.texts.setdefault(tag, [])

    def _take(self, found: _Map) -> None:
        for axis in found.attributes.get("AppliesToMatrixDimension", "").split(","):
            if not axis.strip().isdecimal() or int(axis) in self.maps or int(axis) > 7:
                raise SourceError(f"{self._name}: its CIFTI XML describes an axis {axis[:20]!r}, or one axis twice")
            self.maps[int(axis)] = found

    def _end(self, tag: str) -> None:
        if tuple(self._path) in _NUMBERS:
            self._text = None
        self._path.pop()

    def _characters(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)


def _series(told: Mapping[str, str], frames: int, name: str) -> tuple[float | None, tuple[str, ...]]:
    """The repetition time, and what is odd about the series."""
    points = _whole(told, "NumberOfSeriesPoints", name)
    if points != frames:
        raise SourceError(f"{name}: its CIFTI XML describes {points} frames, the header {frames}")
    unit = told.get("SeriesUnit", "")
    if unit != "SECOND":
        raise SourceError(
            f"{name}: its series is in {unit[:20] or 'no unit'}, not in seconds: its frames are no time points"
        )
    try:
        scale = 10.0 ** int(told.get("SeriesExponent", ""))
        start, step = float(told.get("SeriesStart", "")) * scale, float(told.get("SeriesStep", "")) * scale
    except (ValueError, OverflowError) as error:
        raise SourceError(f"{name}: start, step or exponent of its series is no number") from error
    if not (math.isfinite(start) and math.isfinite(step)) or step <= 0:
        return None, (f"its series has a step of {step:g} s: the repetition time is unknown",)
    notes = []
    tr_s = float(f"{step:.9g}")  # 720 x 10^-3 is .72
    if not _PLAUSIBLE_TR_S[0] <= tr_s <= _PLAUSIBLE_TR_S[1]:
        notes.append(f"the repetition time of its series is {tr_s:g} s, which is not plausible")
    if start:
        notes.append(f"its series starts at {start:g} s, which is not stored")
    return tr_s, tuple(notes)


def _brain_models(told: _Map, grayordinates: int, name: str) -> BrainModels:
    volume = _volume(told, name)
    ordered = sorted(
        ((_whole(one.attributes, "IndexOffset", name), one) for one in told.models), key=lambda pair: pair[0]
    )
    counts = [_whole(one.attributes, "IndexCount", name) for _, one in ordered]
    # Before the list is made: a header that lies would be what decides its size.
    stops = np.cumsum([0, *counts], dtype=object)
    if [offset for offset, _ in ordered] != list(stops[:-1]) or int(stops[-1]) != grayordinates or 0 in counts:
        raise SourceError(
            f"{name}: its {len(ordered)} brain models do not describe each of {grayordinates} grayordinates exactly once"
        )
    indices = np.full((grayordinates, 3), NO_INDEX, dtype=INDEX_DTYPE)
    models = []
    for (offset, one), count in zip(ordered, counts, strict=True):
        models.append(_model(one, count, indices[offset : offset + count], volume, name))
    return BrainModels(
        models=tuple(models), indices=indices, volume=volume if any(not model.is_surface for model in models) else None
    )


def _model(told: _Element, count: int, indices: NDArray[np.int32], volume: Grid | None, name: str) -> BrainModel:
    """Check one model and fill in its part of the list."""
    structure, kind = told.attributes.get("BrainStructure", ""), told.attributes.get("ModelType", "")
    if structure not in STRUCTURES:
        raise SourceError(f"{name}: a brain model is of a structure that CIFTI-2 does not know")
    what = f"{name}: the brain model {structure}"
    if kind == _SURFACE:
        vertices = _whole(told.attributes, "SurfaceNumberOfVertices", name)
        found = _numbers(told.text("VertexIndices"), count, what)
        if found.max() >= vertices or len(np.unique(found)) != count:
            raise SourceError(f"{what} has vertices twice, or outside its surface of {vertices}")
        indices[:, 0] = found
        return BrainModel(structure=structure, count=count, surface_vertices=vertices)
    if kind != _VOXELS or volume is None:
        raise SourceError(f"{what} is neither of a surface nor of voxels in a volume that the file describes")
    places = _numbers(told.text("VoxelIndicesIJK"), 3 * count, what).reshape(count, 3)
    if (places >= volume.shape).any() or len(np.unique(np.ravel_multi_index(tuple(places.T), volume.shape))) != count:
        raise SourceError(f"{what} has voxels twice, or outside its volume")
    indices[:] = places
    return BrainModel(structure=structure, count=count)


def _volume(told: _Map, name: str) -> Grid | None:
    if not told.volumes:
        return None
    if len(told.volumes) > 1:
        raise SourceError(f"{name}: its CIFTI XML has {len(told.volumes)} volumes; expected one")
    (volume,) = told.volumes
    tag = "TransformationMatrixVoxelIndicesIJKtoXYZ"
    try:
        shape = [int(size) for size in volume.attributes.get("VolumeDimensions", "").split(",")]
        exponent = int(volume.within.get(tag, {}).get("MeterExponent", ""))
        affine = np.array([float(number) for number in volume.text(tag)[:2000].split()]).reshape(4, 4)
        # The factor is exactly 1 where it is in millimetres, as it always is; adding 0 makes -0 the 0 that it means.
        affine[:3] *= 10.0 ** (exponent - _MILLIMETRE_EXPONENT)
        affine += 0.0
    except (ValueError, OverflowError) as error:
        raise SourceError(
            f"{name}: the volume of its CIFTI XML has no three sizes or no affine of 16 numbers"
        ) from error
    if len(shape) != 3 or not all(0 < size < 2**15 for size in shape) or not np.isfinite(affine).all():
        raise SourceError(f"{name}: the volume of its CIFTI XML has sizes or an affine that make no sense")
    x, y, z = shape
    return Grid(shape=(x, y, z), affine=tuple(affine.ravel().tolist()))


def _numbers(text: str, count: int, what: str) -> NDArray[np.int64]:
    """Whole numbers, as many as expected."""
    if not _NOT_WHOLE_NUMBERS.search(text) and _count(text) == count:
        return np.fromstring(text, dtype=np.int64, sep=" ")
    raise SourceError(f"{what} does not list {count} whole numbers")


def _count(text: str) -> int:
    """How many numbers there are in a text of digits and spaces; nothing is made of them yet."""
    is_digit = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8) > ord(" ")
    return int(np.count_nonzero(is_digit[1:] & ~is_digit[:-1])) + int(is_digit[:1].any())


def _whole(told: Mapping[str, str], attribute: str, name: str) -> int:
    text = told.get(attribute, "")
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise SourceError(f"{name}: its CIFTI XML says {attribute} {text[:20]!r}; expected a whole number")
    return int(text)
