"""What members of a mixture have to share, so that no row holds another thing than its batch says."""

import numpy as np
import pytest

from fmristream.errors import SpaceError, UsageError
from fmristream.sampling.clip import Clip
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import atlas_of_labels
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from fmristream.stream.mixture import Mixture
from fmristream.stream.window_reader import Scratch
from tests.stream.nifti_runs import converted
from tests.stream.test_normalization import brain_like
from tests.stream.test_side import url as study_url  # noqa: F401


def clips_of(url: str, **options) -> StreamingDataset:
    return StreamingDataset(url, **{"window": 7, "split": "train", "seed": 1, **options})


def test_members_whose_recipes_give_other_values_are_not_packed_together(cohort_url):
    grid = (5, 5, 5)
    members = [clips_of(cohort_url, normalize="pool:2", grid=grid), clips_of(cohort_url, grid=grid)]
    for order in (members, members[::-1]):
        with pytest.raises(SpaceError):
            StreamingLoader(Mixture([(one, 1) for one in order]), batch_size=4)


def test_members_with_other_atlases_of_one_name_are_not_packed_together(cohort_url):
    run = clips_of(cohort_url).runs[0]
    grid = Grid(shape=run.shape, affine=run.affine)
    planes = np.arange(run.shape[0])[:, None, None] + np.zeros(run.shape, dtype=np.int64)
    low, high = (atlas_of_labels(1 + (planes >= cut), grid) for cut in (4, 5))
    one, same, other = (
        clips_of(cohort_url, normalize="parcels:mine", atlases={"mine": atlas}) for atlas in (low, low, high)
    )
    StreamingLoader(Mixture([(one, 1), (same, 1)]), batch_size=4).close()
    with pytest.raises(SpaceError):
        StreamingLoader(Mixture([(one, 1), (other, 1)]), batch_size=4)


def test_a_clip_never_writes_beyond_its_place(cohort_url):
    clips = clips_of(cohort_url)
    for shape in ((1, 7, clips.voxels - 1), (1, 6, clips.voxels), (2, 7, clips.voxels)):
        with pytest.raises(SpaceError, match="do not fit"):
            clips.reader.read(clips.runs[0], Clip(run=0, start=0, length=7), np.empty(shape, np.float32), Scratch())


def test_targets_go_by_name_whatever_their_order(cohort_url):
    members = [clips_of(cohort_url, targets=order) for order in (["age", "sex"], ["sex", "age"])]
    with StreamingLoader(Mixture([(one, 1) for one in members]), batch_size=8) as loader:
        batch = next(iter(loader))
        assert set(batch.source.tolist()) == {0, 1}
        for name in ("age", "sex"):
            known = {target.name: target for target in members[0].targets}[name]
            assert batch.targets[name].tolist() == pytest.approx([known.of(subject) for subject in batch.subject])


def test_side_series_of_other_columns_are_refused(study_url):  # noqa: F811
    members = [
        StreamingDataset(study_url, window=4, seed=1, mix_spaces=True, side=[f"confounds:{column}"])
        for column in ("trans_x", "rot_x")
    ]
    with pytest.raises(UsageError, match="side"):
        Mixture([(one, 1) for one in members], mix_spaces=True)


def test_left_is_not_right_in_some_rows(cohort_url):
    members = [clips_of(cohort_url, orientation=code) for code in ("RAS", "LPI")]
    with pytest.raises(SpaceError, match="left would be right"):
        Mixture([(one, 1) for one in members])


def test_a_value_that_float16_cannot_hold_is_an_error(tmp_path):
    run = brain_like("f4") * 1000
    clips = StreamingDataset(converted(tmp_path, {"1": run}), window=4, normalize="none")
    with StreamingLoader(clips, batch_size=1, dtype="float16") as loader, pytest.raises(UsageError, match="float16"):
        list(loader)
