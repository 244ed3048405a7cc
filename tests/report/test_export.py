"""What was converted comes out again: the very bytes where headers were kept, the same image where not."""

import gzip
import hashlib
import json
import os
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr

import fmristream
from fmristream.errors import CorruptDataError, ObjectMissingError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources import find_runs
from fmristream.report.export import Exported, export_run, export_volume, file_names
from fmristream.report.verify import verify
from fmristream.shards import codec
from fmristream.shards.dataset import Dataset
from tests.ingest.nifti_files import AFFINE, bold_like, comment_extension, gzip_members, nifti_bytes
from tests.ingest.odd_files import KINDS, odd_file, odd_run_name
from tests.report.datasets import SHAPE, brain_like, flip_bit, recommit, with_values, write_runs

KEEP = ConvertOptions(split="none", layout="volume", header="keep")
SCRUB = ConvertOptions(split="none", layout="volume")
VOXELS = ConvertOptions(split="none", mask="none")


def dataset_of(tmp_path: Path, image: bytes, options: ConvertOptions, *, name: str = "sub-1_bold.nii") -> Dataset:
    """A dataset of one file."""
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(image)
    url = str(tmp_path / f"{options.layout}-{options.header}-{options.mask.replace('/', '_')}")
    fmristream.convert(str(tmp_path / "in"), url, options=options)
    return fmristream.open(url)


def loaded(path: str) -> nibabel.Nifti1Image:
    return nibabel.load(path)


def round_trips(tmp_path: Path, url: str, numbers: range) -> None:
    """Convert the odd files, export them, compare every byte; and their stored values with what was put in."""
    source = tmp_path / "in"
    source.mkdir()
    files = {odd_run_name(number): odd_file(number) for number in numbers}
    for number, (name, file) in enumerate(files.items()):
        if number % 2:
            (source / f"{name}.nii.gz").write_bytes(gzip_members(file.image, level=1))
        else:
            (source / f"{name}.nii").write_bytes(file.image)
    report = fmristream.convert(str(source), url, options=KEEP)
    assert not report.quarantined
    dataset = fmristream.open(url)
    assert {run.name for run in dataset.runs} == set(files)
    for name, file in files.items():
        exported = export_run(dataset, name, tmp_path / "back" / f"{name}.nii")
        assert (tmp_path / "back" / f"{name}.nii").read_bytes() == file.image, name
        assert exported.is_original
        assert exported.stream_sha256 == hashlib.sha256(file.image).hexdigest()
        volumes = dataset.reader(name).read_volumes(0, file.stored.shape[3])
        assert volumes.tobytes() == file.stored.tobytes("F")


def test_odd_files_come_out_byte_for_byte(tmp_path, memory_url):
    round_trips(tmp_path, memory_url, range(len(KINDS)))


@pytest.mark.full
def test_three_hundred_odd_files_come_out_byte_for_byte(tmp_path):
    round_trips(tmp_path, str(tmp_path / "out"), range(1000, 1300))


@pytest.mark.parametrize("number", [3, 12, 21, 30])
def test_a_compressed_export_holds_the_same_image(tmp_path, number):
    file = odd_file(number)
    dataset = dataset_of(tmp_path, file.image, KEEP)
    exported = export_run(dataset, 0, tmp_path / "back.nii.gz")
    data = (tmp_path / "back.nii.gz").read_bytes()
    assert gzip.decompress(data) == file.image
    assert data[4:8] == bytes(4), "no time of day in gzip's header"
    assert (exported.bytes, exported.stream_bytes) == (len(data), len(file.image))


def test_a_scrubbed_export_has_the_voxels_affine_timing_and_scaling_of_the_source(tmp_path, memory_url):
    files = {odd_run_name(number): odd_file(number, well_formed=True) for number in range(16)}
    (tmp_path / "in").mkdir()
    for name, file in files.items():
        (tmp_path / "in" / f"{name}.nii").write_bytes(file.image)
    fmristream.convert(str(tmp_path / "in"), memory_url, options=SCRUB)
    dataset = fmristream.open(memory_url)
    for name, file in files.items():
        exported = export_run(dataset, name, tmp_path / f"{name}.nii")
        assert exported.header == "scrubbed"
        back, source = loaded(exported.path), loaded(str(tmp_path / "in" / f"{name}.nii"))
        np.testing.assert_array_equal(back.affine, source.affine)
        assert back.header.get_zooms() == source.header.get_zooms()
        for field in (
            "dim",
            "datatype",
            "bitpix",
            "pixdim",
            "xyzt_units",
            "qform_code",
            "sform_code",
            "slice_duration",
        ):
            assert back.header[field].tobytes() == source.header[field].tobytes(), field
        np.testing.assert_array_equal(back.dataobj.slope, source.dataobj.slope)
        np.testing.assert_array_equal(back.dataobj.inter, source.dataobj.inter)
        assert Path(exported.path).read_bytes()[back.dataobj.offset :] == file.image[file.data_offset :]


def test_nothing_that_names_somebody_is_left_in_a_scrubbed_dataset(tmp_path):
    image = bytearray(nifti_bytes(bold_like((3, 4, 5, 6)), extension=comment_extension(100)))
    for place in (4, 14, 148, 228, 328):
        image[place : place + 9] = b"SECRETNAM"
    image[352 + 8 : 352 + 17] = b"SECRETNAM"
    options = {"scrub": SCRUB, "keep": KEEP}
    found = {}
    for mode, option in options.items():
        dataset = dataset_of(tmp_path, bytes(image), option)
        group = zarr.open_group(str(Path(dataset.url) / dataset.runs[0].object), mode="r")
        header = np.asarray(group["nifti"][:]).tobytes()
        assert header == dataset.reader(0).nifti_prefix
        objects = [path.read_bytes() for path in Path(dataset.url).rglob("*") if path.is_file()]
        found[mode] = sum(b"SECRETNAM" in data for data in (header, *objects))
        document = dataset.generation.document["headers"]
        assert document["contains_original_headers"] is (mode == "keep")
    assert found["keep"] > 0, "else nothing was looked for"
    assert found["scrub"] == 0


def test_the_report_of_a_conversion_says_what_was_removed_and_not_what_it_said(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "sub-1_bold.nii").write_bytes(nifti_bytes(brain_like(), extension=comment_extension(10)))
    (source / "sub-2_bold.nii").write_bytes(nifti_bytes(brain_like(seed=1)))
    report = fmristream.convert(str(source), str(tmp_path / "out"), options=SCRUB)
    assert report.headers == "scrub"
    assert report.headers_removed == {"descrip": 2, "extension comment": 1}
    assert not any("header" in warning for warning in report.warnings)
    dataset = fmristream.open(str(tmp_path / "out"))
    assert dataset.generation.document["headers"]["removed"] == report.headers_removed
    assert dataset.reader("sub-1_bold").attributes["nifti"]["removed"] == ["descrip", "extension comment"]
    kept = fmristream.convert(str(source), str(tmp_path / "kept"), options=KEEP)
    assert kept.headers_removed == {}
    assert any("original NIfTI headers are stored" in warning for warning in kept.warnings)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
def test_voxels_of_a_whole_grid_convert_back_to_the_same_run(tmp_path, dtype):
    dataset = dataset_of(tmp_path, nifti_bytes(bold_like((4, 5, 3, 7), dtype), scl_slope=0.5, scl_inter=-2.0), VOXELS)
    exported = export_run(dataset, 0, tmp_path / "again" / "sub-1_bold.nii.gz")
    assert (exported.header, exported.is_original) == ("made", False)
    fmristream.convert(str(tmp_path / "again"), str(tmp_path / "twice"), options=VOXELS)
    assert fmristream.open(str(tmp_path / "twice")).runs[0].digest == dataset.runs[0].digest


def test_a_header_that_float32_cannot_hold_becomes_nifti_2(tmp_path):
    """An affine from a quaternion has more digits than NIfTI-1 stores."""
    image = nifti_bytes(brain_like(), sform_code=0, qform_code=1, quaternion=(0.1, 0.2, 0.3))
    dataset = dataset_of(tmp_path, image, VOXELS)
    back = loaded(export_run(dataset, 0, tmp_path / "back.nii").path)
    assert isinstance(back, nibabel.Nifti2Image)
    np.testing.assert_array_equal(back.affine, dataset.runs[0].affine_matrix)
    plain = dataset_of(tmp_path / "in", nifti_bytes(brain_like()), VOXELS)
    assert not isinstance(loaded(export_run(plain, 0, tmp_path / "plain.nii").path), nibabel.Nifti2Image)


def a_mask(tmp_path: Path) -> str:
    inside = np.zeros(SHAPE[:3], dtype=np.uint8)
    inside[1:4, 1:3, 2:5] = 1
    nibabel.save(nibabel.Nifti1Image(inside, np.array([*AFFINE, (0, 0, 0, 1)])), tmp_path / "mask.nii")
    return str(tmp_path / "mask.nii")


@pytest.mark.parametrize(("slope", "inter", "dtype"), [(1.0, 0.0, "<i2"), (0.5, -20.0, "<i2"), (0.0249, 818.3, "<f4")])
def test_voxels_outside_the_mask_are_zero_when_scaled(tmp_path, slope, inter, dtype):
    image = nifti_bytes(brain_like(), scl_slope=slope, scl_inter=inter)
    dataset = dataset_of(tmp_path, image, ConvertOptions(split="none", mask=a_mask(tmp_path)))
    exported = export_run(dataset, 0, tmp_path / "back.nii")
    back = loaded(exported.path)
    assert back.get_data_dtype().newbyteorder("<") == np.dtype(dtype)
    expected = np.moveaxis(dataset.read(0), 0, -1)
    np.testing.assert_allclose(back.get_fdata(), expected, rtol=1e-6)
    mask = dataset.space(0).mask
    assert not back.get_fdata()[~mask].any()
    assert any("outside the stored mask" in note for note in exported.notes)
    assert ("scaled" in " ".join(exported.notes)) is (dtype == "<f4")
    np.testing.assert_array_equal(back.affine, dataset.runs[0].affine_matrix)
    assert back.header.get_zooms()[3] == pytest.approx(dataset.runs[0].tr_s)


def test_synthetic_runs_have_a_header_made_for_them(tmp_path):
    url = str(tmp_path / "out")
    fmristream.convert("synth://?subjects=3&shape=8x9x7&frames=5", url, options=SCRUB)
    dataset = fmristream.open(url)
    back = loaded(export_run(dataset, 0, tmp_path / "back.nii.gz").path)
    np.testing.assert_array_equal(np.moveaxis(back.get_fdata(), -1, 0), dataset.read(0))
    np.testing.assert_allclose(back.affine, dataset.runs[0].affine_matrix)
    assert verify(url, deep=True, against="synth://?subjects=3&shape=8x9x7&frames=5").is_sound


def test_a_file_that_exists_is_left_alone_unless_forced(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    target = tmp_path / "mine.nii"
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        export_run(dataset, 0, target)
    assert target.read_bytes() == b"mine"
    export_run(dataset, 0, target, force=True)
    assert target.read_bytes() == nifti_bytes(brain_like())


@pytest.mark.parametrize("target", ["back.img", "back", "s3://bucket/back.nii", "folder.nii"])
def test_targets_that_are_no_nifti_file_are_refused(tmp_path, target):
    (tmp_path / "folder.nii").mkdir()
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    with pytest.raises(UsageError):
        export_run(dataset, 0, target if "://" in target else tmp_path / target)


@pytest.mark.parametrize("options", [KEEP, SCRUB, VOXELS], ids=["keep", "scrub", "voxels"])
def test_one_flipped_bit_anywhere_leaves_no_file(tmp_path, options):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), options)
    folder = Path(dataset.url) / dataset.runs[0].object
    names = (
        ["zarr.json", "nifti/c/0", "0/c/0/0/0/0"] if options.layout == "volume" else ["reference/c/0", "residual/c/0/0"]
    )
    for name in names:
        repair = flip_bit(folder / name)
        with pytest.raises(CorruptDataError):
            export_run(fmristream.open(dataset.url), 0, tmp_path / "back.nii.gz")
        assert not [path for path in tmp_path.iterdir() if path.is_file()]
        assert not verify(dataset.url).is_sound
        repair()
        (folder / name).rename(folder / "away")
        with pytest.raises(ObjectMissingError):
            export_run(fmristream.open(dataset.url), 0, tmp_path / "back.nii.gz")
        assert not [path for path in tmp_path.iterdir() if path.is_file()]
        (folder / "away").rename(folder / name)
    export_run(fmristream.open(dataset.url), 0, tmp_path / "back.nii.gz")


def test_frames_that_changed_places_are_noticed(tmp_path):
    """Chunks are whole and their checksums right: only the digest of the image tells."""
    values = np.asfortranarray(np.random.default_rng(0).integers(0, 2**15, SHAPE, dtype="<i2"))
    dataset = dataset_of(tmp_path, nifti_bytes(values), KEEP)
    shard = Path(dataset.url) / dataset.runs[0].object / "0/c/0/0/0/0"
    lengths = dataset.reader(0).lengths
    same = next((a, b) for a in range(7) for b in range(a) if lengths[a] == lengths[b])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    data = bytearray(shard.read_bytes())
    first, second = (slice(int(starts[i]), int(starts[i + 1])) for i in same)
    data[first], data[second] = data[second], data[first]
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match="the image comes to"):
        export_run(fmristream.open(dataset.url), 0, tmp_path / "back.nii")
    assert not (tmp_path / "back.nii").exists()


def test_a_header_of_another_image_is_refused(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)

    def other(array):
        if array.name != "nifti":
            return array
        header = np.frombuffer(nifti_bytes(brain_like((5, 4, 6, 8)))[:352], dtype=np.uint8)
        return with_values(array, Path(dataset.url), "c/0", codec.encode(header))

    lying = recommit(dataset.url, array=other)
    with pytest.raises(CorruptDataError, match="of another image"):
        export_run(lying, 0, tmp_path / "back.nii")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda nifti: nifti.update(stream_sha256="0" * 64), "image comes to"),
        (lambda nifti: nifti.pop("stream_sha256"), "does not say what its image"),
        (lambda nifti: nifti.clear(), "does not say what its image"),
    ],
)
def test_attributes_that_say_another_image_are_refused_and_found(tmp_path, change, what):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    document = json.loads((Path(dataset.url) / dataset.runs[0].object / "zarr.json").read_text())
    change(document["attributes"]["fmristream"]["nifti"])
    data = json.dumps(document).encode()
    lying = recommit(
        dataset.url,
        array=lambda array: array if array.name else with_values(array, Path(dataset.url), "zarr.json", data),
    )
    with pytest.raises(CorruptDataError, match=what):
        export_run(lying, 0, tmp_path / "back.nii")
    assert any(what in fault.what for fault in verify(dataset.url, deep=True).faults)


def test_only_the_source_tells_of_a_kept_header_that_was_changed_with_all_its_digests(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    url, source = Path(dataset.url), str(tmp_path / "in")
    assert verify(dataset.url, deep=True, against=source).is_sound
    image = bytearray(nifti_bytes(brain_like()))
    image[150] ^= 1
    document = json.loads((url / dataset.runs[0].object / "zarr.json").read_text())
    document["attributes"]["fmristream"]["nifti"]["stream_sha256"] = hashlib.sha256(image).hexdigest()
    changed = {
        "nifti": ("c/0", codec.encode(np.frombuffer(bytes(image[:352]), dtype=np.uint8))),
        "": ("zarr.json", json.dumps(document).encode()),
    }
    recommit(url, array=lambda one: with_values(one, url, *changed[one.name]) if one.name in changed else one)
    assert verify(dataset.url, deep=True).is_sound
    [fault] = verify(dataset.url, against=source).faults
    assert "not that of the source: from byte 150 on" in fault.what


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(fmristream.errors.StorageError, match="cannot be written"):
        export_run(dataset, 0, tmp_path / "file" / "back.nii")


def test_exported_files_have_the_rights_that_new_files_have(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    exported = export_run(dataset, 0, tmp_path / "back.nii")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(exported.path).st_mode) == 0o666 & ~mask


def named(dataset: Dataset, name: str, **fields: str):
    from dataclasses import replace

    return replace(dataset.runs[0], name=name, **{"subject": "x", **fields})


def test_names_never_lead_out_of_the_folder_and_never_meet(tmp_path):
    dataset = dataset_of(tmp_path, nifti_bytes(brain_like()), KEEP)
    runs = [
        named(dataset, name)
        for name in ("../../etc/passwd", "/etc/passwd", "a/b", "A/b", "..", "a/./b.nii.gz", "a\0b", "é/ü.nii", "c.nii")
    ]
    runs.append(named(dataset, "sub-x_ses-2_task-rest_bold", session="2"))
    names = file_names(runs)
    assert len({name.lower() for name in names.values()}) == len(runs)
    for name in names.values():
        parts = Path(name).parts
        assert not Path(name).is_absolute()
        assert not {"..", ".", ""} & set(parts)
        assert name.endswith(".nii.gz")
    assert names["c.nii"] == "c.nii.gz"
    assert names["sub-x_ses-2_task-rest_bold"] == "sub-x/ses-2/func/sub-x_ses-2_task-rest_bold.nii.gz"


REAL = Path(os.environ.get("FMRISTREAM_REAL_DATA", "/nonexistent"))


def require_originals(source: Path, url: Path) -> list[Exported]:
    """Every run that converts comes out as it was."""
    fmristream.convert(str(source), str(url), options=KEEP)
    dataset = fmristream.open(str(url))
    originals = {run.name: run for run in find_runs(str(source)).runs}
    done = []
    for run in dataset.runs:
        data = Path(originals[run.name].url).read_bytes()
        image = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        done.append(export_run(dataset, run, url / "back.nii", force=True))
        assert (url / "back.nii").read_bytes() == image, run.name
        assert done[-1].stream_sha256 == hashlib.sha256(image).hexdigest()
    return done


def test_the_runs_inside_nibabel_come_out_byte_for_byte(tmp_path):
    shipped = Path(nibabel.__file__).parent / "tests" / "data"
    for name in ("functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / name).symlink_to(shipped / name)
    assert len(require_originals(tmp_path / "scans", tmp_path / "out")) == 3


@pytest.mark.skipif(not REAL.is_dir(), reason="FMRISTREAM_REAL_DATA names no folder with the real files")
def test_every_real_file_that_converts_comes_out_byte_for_byte(tmp_path):
    assert len(require_originals(REAL, tmp_path / "out")) > 50


def test_export_writes_what_write_runs_wrote(tmp_path):
    """Several runs of one dataset, compressed and not, each to its own file."""
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": bold_like(SHAPE, "f8")})
    fmristream.convert(str(source), str(tmp_path / "out"), options=KEEP)
    dataset = fmristream.open(str(tmp_path / "out"))
    for run in dataset.runs:
        export_run(dataset, run.name, tmp_path / f"{run.name}.nii")
    assert (tmp_path / "sub-1_bold.nii").read_bytes() == nifti_bytes(brain_like())
    assert (tmp_path / "sub-2_bold.nii").read_bytes() == (source / "sub-2_bold.nii").read_bytes()


@pytest.mark.parametrize(("name", "space", "code"), [("map.nii", "MNI152NLin6Asym", 4), ("map.nii.gz", "native", 1)])
def test_a_computed_volume_is_written_where_its_affine_says(tmp_path, name, space, code):
    affine = np.array([[-2.0, 0.25, 0, 11], [0.125, 0.5, 3.0, -20], [0, -2.5, 0, 30], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(size=(5, 3, 4))
    export_volume(values, tmp_path / "maps" / name, affine=affine, space=space)
    back = loaded(tmp_path / "maps" / name)
    assert back.shape == (5, 3, 4)
    np.testing.assert_array_equal(np.asarray(back.dataobj), values.astype(np.float32))
    np.testing.assert_array_equal(back.affine, affine)
    assert int(back.header["sform_code"]) == code
    export_volume(values, tmp_path / "rough.nii", affine=affine + 1e-9, space=space)
    assert isinstance(loaded(tmp_path / "rough.nii"), nibabel.Nifti2Image)


def test_a_volume_is_not_written_over_another_nor_anywhere_else(tmp_path):
    volume = np.zeros((2, 2, 2))
    export_volume(volume, tmp_path / "map.nii", affine=np.eye(4), space="")
    with pytest.raises(UsageError, match="exists already"):
        export_volume(volume, tmp_path / "map.nii", affine=np.eye(4), space="")
    export_volume(volume + 1, tmp_path / "map.nii", affine=np.eye(4), space="", force=True)
    assert loaded(tmp_path / "map.nii").get_fdata().all()
    for path, values, sentence in (
        ("s3://bucket/map.nii", volume, "local files"),
        (tmp_path / "map.txt", volume, "NIfTI file"),
        (tmp_path / "four.nii", volume[..., None], "4 axes"),
    ):
        with pytest.raises(UsageError, match=sentence):
            export_volume(values, path, affine=np.eye(4), space="")
    assert [path.name for path in tmp_path.iterdir()] == ["map.nii"]
