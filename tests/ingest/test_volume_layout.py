"""Layout `volume` is the same data in another place: whatever reads the one layout reads the other, to the same values."""

import dataclasses
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tensorstore
import zarr

import fmristream
from fmristream.cli.main import main
from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.info import describe
from fmristream.report.look import look_at
from fmristream.report.verify import verify
from fmristream.shards import frames
from fmristream.shards.dataset import Dataset
from fmristream.shards.volume import ome_attributes
from tests.ingest.cohorts import convert, objects, six_runs
from tests.ingest.nifti_files import AFFINE, DATATYPES, bold_like, nifti_bytes
from tests.ingest.test_convert_resume import interrupt
from tests.report.datasets import SHAPE, brain_like, flip_bit, recommit, two_runs, write_runs

VOLUME = ConvertOptions(split="none", layout="volume", space="MNI")
VOXELS = ConvertOptions(split="none", mask="none", space="MNI")
SMALL_SHARD = 3


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 3 frames of the runs in here."""
    monkeypatch.setattr(frames, "frames_per_shard", lambda **_: SMALL_SHARD)


def both(tmp_path: Path, runs: dict[str, np.ndarray], **lies) -> tuple[Dataset, Dataset]:
    """The same files in either layout: (voxels, volume)."""
    source = write_runs(tmp_path / "in", runs, **lies)
    for options in (VOXELS, VOLUME):
        fmristream.convert(str(source), str(tmp_path / options.layout), options=options)
    return fmristream.open(str(tmp_path / "voxels")), fmristream.open(str(tmp_path / "volume"))


def every_dtype() -> dict[str, np.ndarray]:
    return {f"sub-{dtype}_bold.nii": bold_like((5, 3, 7, 19), dtype) for dtype in DATATYPES}


def test_runs_have_the_same_digest_and_values_in_both_layouts(tmp_path, small_shards):
    voxels, volume = both(tmp_path, every_dtype(), scl_slope=0.5, scl_inter=3.0, order=">")
    assert len(voxels.runs) == len(DATATYPES)
    for one, other in zip(voxels.runs, volume.runs, strict=True):
        for field in dataclasses.fields(one):  # the run digest among them
            if field.name not in ("object", "objects_digest"):
                np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name), field.name)
        for start, stop in ((0, 19), (2, 3), (2, 7), (18, 19)):
            for packed in (False, True):
                ours = volume.read(other, start, stop, packed=packed)
                assert ours.tobytes() == voxels.read(one, start, stop, packed=packed).tobytes()
        assert voxels.reader(one).moments.tobytes() == volume.reader(other).moments.tobytes()
        assert voxels.reader(one).exact_moments.tobytes() == volume.reader(other).exact_moments.tobytes()


@pytest.mark.parametrize("normalize", ["none", "voxel-zscore", "global-zscore"])
def test_windows_of_both_layouts_are_equal(tmp_path, normalize):
    runs = {"sub-1_bold.nii": brain_like((5, 4, 6, 12)), "sub-2_bold.nii": brain_like((5, 4, 6, 12), seed=1)}
    for values in (runs, {name: value.astype("<f4") for name, value in runs.items()}):
        folder = tmp_path / str(next(iter(values.values())).dtype)
        clips = [
            fmristream.StreamingDataset(dataset, window=5, stride=3, normalize=normalize, mix_spaces=True)
            for dataset in both(folder, values)
        ]
        assert len(clips[0]) == len(clips[1]) > 4
        for number in range(len(clips[0])):
            one, other = (clip[number]["bold"] for clip in clips)
            assert one.tobytes() == other.tobytes()
            assert one.any()


def test_pictures_of_both_layouts_show_the_same(tmp_path):
    voxels, volume = both(tmp_path, {"sub-1_bold.nii": brain_like((6, 7, 8, 20))})
    one, other = (look_at(dataset, dataset.runs[0]) for dataset in (voxels, volume))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_info_names_the_layout(tmp_path):
    voxels, volume = both(tmp_path, {"sub-1_bold.nii": brain_like()})
    assert (describe(voxels).layout, describe(volume).layout) == ("voxels", "volume")
    assert describe(volume).grids == describe(voxels).grids
    assert (describe(voxels).headers, describe(volume).headers) == ("none", "scrub")


def test_info_warns_of_original_headers(tmp_path, capsys):
    _, url = two_runs(tmp_path, dataclasses.replace(VOLUME, header="keep"))
    assert main(["info", str(url)]) == 0
    text = capsys.readouterr().out
    assert "original, every byte" in text
    assert "may name a person" in text


@pytest.mark.parametrize("kind", ["local", "memory", pytest.param("s3", marks=pytest.mark.full)])
def test_a_dataset_on_any_store_verifies_in_every_depth(tmp_path, request, kind):
    dataset_url = str(tmp_path / "out") if kind == "local" else request.getfixturevalue(f"{kind}_url")
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": bold_like(SHAPE, "f8")})
    fmristream.convert(str(source), dataset_url, options=VOLUME)
    report = verify(dataset_url, deep=True, against=str(source))
    assert report.faults == ()
    assert (report.runs_compared, report.frames_decoded) == (2, 14)
    assert report.frames_cross_read == 6
    assert not [key for key in objects(dataset_url) if key.startswith("pending/")]


def test_a_mask_beside_a_run_is_kept_and_cuts_nothing_off(tmp_path):
    folder = tmp_path / "in" / "sub-1" / "func"
    values = brain_like((6, 6, 6, 5))
    inside = np.zeros((6, 6, 6), dtype=np.uint8)
    inside[1:5, 2:4, 1:6] = 1
    affine = np.array([*AFFINE, (0, 0, 0, 1)])
    folder.mkdir(parents=True)
    (tmp_path / "in" / "dataset_description.json").write_text(
        '{"Name": "x", "BIDSVersion": "1.8.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}'
    )
    stem = "sub-1_task-rest_space-MNI152NLin2009cAsym_desc-"
    (folder / f"{stem}preproc_bold.nii").write_bytes(nifti_bytes(values))
    nibabel.save(nibabel.Nifti1Image(inside, affine), folder / f"{stem}brain_mask.nii")
    fmristream.convert(str(tmp_path / "in"), str(tmp_path / "out"), options=dataclasses.replace(VOLUME, space=None))
    dataset = fmristream.open(str(tmp_path / "out"))
    [run] = dataset.runs
    assert (run.voxels, run.outside) == (216, 0)
    np.testing.assert_array_equal(dataset.reader(run).own_mask.reshape(6, 6, 6), inside.astype(bool))
    assert np.moveaxis(dataset.read(run), 0, -1).tobytes() == values.astype("<f4").copy("C").tobytes()
    assert verify(dataset.url, deep=True, against=str(tmp_path / "in")).faults == ()


def group_of(dataset: Dataset, run: int = 0) -> Path:
    return Path(dataset.url) / dataset.runs[run].object


@pytest.mark.parametrize("dtype", DATATYPES)
def test_zarr_python_and_tensorstore_read_what_nibabel_reads(tmp_path, small_shards, dtype):
    image = nifti_bytes(bold_like((5, 3, 7, 8), dtype), scl_slope=0.1, order=">")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub-1_bold.nii").write_bytes(image)
    fmristream.convert(str(tmp_path / "in"), str(tmp_path / "out"), options=VOLUME)
    group = group_of(fmristream.open(str(tmp_path / "out")))
    unscaled = nibabel.load(tmp_path / "in" / "sub-1_bold.nii").dataobj.get_unscaled()
    expected = np.ascontiguousarray(unscaled.astype(unscaled.dtype.newbyteorder("<")).T)
    array = zarr.open_group(str(group), mode="r")["0"]
    assert array.metadata.dimension_names == ("t", "z", "y", "x")
    assert (array.shape, array.shards, array.chunks) == ((8, 7, 3, 5), (3, 7, 3, 5), (1, 7, 3, 5))
    assert array[:].tobytes() == expected.tobytes()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(group / "0")},
        "fill_missing_data_reads": False,
    }
    assert tensorstore.open(spec, read=True).result().read().result().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "lies", [{}, {"xyzt_units": 0}, {"sform_code": 0, "qform_code": 0}], ids=["full", "no TR", "plain"]
)
def test_a_run_is_valid_ome_zarr(tmp_path, lies):
    from ome_zarr_models import open_ome_zarr
    from ome_zarr_models.v05 import Image

    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()}, **lies)
    fmristream.convert(str(source), str(tmp_path / "out"), options=VOLUME)
    dataset = fmristream.open(str(tmp_path / "out"))
    assert dataset.runs[0].object.endswith(".ome.zarr")
    image = open_ome_zarr(zarr.open_group(str(group_of(dataset)), mode="r"))
    assert isinstance(image, Image)
    [multiscale] = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["t", "z", "y", "x"]
    [level] = multiscale.datasets
    assert level.path == "0"
    scale = level.coordinateTransformations[0].scale
    x, y, z = nibabel.affines.voxel_sizes(dataset.runs[0].affine_matrix)
    np.testing.assert_allclose(scale, [dataset.runs[0].tr_s or 1.0, z, y, x])
    assert (multiscale.axes[0].unit == "second") is (dataset.runs[0].tr_s is not None)


def test_the_validator_can_fail(tmp_path):
    from ome_zarr_models.v05 import Image

    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()})
    fmristream.convert(str(source), str(tmp_path / "out"), options=VOLUME)
    group = group_of(fmristream.open(str(tmp_path / "out")))
    path = group / "zarr.json"
    path.write_text(path.read_text().replace('"name": "z"', '"name": "t"'))
    with pytest.raises(ValueError, match="axes"):
        Image.from_zarr(zarr.open_group(str(group), mode="r"))


def test_ome_tells_the_place_of_the_first_voxel_only_where_it_is_true():
    plain = (2.0, 0.0, 0.0, -90.0, 0.0, 2.0, 0.0, -126.0, 0.0, 0.0, 3.0, -72.0, 0.0, 0.0, 0.0, 1.0)
    flipped = (-2.0, 0.0, 0.0, 90.0, *plain[4:])
    singular = (*plain[:8], 0.0, 0.0, 0.0, 0.0, *plain[12:])
    found = {}
    for name, affine in {"plain": plain, "flipped": flipped, "singular": singular}.items():
        [multiscale] = ome_attributes(affine=affine, tr_s=0.72)["multiscales"]
        scale, translation = multiscale["datasets"][0]["coordinateTransformations"]
        found[name] = (scale["scale"], translation["translation"])
    assert found["plain"] == ([0.72, 3.0, 2.0, 2.0], [0.0, -72.0, -126.0, -90.0])
    assert found["flipped"] == ([0.72, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0])
    assert found["singular"] == ([0.72, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0])


def test_a_lost_shard_is_an_error_in_our_reader_and_no_brain_in_others(tmp_path, small_shards):
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()})
    fmristream.convert(str(source), str(tmp_path / "out"), options=VOLUME)
    dataset = fmristream.open(str(tmp_path / "out"))
    group = group_of(dataset)
    whole = dataset.read(0, 0, 3)
    shutil.rmtree(group / "0" / "c" / "1")
    with pytest.raises(fmristream.errors.ObjectMissingError, match="0/c/1/0/0/0"):
        dataset.read(0)
    assert dataset.read(0, 0, 3).tobytes() == whole.tobytes()
    seen = zarr.open_group(str(group), mode="r")
    low, high = seen.attrs["fmristream"]["valid_range"]
    lost = seen["0"][3:6]
    assert ((lost < low) | (lost > high)).all()


@pytest.mark.parametrize("name", ["0/c/0/0/0/0", "reference/c/0", "moments/c/0/0", "nifti/c/0", "0/zarr.json"])
def test_verify_finds_one_flipped_bit_in_every_array(tmp_path, name):
    _, url = two_runs(tmp_path, VOLUME)
    dataset = fmristream.open(str(url))
    flip_bit(group_of(dataset) / name)
    report = verify(str(url))
    assert [fault.object.endswith(name) for fault in report.faults] == [True]
    assert report.faults[0].run == "sub-1_bold"


def test_tables_that_disagree_with_whole_volumes_are_found(tmp_path):
    _, url = two_runs(tmp_path, VOLUME)
    lying = recommit(url, run=lambda run: dataclasses.replace(run, voxels=run.voxels - 1))
    assert any("has shape" in fault.what for fault in verify(str(url)).faults)
    with pytest.raises(CorruptDataError, match="whole volumes"):
        lying.reader(0).read_stored(0, 1)


def test_readers_that_do_not_know_an_encoding_refuse_it(tmp_path):
    _, url = two_runs(tmp_path, VOLUME)
    other = recommit(
        url, array=lambda array: dataclasses.replace(array, encoding="volume-2") if array.name == "0" else array
    )
    with pytest.raises(FormatError, match="volume-2"):
        other.read(0)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "cubes"},
        {"layout": "volume", "header": "some"},
        {"header": "keep"},
        {"layout": "volume", "mask": "first:3"},
        {"layout": "volume", "mask": "mask.nii"},
    ],
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(UsageError):
        ConvertOptions(**options)


def test_converting_again_with_another_layout_or_headers_is_refused(tmp_path):
    source, url = two_runs(tmp_path, VOLUME)
    same = fmristream.convert(str(source), str(url), options=VOLUME)
    assert same.already_there
    assert (same.headers, same.headers_removed) == ("scrub", {"descrip": 2})
    for options, named in (
        (dataclasses.replace(VOLUME, header="keep"), "other headers"),
        (VOXELS, "another layout"),
    ):
        with pytest.raises(UsageError, match=named):
            fmristream.convert(str(source), str(url), options=options)


def test_an_interrupted_conversion_goes_on_and_still_counts_what_was_removed(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3, layout="volume")
    report = convert(source, memory_url, layout="volume")
    assert report.resumed == 3
    assert report.headers_removed == {"descrip": 6}
    fresh = convert(source, f"{memory_url}-fresh", layout="volume")
    assert report.content_digest == fresh.content_digest
    voxels = convert(source, f"{memory_url}-voxels")
    assert voxels.content_digest != fresh.content_digest, "the layout is a parameter"
    digests = [sorted(run.digest for run in fmristream.open(url).runs) for url in (memory_url, f"{memory_url}-voxels")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("then", [{"layout": "voxels"}, {"layout": "volume", "header": "keep"}])
def test_runs_of_another_layout_or_with_other_headers_are_not_taken_over(tmp_path, memory_url, then):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3, layout="volume")
    report = convert(source, memory_url, **then)
    assert (report.resumed, report.runs) == (0, 6)
    assert verify(memory_url, deep=True, against=source).faults == ()


@pytest.mark.full
def test_two_workers_write_the_same_dataset_as_one(tmp_path):
    source = six_runs(tmp_path / "in")
    digests = {
        workers: convert(source, str(tmp_path / f"out{workers}"), layout="volume", workers=workers).content_digest
        for workers in (1, 2)
    }
    assert digests[1] == digests[2]
