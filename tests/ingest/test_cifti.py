"""A CIFTI-2 dense series as a run: every value in its frame, every axis checked, whatever a file claims."""

import gzip
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fmristream.errors import SourceError, StorageError
from fmristream.ingest import cifti
from fmristream.ingest.fingerprint import quick_fingerprint
from fmristream.ingest.run_stream import RunHeader, open_run
from fmristream.ingest.sources import SourceRun
from fmristream.shards.grayordinates import BrainModels
from tests.ingest.cifti_files import AFFINE, SURFACE_VERTICES, VOLUME, brain_models, cifti_bytes, series_like, xml_of
from tests.ingest.nifti_files import DATATYPES, bold_like, nifti_bytes

AXIS = brain_models()
FRAMES = 6


def run_of(path: Path) -> SourceRun:
    return SourceRun(key=path.name, name=path.name, url=str(path), subject="1")


def written(tmp_path: Path, data: bytes, name: str = "run.dtseries.nii") -> SourceRun:
    (tmp_path / name).write_bytes(data)
    return run_of(tmp_path / name)


def read(run: SourceRun, ring: int = 1) -> tuple[RunHeader, BrainModels, "np.ndarray[Any, Any]"]:
    with open_run(run) as stream:
        assert stream.models is not None
        frames = [frame[:, 0, 0].copy() for frame in stream.frames(ring)]
        assert stream.fingerprint() == quick_fingerprint(run)
        return stream.header, stream.models, np.stack(frames)


def reason(run: SourceRun) -> str:
    with pytest.raises(SourceError) as caught, open_run(run) as stream:
        list(stream.frames())
    return str(caught.value)


def of_xml(tmp_path: Path, xml: bytes, frames: int = FRAMES) -> SourceRun:
    return written(tmp_path, cifti_bytes(series_like(frames, AXIS), xml))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_bit_comes_in_its_frame_in_any_dtype_and_byte_order(tmp_path, dtype, order):
    values = np.ascontiguousarray(bold_like((FRAMES, len(AXIS)), dtype))
    run = written(tmp_path, cifti_bytes(values, xml_of(AXIS, frames=FRAMES), order=order))
    header, _, frames = read(run)
    assert (header.frames, header.shape, header.dtype) == (FRAMES, (len(AXIS), 1, 1), values.dtype)
    assert frames.tobytes() == values.tobytes()


@pytest.mark.parametrize("tile_bytes", [1, 200, 1000, 5000])
@pytest.mark.parametrize("ring", [1, 3])
def test_frames_are_the_same_however_little_is_turned_at_a_time(tmp_path, monkeypatch, tile_bytes, ring):
    monkeypatch.setattr(cifti, "TILE_BYTES", tile_bytes)
    values = series_like(23, AXIS)
    run = written(tmp_path, gzip.compress(cifti_bytes(values, xml_of(AXIS, frames=23))), "run.dtseries.nii.gz")
    assert read(run, ring)[2].tobytes() == values.tobytes()


def test_a_file_that_nibabel_writes_gives_what_nibabel_reads(tmp_path):
    values = series_like(FRAMES, AXIS)
    path = tmp_path / "run.dtseries.nii"
    axes = nibabel.cifti2.SeriesAxis(0, 0.72, FRAMES), AXIS
    nibabel.Cifti2Image(values, axes).to_filename(path)  # its intent says nothing of the kind: the XML does
    header, models, frames = read(run_of(path))
    image: Any = nibabel.load(path)
    assert np.array_equal(frames * header.slope + header.inter, image.get_fdata())
    axis = image.header.get_axis(1)
    of_surfaces = axis.surface_mask
    assert [model.structure for model in models.models for _ in range(model.count)] == list(axis.name)
    assert {model.structure: model.surface_vertices for model in models.models if model.is_surface} == axis.nvertices
    assert np.array_equal(models.indices[of_surfaces, 0], axis.vertex[of_surfaces])
    assert (models.indices[of_surfaces, 1:] == -1).all()
    assert np.array_equal(models.indices[~of_surfaces], axis.voxel[~of_surfaces])
    assert models.volume is not None
    assert (models.volume.shape, models.volume.affine) == (VOLUME, tuple(AFFINE.ravel()))
    assert (header.tr_s, header.space, header.models) == (0.72, "fsLR", models.digest)


def test_slope_and_intercept_are_kept_beside_the_values(tmp_path):
    data = cifti_bytes(series_like(FRAMES, AXIS, "i2"), xml_of(AXIS, frames=FRAMES), scl_slope=0.5, scl_inter=3.0)
    header, _, frames = read(written(tmp_path, data))
    assert (header.slope, header.inter, header.dtype) == (0.5, 3.0, np.dtype("<i2"))
    image: Any = nibabel.load(tmp_path / "run.dtseries.nii")
    assert np.array_equal(frames * header.slope + header.inter, image.get_fdata())


XML = xml_of(AXIS, frames=FRAMES)


def models_of(tmp_path: Path, xml: bytes) -> BrainModels:
    with open_run(of_xml(tmp_path, xml)) as stream:
        assert stream.models is not None
        return stream.models


def test_the_space_does_not_depend_on_how_the_xml_is_written(tmp_path):
    told = models_of(tmp_path, XML)
    spaced = XML.replace(b"><", b">\n  <").replace(b" 12 ", b"\n\t12  ")
    turned = XML.replace(b'SeriesExponent="0" ', b"").replace(
        b"<MatrixIndicesMap ", b'<MatrixIndicesMap SeriesExponent="0" '
    )
    without = (
        XML.replace(b"Jo Doe", b"nobody").replace(b"-126.0000000000", b"-1.26e2").replace(b" 0.0000000000 ", b" -0. ")
    )
    assert without != XML != turned
    for other in (spaced, turned, without):
        assert models_of(tmp_path, other).digest == told.digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"CORTEX_RIGHT", b"CEREBELLUM_RIGHT"),
        (b"<VertexIndices>0 2 ", b"<VertexIndices>2 0 "),
        (b" 40</VertexIndices>", b" 41</VertexIndices>"),
        (b'SurfaceNumberOfVertices="32492"', b'SurfaceNumberOfVertices="32493"'),
        (b"-126.0", b"-126.5"),
        (b'VolumeDimensions="5,4,3"', b'VolumeDimensions="5,4,4"'),
        (b"CIFTI_STRUCTURE_BRAIN_STEM", b"CIFTI_STRUCTURE_PUTAMEN_LEFT"),
    ],
)
def test_the_space_depends_on_everything_that_the_axis_says(tmp_path, old, new):
    assert old in XML
    assert models_of(tmp_path, XML.replace(old, new, 1)).digest != models_of(tmp_path, XML).digest


def edited(*pairs: tuple[str, str]) -> bytes:
    text = XML.decode()
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text.encode()


WRONG = {
    "no xml at all": (b"", "cannot be read"),
    "cut short": (XML[: len(XML) // 2], "cannot be read"),
    "not xml": (b"<CIFTI Version='2'", "cannot be read"),
    "version 1": (edited(('Version="2', 'Version="1')), "CIFTI version 1"),
    "another number of frames": (xml_of(AXIS, frames=7), "describes 7 frames, the header 6"),
    "other grayordinates": (xml_of(brain_models(vertices=22), frames=FRAMES), "exactly once"),
    "a gap": (edited(('IndexOffset="21"', 'IndexOffset="22"')), "exactly once"),
    "a stretch twice": (edited(('IndexOffset="21"', 'IndexOffset="0"')), "exactly once"),
    "a count beyond all": (edited(('IndexCount="21"', 'IndexCount="999999999"')), "exactly once"),
    "a count that is no number": (edited(('IndexCount="21"', 'IndexCount="-21"')), "whole number"),
    "a long count": (edited(('IndexCount="21"', f'IndexCount="{"9" * 4000}"')), "whole number"),
    "too few vertices": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 ")), "does not list 21"),
    "a vertex twice": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 0 ")), "twice, or outside"),
    "a vertex outside": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 32492 ")), "twice, or outside"),
    "words for vertices": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 two ")), "does not list 21"),
    "negative vertices": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 -2 ")), "does not list 21"),
    "huge vertices": (edited(("<VertexIndices>0 2 ", f"<VertexIndices>0 {2**64 + 2} ")), "does not list 21"),
    "a voxel outside": (edited(('VolumeDimensions="5,4,3"', 'VolumeDimensions="2,4,3"')), "outside its volume"),
    "no volume": (edited(("<Volume ", "<Volumes "), ("</Volume>", "</Volumes>")), "neither of a surface"),
    "a volume of huge sizes": (edited(("5,4,3", "999999,4,3")), "make no sense"),
    "an affine of 15": (edited(("-126.0000000000", "")), "no affine of 16"),
    "an affine that is not finite": (edited(("-126.0000000000", "nan")), "make no sense"),
    "a structure by a name of its own": (edited(("CIFTI_STRUCTURE_BRAIN_STEM", "JO_DOE")), "does not know"),
    "another kind of model": (edited(("CIFTI_MODEL_TYPE_SURFACE", "CIFTI_MODEL_TYPE_X")), "neither of a surface"),
    "frequencies": (edited(('SeriesUnit="SECOND"', 'SeriesUnit="HERTZ"')), "HERTZ, not in seconds"),
    "a step that is no number": (edited(('SeriesStep="0.72"', 'SeriesStep="x"')), "no number"),
    "scalars": (edited(("CIFTI_INDEX_TYPE_SERIES", "CIFTI_INDEX_TYPE_SCALARS")), "scalars by brain_models"),
    "an axis twice": (edited(('Dimension="1"', 'Dimension="0"')), "one axis twice"),
    "an axis of no number": (edited(('Dimension="1"', 'Dimension="x"')), "describes an axis"),
    "more numbers than count": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 2 2 ")), "does not list 21"),
    "no numbers": (edited(("5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25", "")), "does not list 21"),
    "signs that are spaces elsewhere": (
        edited(("<VertexIndices>0 2 ", "<VertexIndices>0\u20032 ")),
        "does not list 21",
    ),
    "digits of other scripts": (edited(("<VertexIndices>0 2 ", "<VertexIndices>0 \u0662 ")), "does not list 21"),
    "too many elements": (edited(("<Matrix>", "<Matrix>" + "<a/>" * 20_001)), "more elements"),
    "too deep": (edited(("<Matrix>", "<Matrix>" + "<a>" * 40)), "more elements"),
}


@pytest.mark.parametrize("what", WRONG)
def test_axes_that_contradict_themselves_or_the_header_are_refused(tmp_path, what):
    xml, expected = WRONG[what]
    assert expected in reason(of_xml(tmp_path, xml))


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))


@pytest.mark.parametrize(
    "prologue",
    [
        '<!DOCTYPE CIFTI SYSTEM "http://127.0.0.1:9/x.dtd">',
        '<!DOCTYPE CIFTI [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        f'<!DOCTYPE CIFTI [<!ENTITY l0 "ha">{LAUGHS}]>',
        "<!DOCTYPE CIFTI>",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_and_entities_are_refused_before_they_do_anything(tmp_path, prologue, encoding):
    began = time.monotonic()
    xml = edited(("<CIFTI ", f"{prologue}<CIFTI "), ("Jo Doe", "&l11;"))
    xml = (
        xml.decode().partition("?>")[2].encode(encoding) if xml.startswith(b"<?xml") else xml.decode().encode(encoding)
    )
    assert "declares a document type" in reason(of_xml(tmp_path, xml))
    assert time.monotonic() - began < 5  # what a bomb would never end in


KINDS = {
    3001: ".dconn", 3003: ".pconn", 3004: ".ptseries", 3006: ".dscalar", 3007: ".dlabel", 3008: ".pscalar",
    3009: ".pdconn", 3010: ".dpconn", 3011: ".pconnseries", 3012: ".pconnscalar", 3099: "does not know",
}  # fmt: skip


@pytest.mark.parametrize("intent", KINDS)
def test_other_kinds_of_cifti_are_refused_by_name(tmp_path, intent):
    data = cifti_bytes(series_like(FRAMES, AXIS), XML, intent_code=intent)
    assert KINDS[intent] in reason(written(tmp_path, data))


def test_sizes_of_the_header_are_checked_before_anything_else(tmp_path):
    values = series_like(FRAMES, AXIS)
    honest = cifti_bytes(values, XML)
    many = (6, 1, 1, 1, 1, 2**40, len(AXIS), 1)
    assert "the header declares" in reason(written(tmp_path, cifti_bytes(values, XML, dim=many)))
    assert "the header declares" in reason(written(tmp_path, honest[:-4]))
    assert "bytes follow the last frame" in reason(written(tmp_path, honest + b"1234"))
    flat = (5, 1, 1, 1, 1, FRAMES * len(AXIS), 1, 1)
    assert "expected 1 x 1 x 1 x 1 x frames" in reason(written(tmp_path, cifti_bytes(values, XML, dim=flat)))
    far = cifti_bytes(values, XML + b" " * cifti.MAX_XML_BYTES)
    assert "of CIFTI XML are not believed" in reason(written(tmp_path, far))


def test_a_list_that_the_xml_cannot_hold_is_refused_before_it_is_made(tmp_path):
    many = 60_000_000
    xml = edited(('IndexCount="21"', f'IndexCount="{many}"'), ('IndexOffset="21"', f'IndexOffset="{many}"'))
    data = gzip.compress(cifti_bytes(np.zeros((1, many), "u1"), xml, dim=(6, 1, 1, 1, 1, 1, many, 1)), 1)
    run = written(tmp_path, data, "run.dtseries.nii.gz")
    tracemalloc.start()
    try:
        assert "cannot list the 60000000 values" in reason(run)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", ["<VertexIndices>0 2 ", "<Value>scanned "])
def test_xml_of_nothing_but_numbers_costs_little(tmp_path, place):
    filler = "1 " * ((cifti.MAX_XML_BYTES - 50_000) // 2)
    run = of_xml(tmp_path, edited((place, place + filler)))
    tracemalloc.start()
    try:
        if "Value" in place:
            assert len(read(run)[2]) == FRAMES
        else:
            assert "does not list" in reason(run)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_one_extension_of_cifti_is_expected_among_others(tmp_path):
    values = series_like(FRAMES, AXIS)
    with_xml = cifti_bytes(values, XML)
    extension = with_xml[544 : int.from_bytes(with_xml[168:176], "little")]
    stored = values.reshape(1, 1, 1, 1, *values.shape)
    comment = b"\x20\0\0\0\x06\0\0\0" + b"c" * 24

    def with_extensions(data: bytes) -> SourceRun:
        return written(tmp_path, nifti_bytes(stored, version=2, extension=data, intent_code=3002))

    assert read(with_extensions(comment + extension))[2].tobytes() == values.tobytes()
    for wrong in (comment, extension + extension, b"\xff\xff\xff\x7f" + extension[4:]):
        assert "without its XML" in reason(with_extensions(wrong))


@pytest.mark.parametrize("seed", range(12))
def test_no_damage_to_a_compressed_file_passes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(gzip.compress(cifti_bytes(series_like(FRAMES, AXIS), XML)))
    place = int(rng.integers(12, len(data)))  # behind the header of gzip, whose time of writing is nothing
    if seed % 2:
        del data[place:]
    else:
        data[place] ^= 1 << int(rng.integers(8))
    assert reason(written(tmp_path, bytes(data), "run.dtseries.nii.gz"))


@pytest.mark.parametrize(
    ("exponent", "step", "tr_s"), [(0, "0.72", 0.72), (-3, "720", 0.72), (-6, "720000.0", 0.72), (1, "0.2", 2.0)]
)
def test_the_repetition_time_is_step_and_exponent_of_the_series(tmp_path, exponent, step, tr_s):
    xml = edited(('SeriesExponent="0"', f'SeriesExponent="{exponent}"'), ('SeriesStep="0.72"', f'SeriesStep="{step}"'))
    assert read(of_xml(tmp_path, xml))[0].tr_s == tr_s


def test_what_is_odd_about_a_series_is_noted(tmp_path):
    def told(**options: Any) -> RunHeader:
        return read(of_xml(tmp_path, xml_of(AXIS, frames=FRAMES, **options)))[0]

    assert told(step=0.0).tr_s is None
    assert "unknown" in told(step=0.0).notes[0]
    assert "not plausible" in told(step=720.0).notes[0]
    assert "starts at 3.5 s" in told(start=3.5).notes[0]
    assert not told().notes


def test_meshes_that_only_fslr_has_tell_the_space(tmp_path):
    xml = XML.replace(str(SURFACE_VERTICES).encode(), b"10242")
    assert read(of_xml(tmp_path, xml))[0].space == "unknown"
    assert read(of_xml(tmp_path, XML))[0].space == "fsLR"


@pytest.mark.full
def test_memory_is_a_few_tiles_however_long_the_run(tmp_path):
    axis = brain_models(vertices=16_000)
    with (tmp_path / "run.dtseries.nii").open("wb") as file:
        head = cifti_bytes(np.zeros((1, len(axis)), "<f4"), xml_of(axis, frames=1000))[: -4 * len(axis)]
        file.write(head[:56] + (1000).to_bytes(8, "little") + head[64:])  # dim[5]
        for _ in range(len(axis)):
            file.write(bytes(4000))
    tracemalloc.start()
    try:
        with open_run(run_of(tmp_path / "run.dtseries.nii")) as stream:
            assert sum(1 for _ in stream.frames(4)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 5 * cifti.TILE_BYTES
    finally:
        tracemalloc.stop()


def test_no_room_to_turn_a_run_is_no_fault_of_the_run(tmp_path, monkeypatch):
    run = of_xml(tmp_path, XML)
    monkeypatch.setattr(cifti, "TILE_BYTES", 500)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with open_run(run) as stream, pytest.raises(StorageError, match="set TMPDIR to a folder with room"):
        list(stream.frames())


def test_no_temporary_file_has_a_name_or_outlives_its_run(tmp_path, monkeypatch):
    run = of_xml(tmp_path, XML)
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(cifti, "TILE_BYTES", 500)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    with open_run(run) as stream:
        frames = stream.frames()
        next(frames)
        assert not list((tmp_path / "spool").iterdir())
        frames.close()  # type: ignore[attr-defined]
