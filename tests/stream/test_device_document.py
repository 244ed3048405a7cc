"""What the document shows is run, from top to bottom, on a small cohort."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

import fmristream
from fmristream.report.tar_options import TarOptions
from fmristream.report.webdataset import write_webdataset
from tests.stream.test_side import url as study_url  # noqa: F401

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"# needs (\w+)")


def blocks() -> list[str]:
    """The document's Python."""
    return _BLOCK.findall((ROOT / "docs/device.md").read_text())


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::Warning")
def test_every_snippet_runs(cohort_url, study_url, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "dataset").symlink_to(cohort_url)
    (tmp_path / "study").symlink_to(study_url)
    options = TarOptions(window=7, samples_per_shard=8)
    write_webdataset(fmristream.open(cohort_url), str(tmp_path / "shards"), options=replace(options, normalize="none"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = 0
    for number, block in enumerate(blocks()):
        needs = _NEEDS.match(block)
        if needs is None or importlib.util.find_spec(needs[1]) is not None:
            exec(compile(block, f"block {number}", "exec"), names)
            ran += 1
    for value in names.values():
        if hasattr(value, "loader"):
            value.loader.close()
    assert ran >= 8
