"""Folders of small imaging files, and what a listing says about them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fmristream.ingest.sources import Listing, SourceRun
from fmristream.ingest.sources.listing import imaging_suffix
from tests.ingest.nifti_files import bold_like, gzip_members, nifti_bytes

RUN = nifti_bytes(bold_like((3, 4, 2, 5)))
MASK = nifti_bytes(np.ones((3, 4, 2), "u1"))
RAW = {"dataset_description.json": '{"Name": "test", "BIDSVersion": "1.9.0"}'}
DERIVATIVE = {"dataset_description.json": '{"Name": "test", "DatasetType": "derivative"}'}


def make(root: Path, files: Mapping[str, str | bytes]) -> str:
    """Write files below a folder; "" for an imaging file means a small run."""
    for key, content in files.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and not content and imaging_suffix(key):
            content = gzip_members(RUN) if key.endswith(".gz") else RUN
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def by_key(listing: Listing) -> dict[str, SourceRun]:
    assert [run.key for run in listing.runs] == sorted(run.key for run in listing.runs)
    assert len({run.name for run in listing.runs}) == len(listing.runs)
    return {run.key: run for run in listing.runs}


def reasons(listing: Listing) -> dict[str, str]:
    return {file.key: file.reason for file in listing.skipped}
