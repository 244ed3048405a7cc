"""What a dry run says of files and folders, held to the conversion that follows."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions, ConvertReport
from tests.ingest.cifti_files import brain_models, series_like, write_series
from tests.ingest.nifti_files import bold_like, gzip_members, nifti_bytes
from tests.ingest.source_trees import make
from tests.ingest.test_side_tables import a_dataset
from tests.report.datasets import SHAPE, brain_like

# Of one run beside what stays: its record and perhaps that of its mask; folders of records, once.
RECORDS, RECORD_FOLDERS = 2, 3


def both(source: str, url: Path, **options: object) -> tuple[ConvertReport, int, int]:
    chosen = ConvertOptions(**{"split": "none", "mask": "none"} | options)  # type: ignore[arg-type]
    told = fmristream.convert(source, str(url), options=chosen, dry_run=True)
    assert not url.exists()
    done = fmristream.convert(source, str(url), options=chosen)
    assert done.runs == told.runs
    paths = list(url.rglob("*"))
    return told, sum(path.is_file() for path in paths), sum(path.is_dir() for path in paths)


def check(told: ConvertReport, files: int, folders: int) -> None:
    assert files <= told.objects <= files + RECORDS * told.runs
    assert folders <= told.folders <= folders + RECORD_FOLDERS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": False},
        {"sketch": False, "side": False},
        {"codec": "raw"},
        {"codec": "int8"},
        {"codec": "int16"},
        {"layout": "volume"},
        {"mask": "auto"},
    ],
    ids=str,
)
def test_a_dry_run_counts_files_and_folders(tmp_path, options):
    check(*both(a_dataset(tmp_path), tmp_path / "out", **options))


@pytest.mark.parametrize("layout", ["voxels", "volume"])
def test_atlases_own_masks_and_grids_are_counted(tmp_path, layout):
    labels, maps = np.zeros(SHAPE[:3], "<i2"), np.zeros((*SHAPE[:3], 2), "<f4")
    labels[1:3, 1:3, 1:3] = 7
    maps[1:, 1:, 1:] = 0.5
    atlases = make(tmp_path / "atlases", {"labels.nii": nifti_bytes(labels), "maps.nii": nifti_bytes(maps)})
    func, description = "sub-{0}/func/sub-{0}_task-x", '{"Name": "x", "DatasetType": "derivative"}'
    tree: dict[str, str | bytes] = {"dataset_description.json": description, "participants.tsv": "participant_id\n"}
    for who in "12":
        for space in ("MNI", "T1w"):
            stem = f"{func.format(who)}_space-{space}"
            tree[f"{stem}_desc-preproc_bold.nii.gz"] = gzip_members(nifti_bytes(brain_like(seed=int(who))))
            tree[f"{stem}_desc-brain_mask.nii.gz"] = gzip.compress(nifti_bytes(np.ones(SHAPE[:3], "u1")))
    other = bold_like((SHAPE[0] + 1, *SHAPE[1:]), "f4")
    tree[f"{func.format(3)}_space-MNI_desc-preproc_bold.nii"] = nifti_bytes(other)
    files = tuple(f"{atlases}/{name}.nii" for name in ("labels", "maps"))
    source = make(tmp_path / "in", tree)
    mask = "none" if layout == "volume" else "auto"
    check(*both(source, tmp_path / "out", layout=layout, atlases=files, mask=mask))


def test_runs_of_grayordinates_have_no_sketch(tmp_path):
    axis = brain_models()
    runs = {f"sub-{who}_task-x": series_like(6, axis, seed=who) for who in (1, 2)}
    check(*both(str(write_series(tmp_path / "in", runs, axis)), tmp_path / "out"))


def test_bytes_of_raw_frames_are_exact(tmp_path):
    source = make(tmp_path / "in", {f"{name}.nii": nifti_bytes(brain_like()) for name in "ab"})
    told, _, _ = both(source, tmp_path / "out", codec="raw")
    shards = [path for path in (tmp_path / "out").rglob("bold/c/*/*") if path.is_file()]
    others = 4 * SHAPE[3] + 16 * SHAPE[3] + 4  # checksum of every chunk; its offset and length; their checksum
    assert told.stored_bytes == sum(path.stat().st_size for path in shards) - others * len(shards)
