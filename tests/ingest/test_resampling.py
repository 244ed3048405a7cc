"""Runs resampled on the way in: the values of whole-array code, the same with every engine, checked again by verify."""

import json
import math

import numpy as np
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import UsageError
from fmristream.ingest.resampling import Resample, read_grid
from fmristream.report.verify import verify
from fmristream.signal.grid import Grid
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, write_runs
from tests.ingest.nifti_files import AFFINE, gzip_members, nifti_bytes
from tests.ingest.source_trees import make
from tests.ingest.test_convert_resume import interrupt
from tests.signal.test_resample import in_space, whole_series

SHAPE = (9, 8, 7, 30)
SOURCE = Grid(shape=SHAPE[:3], affine=(*(v for row in AFFINE for v in row), 0.0, 0.0, 0.0, 1.0))
TARGET = Grid(shape=(8, 9, 6), affine=(2.7, 0, 0, 68.0, 0, 2.7, 0, -128.0, 0, 0, 4.5, -72.0, 0, 0, 0, 1))
SLOW = Resample(tr_s=3.2)
COARSE = Resample(grid=TARGET)
BOTH = Resample(tr_s=3.2, grid=TARGET)


def expected(
    stored: np.ndarray, wanted: Resample, *, slope: float = 1.0, inter: float = 0.0, tr_s: float = 2.0
) -> np.ndarray:
    """(t, v) in double precision, a whole array at a time."""
    frames = [stored[..., t] * slope + inter for t in range(stored.shape[3])]
    if wanted.grid is not None:
        frames = [in_space(np.asfortranarray(frame), SOURCE, wanted.grid) for frame in frames]
    series = np.array([frame.reshape(-1) for frame in frames])
    return series if wanted.tr_s is None else whole_series(series, tr_s, wanted.tr_s)


@pytest.mark.parametrize("wanted", [SLOW, COARSE, BOTH], ids=["time", "space", "both"])
@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_values_are_those_of_whole_arrays(tmp_path, memory_url, wanted, dtype):
    stored = bold(dtype, shape=SHAPE)
    source = write_runs(tmp_path / "in", {"sub-01_bold": stored}, scl_slope=0.5, scl_inter=10.0)
    convert(source, memory_url, resample=wanted)
    dataset = fmristream.open(memory_url)
    (run,) = dataset.runs
    values = expected(stored, wanted, slope=0.5, inter=10.0)
    np.testing.assert_allclose(dataset.reader(run).read_stored(0, run.frames), values, rtol=1e-6, atol=1e-3)
    assert (run.dtype, run.slope, run.inter, run.frames) == ("<f4", 1.0, 0.0, len(values))
    assert run.tr_s == (3.2 if wanted.tr_s else 2.0)
    assert run.shape == (TARGET if wanted.grid else SOURCE).shape
    assert tuple(run.affine) == tuple(map(float, (TARGET if wanted.grid else SOURCE).affine))
    told = dataset.reader(run).attributes["resampled"]
    assert (told["frames"], told["shape"], told["dtype"], told["tr_s"]) == (30, list(SHAPE[:3]), f"<{dtype}", 2.0)
    assert dataset.parameters["resampling"] == wanted.record
    assert verify(memory_url, deep=True, against=source).is_sound
    plain = convert(source, f"{memory_url}-plain").content_digest
    assert dataset.content_digest != plain


def test_the_result_depends_on_neither_threads_nor_source_compression(tmp_path, memory_url):
    stored = bold(shape=SHAPE)
    one = write_runs(tmp_path / "one", {"sub-01_bold": stored})
    two = write_runs(tmp_path / "two", {"sub-01_bold": stored}, gzipped=False)
    digests = {
        convert(one, f"{memory_url}-{threads}", resample=BOTH, threads=threads).content_digest for threads in (1, 2)
    }
    digests.add(convert(two, f"{memory_url}-3", resample=BOTH).content_digest)
    assert len(digests) == 1


def test_verify_finds_a_run_that_was_resampled_otherwise(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    convert(source, memory_url, resample=BOTH)
    other = write_runs(tmp_path / "other", {"sub-01_bold": bold(shape=SHAPE, seed=7)})
    report = verify(memory_url, against=other)
    assert any("differ from the source" in fault.what for fault in report.faults)
    turned = write_runs(
        tmp_path / "turned", {"sub-01_bold": bold(shape=SHAPE)}, srow=tuple(row[::-1] for row in AFFINE)
    )
    report = verify(memory_url, against=turned)
    assert any("not the one that the run was resampled from" in fault.what for fault in report.faults)


def test_runs_that_are_so_already_are_stored_as_they_are_and_that_is_said(tmp_path, memory_url):
    fast, slow = bold(shape=SHAPE), bold(shape=SHAPE, seed=1)
    write_runs(tmp_path / "in", {"sub-01_bold": fast})
    pixdim = (1.0, 2.5, 3.0, 4.0, 3.2 * (1 + 5e-7), 0.0, 0.0, 0.0)
    source = write_runs(tmp_path / "in", {"sub-02_bold": slow}, pixdim=pixdim)
    report = convert(source, memory_url, resample=SLOW)
    assert any("1 of 2 runs have that repetition time and grid already" in line for line in report.warnings)
    dataset = fmristream.open(memory_url)
    assert {run.subject: run.dtype for run in dataset.runs} == {"01": "<f4", "02": "<i2"}
    untouched = dataset.run("sub-02_bold")
    assert "resampled" not in dataset.reader(untouched).attributes
    assert contents(memory_url)["sub-02_bold"] == np.moveaxis(slow, -1, 0).tobytes()
    assert verify(memory_url, against=source).is_sound


def test_a_run_without_a_repetition_time_is_left_out(tmp_path, memory_url):
    write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    source = write_runs(tmp_path / "in", {"sub-02_bold": bold(shape=SHAPE)}, pixdim=(1.0, 2.5, 3.0, 4.0, 0.0, 0, 0, 0))
    report = convert(source, memory_url, resample=SLOW)
    assert "repetition time is not known" in report.quarantined[0].reason
    assert convert(source, f"{memory_url}-2", resample=SLOW, tr_s=2.0).runs == 2


def test_an_update_must_resample_alike(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    convert(source, memory_url, resample=BOTH)
    write_runs(tmp_path / "in", {"sub-02_bold": bold(shape=SHAPE, seed=2)})
    for other in (None, SLOW, Resample(tr_s=3.2, voxel_mm=4.0), Resample(tr_s=3.3, grid=TARGET)):
        with pytest.raises(UsageError, match="another resampling"):
            convert(source, memory_url, resample=other, update="new")
    assert convert(source, memory_url, resample=BOTH, update="new").added == 1
    assert convert(source, memory_url, resample=BOTH).already_there
    assert verify(memory_url, deep=True, against=source).is_sound


def test_an_interrupted_conversion_goes_on_and_takes_nothing_that_was_resampled_otherwise(tmp_path, memory_url):
    runs = {f"sub-0{n}_bold": bold(shape=(*SHAPE[:3], 60), seed=n) for n in range(4)}
    source = write_runs(tmp_path / "in", runs)
    interrupt(source, memory_url, after_runs=2, resample=COARSE)
    assert convert(source, memory_url, resample=COARSE).resumed == 2
    interrupt(source, f"{memory_url}-2", after_runs=2, resample=COARSE)
    assert convert(source, f"{memory_url}-2").resumed == 0


def test_masks_are_resampled_with_their_runs(tmp_path, memory_url):
    mask = np.zeros(SHAPE[:3], "u1")
    mask[2:7, 2:6, 1:6] = 1
    stem = "sub-01/func/sub-01_task-rest_space-MNI_desc-"
    make(tmp_path / "in", {"dataset_description.json": '{"DatasetType": "derivative"}',
                           f"{stem}brain_mask.nii.gz": gzip_members(nifti_bytes(mask))})  # fmt: skip
    source = write_runs(tmp_path / "in", {f"{stem}preproc_bold": bold(shape=SHAPE)})
    convert(source, memory_url, resample=BOTH, mask="auto")
    dataset = fmristream.open(memory_url)
    share = in_space(np.asfortranarray(mask), SOURCE, TARGET)
    assert np.array_equal(dataset.space(dataset.run(0)).mask, share >= 0.5)
    assert 20 < (share >= 0.5).sum() < share.size / 2
    assert verify(memory_url, deep=True, against=source).is_sound


def test_a_given_mask_is_one_of_the_target_grid(tmp_path, memory_url):
    mask = np.zeros(TARGET.shape, "u1")
    mask[2:6, 2:7, 1:4] = 1
    rows = tuple(tuple(map(float, TARGET.affine[4 * i : 4 * i + 4])) for i in range(3))
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(mask, srow=rows))
    source = write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    convert(source, memory_url, resample=COARSE, mask=str(tmp_path / "mask.nii"))
    assert fmristream.open(memory_url).run(0).voxels == mask.sum()


def test_computed_masks_are_of_the_resampled_run(tmp_path):
    from tests.ingest.test_masks import head

    source = write_runs(tmp_path / "in", {f"sub-0{n}_bold": head(n) for n in range(2)})
    wanted = Resample(voxel_mm=4.0)
    whole = convert(source, str(tmp_path / "whole"), resample=wanted, mask="auto")
    run = fmristream.open(str(tmp_path / "whole")).run(0)
    assert 100 < run.voxels < math.prod(run.shape)
    for shard in ("1/2", "2/2", "1/2", "2/2"):
        convert(source, str(tmp_path / "shards"), resample=wanted, mask="auto", shard=shard)
    shared = convert(source, str(tmp_path / "shards"), resample=wanted, mask="auto")
    assert (shared.content_digest, shared.resumed) == (whole.content_digest, 2)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_codecs_code_resampled_values(tmp_path, memory_url, codec):
    source = write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    convert(source, memory_url, resample=BOTH, codec=codec)
    assert verify(memory_url, deep=True, against=source).is_sound


def test_layout_volume_holds_and_exports_the_resampled_image(tmp_path, memory_url):
    import nibabel

    from fmristream.report.export import export_run

    stored = bold(shape=SHAPE)
    source = write_runs(tmp_path / "in", {"sub-01_bold": stored}, extension=b"")
    convert(source, memory_url, resample=BOTH, layout="volume")
    assert verify(memory_url, deep=True, against=source).is_sound
    dataset = fmristream.open(memory_url)
    export_run(dataset, dataset.run(0), str(tmp_path / "out.nii"))
    image = nibabel.load(tmp_path / "out.nii")
    assert image.header.get_zooms()[3] == pytest.approx(3.2)
    np.testing.assert_allclose(image.affine, TARGET.matrix())
    values = np.moveaxis(image.get_fdata(), -1, 0).reshape(image.shape[3], -1)
    np.testing.assert_allclose(values, expected(stored, BOTH), rtol=1e-6, atol=1e-3)
    with pytest.raises(UsageError, match="another header"):
        convert(source, f"{memory_url}-2", resample=BOTH, layout="volume", header="keep")


def test_the_command_line_and_info(tmp_path, capsys):
    template = np.zeros(TARGET.shape, "u1")
    rows = tuple(tuple(map(float, TARGET.affine[4 * i : 4 * i + 4])) for i in range(3))
    (tmp_path / "template.nii.gz").write_bytes(gzip_members(nifti_bytes(template, srow=rows)))
    source, out = write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)}), str(tmp_path / "out")
    options = [
        "--mask",
        "none",
        "--split",
        "none",
        "--resample-tr",
        "3.2",
        "--resample-to",
        str(tmp_path / "template.nii.gz"),
    ]
    assert main(["convert", source, out, *options]) == 0
    capsys.readouterr()
    assert main(["info", out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resampled" in said
    assert "TR 3.2 s" in said
    assert "8 x 9 x 6" in said
    document = json.loads(open_store(out).read("generations/1.json"))
    assert (
        document["parameters"]["resampling"]
        == Resample(tr_s=3.2, grid=read_grid(str(tmp_path / "template.nii.gz"))).record
    )
    assert b"template" not in open_store(out).read("generations/1.json")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "nothing to resample to"),
        ({"tr_s": 0.0}, "expected seconds"),
        ({"voxel_mm": float("nan")}, "expected millimetres"),
        ({"voxel_mm": 2.0, "grid": TARGET}, "leave one of them out"),
        ({"grid": Grid(shape=(4096, 4096, 4096), affine=TARGET.affine)}, "too large"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, why):
    with pytest.raises(UsageError, match=why):
        Resample(**options)


def test_a_template_that_is_none_is_refused(tmp_path):
    (tmp_path / "run.nii").write_bytes(nifti_bytes(bold(shape=SHAPE)))
    for path in (tmp_path / "run.nii", tmp_path / "nothing.nii"):
        with pytest.raises(UsageError, match="--resample-to"):
            read_grid(str(path))


def test_a_grid_that_is_far_too_coarse_quarantines_the_run(tmp_path, memory_url):
    write_runs(tmp_path / "in", {"sub-01_bold": bold(shape=SHAPE)})
    fine = tuple(tuple(v / 30 for v in row) for row in AFFINE)
    source = write_runs(tmp_path / "in", {"sub-02_bold": bold(shape=SHAPE)}, srow=fine)
    report = convert(source, memory_url, resample=Resample(voxel_mm=8.0))
    assert "wide, at most 32" in report.quarantined[0].reason


@pytest.mark.full
def test_workers_of_dask_give_the_same(tmp_path):
    source = write_runs(tmp_path / "in", {f"sub-0{n}_bold": bold(shape=SHAPE, seed=n) for n in range(3)})
    one = convert(source, str(tmp_path / "one"), resample=BOTH)
    assert convert(source, str(tmp_path / "two"), resample=BOTH, workers=2).content_digest == one.content_digest
