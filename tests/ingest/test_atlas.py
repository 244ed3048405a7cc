"""Atlases given to a conversion: read strictly, stored as parcel series beside the voxels, the same for every space."""

import json

import numpy as np
import pytest

import fmristream
from fmristream.errors import SourceError, UsageError
from fmristream.ingest.atlas import read_atlas, read_atlases
from fmristream.ingest.options import ConvertOptions
from fmristream.report.verify import verify
from fmristream.shards.dataset import open_dataset
from fmristream.shards.side import SideWriter
from tests.ingest.cohorts import stored
from tests.ingest.nifti_files import bold_like, gzip_members, nifti_bytes
from tests.report.datasets import brain_like, write_runs

SHAPE = (5, 4, 6)
LABELS = np.zeros(SHAPE, dtype="<i2")
LABELS[1:3, 1:, 1:3], LABELS[3:, 1:, 3:], LABELS[0, 0, 0] = 11, 4, 200


def options(*atlases, **more) -> ConvertOptions:
    return ConvertOptions(
        **{"mask": "none", "split": "none", "space": "MNI", "atlases": tuple(map(str, atlases))} | more
    )


@pytest.fixture
def atlas(tmp_path):
    path = tmp_path / "atlas" / "three.nii.gz"
    path.parent.mkdir()
    path.write_bytes(gzip_members(nifti_bytes(LABELS)))
    path.with_name("three.tsv").write_text("index\tname\n4\tfront\n11\tback\n12\tnowhere\n")
    return path


@pytest.fixture
def maps(tmp_path):
    weights = np.zeros((*SHAPE, 2), dtype="<f4")
    weights[1:4, 1:3, 1:5] = np.random.default_rng(0).random((3, 2, 4, 2))
    path = tmp_path / "maps.nii"
    path.write_bytes(nifti_bytes(weights))
    return path


@pytest.fixture
def source(tmp_path):
    runs = {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": bold_like((*SHAPE, 7), "f4")}
    write_runs(tmp_path / "source", runs, scl_slope=0.5, scl_inter=-30.0)
    return str(tmp_path / "source")


@pytest.mark.parametrize("more", [{}, {"layout": "volume"}, {"codec": "raw"}, {"codec": "int16"}, {"codec": "int8"}])
def test_series_are_scaled_means_of_what_readers_get(tmp_path, source, atlas, more):
    url = str(tmp_path / "out")
    report = fmristream.convert(source, url, options=options(atlas, **more))
    dataset = fmristream.open(url)
    for run in ("sub-1_bold", "sub-2_bold"):
        found, volumes = dataset.parcels(run), dataset.read(run)
        assert found.labels.tolist() == [4, 11, 200]
        assert found.names == ("front", "back", "")
        assert found.coverage.tolist() == [1, 1, 1]
        with np.errstate(all="ignore"):
            for column, label in enumerate((4, 11, 200)):
                values = volumes[:, label == LABELS].astype(np.float64)
                values = np.where(np.isfinite(values), values, np.nan)
                there = np.isfinite(values).any(axis=1)
                expected = np.full(len(values), np.nan)
                expected[there] = np.nanmean(values[there], axis=1)
                np.testing.assert_allclose(found.values[:, column], expected, rtol=2e-5, atol=1e-3)
            low, middle, high = np.nanpercentile(found.values.astype(float), (25, 50, 75), axis=0)
        np.testing.assert_allclose(found.median, middle, rtol=1e-5)
        np.testing.assert_allclose(found.iqr, high - low, rtol=1e-3, atol=1e-3)
    assert not [text for text in report.warnings if "atlas" in text]
    assert verify(url, deep=True, against=source, space="MNI").faults == ()


def test_names_that_are_shifted_by_a_row_are_refused(atlas):
    atlas.with_name("three.tsv").write_text("index\tname\n4\tBackground\n11\tfront\n200\tback\n")
    with pytest.raises(SourceError, match="rows are shifted"):
        read_atlas(str(atlas))


def test_two_atlases_are_told_apart_by_their_digests(tmp_path, source, atlas, maps):
    url = str(tmp_path / "out")
    fmristream.convert(source, url, options=options(atlas, maps))
    dataset = fmristream.open(url)
    first, second = (read_atlas(str(path)).digest for path in (atlas, maps))
    assert dataset.parcels(0, first[:8]).values.shape == (7, 3)
    assert dataset.parcels(0, second).values.shape == (7, 2)
    for wrong in (None, "0" * 8, first[:4]):
        with pytest.raises(UsageError, match=first[:12]):
            dataset.parcels(0, wrong)
    fmristream.convert(source, str(tmp_path / "plain"), options=options())
    plain = fmristream.open(str(tmp_path / "plain"))
    with pytest.raises(UsageError, match="it has parcels of: none"):
        plain.parcels(0)


def test_parcels_do_not_change_the_content_and_any_reader_of_zarr_has_them(tmp_path, source, atlas):
    plain = fmristream.convert(source, str(tmp_path / "plain"), options=options())
    rich = fmristream.convert(source, str(tmp_path / "rich"), options=options(atlas))
    assert plain.content_digest == rich.content_digest
    dataset = fmristream.open(str(tmp_path / "rich"))
    [name] = [array for array in dataset.arrays_of(0)[1] if array.startswith("parcels-") and "robust" not in array]
    run = dataset.runs[0]
    scaled = np.asarray(dataset.zarr(0)[name][:]) * run.slope + run.inter
    np.testing.assert_allclose(scaled, dataset.parcels(0).values, rtol=1e-6)


def test_the_digest_of_an_atlas_is_of_what_it_says_not_of_its_file(tmp_path, atlas):
    (tmp_path / "other.nii").write_bytes(nifti_bytes(LABELS.astype("<f4"), version=2, order=">"))
    assert read_atlas(str(atlas)).digest == read_atlas(str(tmp_path / "other.nii")).digest
    with pytest.raises(UsageError, match="given twice"):
        read_atlases([str(atlas), str(tmp_path / "other.nii")])
    (tmp_path / "moved.nii").write_bytes(
        nifti_bytes(LABELS, srow=((-2.5, 0, 0, 91.0), (0, 3, 0, -126), (0, 0, 4, -72)))
    )
    assert read_atlas(str(atlas)).digest != read_atlas(str(tmp_path / "moved.nii")).digest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (nifti_bytes((LABELS + 0.5).astype("<f4")), "not whole numbers"),
        (nifti_bytes(-LABELS), "expected 0"),
        (nifti_bytes(np.zeros(SHAPE, "<i2")), "no parcel"),
        (nifti_bytes(np.full((*SHAPE, 2), -1, "<f4")), "weights of parcels are 0 or above"),
        (nifti_bytes(np.zeros((4, 4), "<i2")), "3 dimensions .* or 4"),
        (nifti_bytes(LABELS)[:-10], "cut short"),
        (b"no image at all", "header"),
    ],
)
def test_what_is_no_atlas_is_refused_before_anything_is_written(tmp_path, source, data, reason):
    (tmp_path / "wrong.nii").write_bytes(data)
    with pytest.raises(UsageError, match=reason):
        fmristream.convert(source, str(tmp_path / "out"), options=options(tmp_path / "wrong.nii"))
    assert not (tmp_path / "out").exists()


def test_a_missing_atlas_and_one_that_lies_elsewhere_are_refused(tmp_path, source):
    with pytest.raises(UsageError, match="not there"):
        fmristream.convert(source, str(tmp_path / "out"), options=options(tmp_path / "gone.nii"))
    away = ((2.0, 0, 0, 900.0), (0, 2.0, 0, 900.0), (0, 0, 2.0, 900.0))
    (tmp_path / "away.nii").write_bytes(nifti_bytes(LABELS, srow=away))
    with pytest.raises(UsageError, match=r"away\.nii: none of its parcels"):
        fmristream.convert(source, str(tmp_path / "out"), options=options(tmp_path / "away.nii"))


def test_runs_in_their_own_space_get_no_parcels(tmp_path, source, atlas):
    with pytest.raises(UsageError, match="does not fit every subject; give --space"):
        fmristream.convert(source, str(tmp_path / "out"), options=options(atlas, space="native"))


def test_parcels_that_the_mask_cuts_off_are_counted(tmp_path, source, atlas):
    inside = np.zeros(SHAPE, "u1")
    inside[1:3, 1:, 1:2] = 1
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(inside))
    report = fmristream.convert(source, str(tmp_path / "out"), options=options(atlas, mask=str(tmp_path / "mask.nii")))
    [warning] = [text for text in report.warnings if "atlas" in text]
    assert "three.nii.gz: 2 of 3 parcels have less than 50%" in warning
    assert "2 have none there" in warning
    found = fmristream.open(str(tmp_path / "out")).parcels(0)
    assert found.coverage.tolist() == [0, 0.5, 0]
    assert np.isnan(found.values).all(axis=0).tolist() == [True, False, True]
    assert np.isnan(found.median).tolist() == [True, False, True]


def test_an_update_keeps_to_the_atlases_and_new_runs_have_them(tmp_path, source, atlas, maps, memory_url):
    fmristream.convert(source, memory_url, options=options(atlas))
    write_runs(tmp_path / "source", {"sub-3_bold.nii": brain_like(seed=3)})
    for others in ([], [maps], [atlas, maps]):
        with pytest.raises(UsageError, match="other atlases"):
            fmristream.convert(source, memory_url, options=options(*others, update="new"))
    names = atlas.with_name("three.tsv")
    right = names.read_text()
    names.write_text(right.replace("front", "Front"))
    with pytest.raises(UsageError, match="other atlases or names of parcels"):
        fmristream.convert(source, memory_url, options=options(atlas, update="new"))
    names.write_text(right)
    report = fmristream.convert(source, memory_url, options=options(atlas, update="new"))
    assert report.added == 1
    dataset = open_dataset(memory_url)
    assert [dataset.parcels(run).values.shape for run in range(3)] == [(7, 3)] * 3
    assert sum(space["kind"] == "parcels" for space in dataset.generation.document["spaces"].values()) == 1


def test_spaces_of_parcels_outlive_withdrawals_and_gc(source, atlas, memory_url):
    fmristream.convert(source, memory_url, options=options(atlas))
    fmristream.withdraw(memory_url, ["1"])
    fmristream.gc(memory_url, purge=True)
    dataset = open_dataset(memory_url)
    assert dataset.parcels("sub-2_bold").values.shape == (7, 3)
    assert verify(memory_url, deep=True).faults == ()


@pytest.mark.parametrize(
    "more", [{"threads": 2}, pytest.param({"workers": 2}, marks=pytest.mark.full), {"codec": "raw"}], ids=str
)
def test_parcels_are_the_same_whoever_converts_and_however(tmp_path, source, atlas, more):
    found = []
    for number, chosen in enumerate(({"threads": 1}, more)):
        url = str(tmp_path / str(number))
        fmristream.convert(source, url, options=options(atlas, **chosen))
        dataset = fmristream.open(url)
        spaces = sorted(dataset.generation.document["spaces"])
        found.append((spaces, [dataset.parcels(run).values.tobytes() for run in range(2)]))
        found[-1] += ([dataset.sketch(run) for run in range(2)],)
    assert found[0] == found[1]


def test_damaged_parcels_are_told(tmp_path, source, atlas):
    url = tmp_path / "out"
    fmristream.convert(source, str(url), options=options(atlas))
    [series, *_] = sorted(url.glob("runs/*/parcels-*/c/0/0"))
    data = bytearray(series.read_bytes())
    data[20] ^= 1
    series.write_bytes(data)
    assert [fault for fault in verify(str(url)).faults if "parcels" in str(fault)]


@pytest.mark.parametrize(
    ("put", "spoil", "said"),
    [
        (
            "put_parcels",
            lambda space, series, robust: (space, series * np.float32(1.01), robust),
            "not those of its stored",
        ),
        ("put_parcels", lambda space, series, robust: (space, series, robust * 2), "not those of its parcels"),
        ("put_sketch", lambda data: (data[:30] + bytes([data[30] ^ 255]) + data[31:],), "sketch is not that"),
    ],
)
def test_verify_computes_again_what_lies_beside(tmp_path, source, atlas, monkeypatch, put, spoil, said):
    good = getattr(SideWriter, put)
    monkeypatch.setattr(SideWriter, put, lambda self, *what: good(self, *spoil(*what)))
    fmristream.convert(source, str(tmp_path / "out"), options=options(atlas))
    assert verify(str(tmp_path / "out")).faults == ()
    faults = verify(str(tmp_path / "out"), deep=True).faults
    assert len(faults) == 2
    assert all(said in str(fault) for fault in faults)


def test_what_is_stored_names_neither_the_atlas_file_nor_its_folder(source, atlas, memory_url):
    fmristream.convert(source, memory_url, options=options(atlas))
    everything = b"".join(stored(memory_url).values())
    assert b"three.nii" not in everything
    assert json.loads(stored(memory_url)["generations/1.json"])["contents"]["atlases"]
