"""One small converted cohort that the stream's tests read and never change."""

from contextlib import ExitStack

import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions

# 8 subjects x 2 runs of 29 frames: windows of 7 leave a rest, and splits hold 12, 2 and 2 runs.
COHORT = "synth://?subjects=8&runs=2&shape=9x10x7&frames=29&seed=5"


@pytest.fixture(scope="session")
def cohort_url(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("cohort") / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="exact"))
    return url


@pytest.fixture
def exit_stack():
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack
