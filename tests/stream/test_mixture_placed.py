"""Members of a mixture that lie on different grids and masks come placed on one target grid, each as it would come alone."""

import numpy as np
import pytest

import fmristream
from fmristream.errors import SpaceError
from fmristream.ingest.options import ConvertOptions
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from fmristream.stream.mixture import Mixture
from tests.stream.conftest import COHORT

GRID = (7, 6, 8)


@pytest.fixture
def mixture(tmp_path, cohort_url):
    other = str(tmp_path / "unmasked")
    fmristream.convert(COHORT, other, options=ConvertOptions(mask="none", split="exact"))
    wanted = {"window": 4, "grid": GRID, "normalize": "global-zscore"}
    return Mixture([(StreamingDataset(url, seed=1, **wanted), 1.0) for url in (other, cohort_url)])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 2e-3)])
def test_each_row_is_what_its_member_gives_alone(mixture, dtype, tolerance):
    seen = set()
    with StreamingLoader(mixture, batch_size=6, threads=2, output="placed", dtype=dtype) as loader:
        for batch, _ in zip(loader, range(4), strict=False):
            assert batch.bold.shape == (6, 1, *GRID, 4)
            for row, (source, number) in enumerate(zip(batch.source.tolist(), batch.window.tolist(), strict=True)):
                expected = mixture.members[source][number]["bold"]
                np.testing.assert_allclose(batch.bold[row].float().numpy(), expected, atol=tolerance, rtol=tolerance)
                seen.add(source)
    assert seen == {0, 1}


def test_packed_batches_of_them_are_refused(mixture):
    assert not mixture.shares_mask
    with pytest.raises(SpaceError, match="output='placed'"):
        StreamingLoader(mixture, batch_size=6)
