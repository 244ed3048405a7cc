"""`--against`: what is compared, what counts as a difference, and what must not pass for a comparison."""

import os
from pathlib import Path

import numpy as np
import pytest

from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.against import beyond_rounding, differing_bits
from fmristream.report.verify import verify
from tests.ingest.nifti_files import bold_like
from tests.report.datasets import SHAPE, brain_like, converted, two_runs, write_runs


def against(dataset: Path, source: Path | str, **options) -> tuple[str, int]:
    report = verify(str(dataset), against=str(source), **options)
    return "\n".join(f"{fault.run}: {fault.what}" for fault in report.faults), report.voxels_compared


@pytest.mark.parametrize("dtype", ["i2", "f4", "u8"])
def test_one_voxel_of_one_frame_that_changed_by_one_bit_is_found_and_named(tmp_path, dtype):
    values = bold_like(SHAPE, dtype)
    source = write_runs(tmp_path / "source", {"run.nii.gz": values})
    converted(source, tmp_path / "dataset")
    bits = values.copy().view(f"<u{values.itemsize}")
    bits[3, 2, 1, 4] ^= 1
    write_runs(source, {"run.nii.gz": bits.view(values.dtype)})
    text, compared = against(tmp_path / "dataset", source)
    voxel = np.ravel_multi_index((3, 2, 1), SHAPE[:3])
    assert text.startswith(f"run: 1 stored values differ from the source; frame 4, stored voxel {voxel}: ")
    assert compared == values.size


def test_another_nan_is_a_difference(tmp_path):
    values = np.full(SHAPE, np.nan, dtype="<f4")
    source = write_runs(tmp_path / "source", {"run.nii": values})
    converted(source, tmp_path / "dataset")
    values.view("<u4")[0, 0, 0, 0] |= 1
    write_runs(source, {"run.nii": values})
    text, _ = against(tmp_path / "dataset", source)
    assert text.startswith("run: 1 stored values differ")


@pytest.mark.parametrize(
    ("field", "value"), [("scl_slope", 0.25), ("scl_inter", 1.5), ("srow", ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)))]
)
def test_a_header_that_changed_is_a_fault(tmp_path, field, value):
    source = write_runs(tmp_path / "source", {"run.nii": brain_like()}, scl_slope=0.5, scl_inter=1.0)
    converted(source, tmp_path / "dataset")
    write_runs(source, {"run.nii": brain_like()}, **{"scl_slope": 0.5, "scl_inter": 1.0, field: value})
    text, _ = against(tmp_path / "dataset", source)
    assert {"scl_slope": "slope is 0.5", "scl_inter": "inter is 1.0", "srow": "affine is"}[field] in text


@pytest.mark.parametrize("values", [brain_like((5, 4, 6, 8)), brain_like((4, 5, 6, 7)), brain_like().astype("<i4")])
def test_a_source_of_another_shape_or_dtype_is_a_fault_and_not_a_crash(tmp_path, values):
    source = write_runs(tmp_path / "source", {"run.nii": brain_like()})
    converted(source, tmp_path / "dataset")
    write_runs(source, {"run.nii": values})
    text, compared = against(tmp_path / "dataset", source)
    assert "the source has" in text
    assert "not one voxel was compared" in text
    assert compared == 0


def test_a_source_with_other_names_compares_nothing_and_fails(tmp_path):
    source, dataset = two_runs(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        os.rename(path, other / f"x{path.name}")
    text, compared = against(dataset, other)
    assert compared == 0
    assert "not one voxel was compared with the source" in text
    assert text.count("the source has no run of this name") == 2
    assert "2 runs of the source are neither in the dataset nor recorded as skipped: xsub-1_bold, xsub-2_bold" in text


def test_a_run_that_was_added_to_the_source_is_a_fault(tmp_path):
    source, dataset = two_runs(tmp_path)
    write_runs(source, {"sub-3_bold.nii": brain_like()})
    text, _ = against(dataset, source)
    assert "1 runs of the source are neither in the dataset nor recorded as skipped: sub-3_bold" in text


def test_a_source_that_was_removed_is_a_fault(tmp_path):
    source, dataset = two_runs(tmp_path)
    (source / "sub-2_bold.nii").unlink()
    text, compared = against(dataset, source)
    assert text == "sub-2_bold: the source has no run of this name"
    assert compared == brain_like().size


def test_inputs_that_were_quarantined_are_no_fault(tmp_path):
    source = write_runs(tmp_path / "source", {"good.nii": brain_like(), "volume.nii": brain_like()[..., 0]})
    (source / "broken.nii.gz").write_bytes(b"\x1f\x8b not really")
    (source / "empty.nii").write_bytes(b"")
    (source / "lonely.img").write_bytes(b"x")
    assert len(converted(source, tmp_path / "dataset").quarantined) == 4
    assert against(tmp_path / "dataset", source) == ("", brain_like().size)


def test_a_source_that_nibabel_cannot_read_any_more_is_a_fault(tmp_path):
    source, dataset = two_runs(tmp_path)
    for damage in (b"", b"nothing like an image", (source / "sub-2_bold.nii").read_bytes()[:-200]):
        (source / "sub-2_bold.nii").write_bytes(damage)
        text, _ = against(dataset, source)
        assert text.startswith("sub-2_bold: sub-2_bold.nii: nibabel cannot read ")


def test_a_source_folder_without_images_is_wrong_usage(tmp_path):
    _, dataset = two_runs(tmp_path)
    with pytest.raises(UsageError):
        verify(str(dataset), against=str(tmp_path / "nowhere"))


def test_only_stored_voxels_are_compared_where_there_is_a_mask(tmp_path):
    source = write_runs(tmp_path / "source", {"run.nii": brain_like()})
    mask = np.zeros(SHAPE[:3], dtype="u1")
    mask[1:4, :, 2] = 1
    write_runs(tmp_path, {"mask.nii": mask})
    options = ConvertOptions(mask=str(tmp_path / "mask.nii"), split="none")
    converted(source, tmp_path / "dataset", options)
    values = brain_like()
    values[0, 0, 0, 0] ^= 1  # outside
    write_runs(source, {"run.nii": values})
    assert against(tmp_path / "dataset", source) == ("", 3 * 4 * 7)
    values[1, 0, 2, 6] ^= 1  # inside
    write_runs(source, {"run.nii": values})
    assert against(tmp_path / "dataset", source)[0].startswith("run: 1 stored values differ")


def test_runs_chosen_by_a_subject_pattern_are_compared_with_the_same_choice(tmp_path):
    source = write_runs(tmp_path / "source", {"S1/a.nii": brain_like(), "phantom/a.nii": brain_like(seed=1)})
    options = ConvertOptions(mask="none", split="none", subject_pattern=r"S(\d+)/")
    converted(source, tmp_path / "dataset", options)
    assert "1 runs of the source" in against(tmp_path / "dataset", source)[0]
    assert against(tmp_path / "dataset", source, subject_pattern=r"S(\d+)/") == ("", brain_like().size)


def test_sources_in_a_bucket_are_compared_too(tmp_path, memory_url):
    import fsspec

    source = write_runs(tmp_path / "source", {"a.nii.gz": brain_like(), "b.nii": brain_like(seed=1)})
    files = fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"{memory_url.removeprefix('memory:/')}/{path.name}", path.read_bytes())
    converted(memory_url, tmp_path / "dataset")
    assert against(tmp_path / "dataset", memory_url) == ("", 2 * brain_like().size)


def test_another_synthetic_cohort_is_another_source(tmp_path):
    source = "synth://?subjects=2&shape=6x6x6&frames=4"
    converted(source, tmp_path / "dataset")
    assert against(tmp_path / "dataset", source) == ("", 2 * 4 * 216)
    text, _ = against(tmp_path / "dataset", source + "&seed=1")
    assert "stored values differ from the source" in text


def test_bits_differ_where_values_look_equal():
    one = np.array([0.0, np.nan, 1.0], dtype="<f4")
    other = np.array([-0.0, np.nan, 1.0], dtype="<f4")
    assert differing_bits(one, other).tolist() == [True, False, False]


def test_rounding_to_float32_is_no_difference_and_more_than_that_is():
    exact = np.array([1 / 3, 1e300, np.nan, np.inf, 0.0, -5e-46])
    with np.errstate(over="ignore"):
        ours = exact.astype(np.float32)
    assert not beyond_rounding(ours, exact).any()
    assert not beyond_rounding(np.nextafter(ours, np.float32(9)), exact)[0]
    further = np.nextafter(np.nextafter(np.nextafter(ours, np.float32(9)), np.float32(9)), np.float32(9))
    assert beyond_rounding(further, exact)[0]
    assert beyond_rounding(np.float32([0, 1]), np.array([np.nan, np.inf])).all()
