"""A stream that goes on hands out the values that it handed out before, or says what differs; the order alone is not enough."""

import json

import numpy as np
import pytest

import fmristream
from fmristream import Mixture, StreamingDataset, StreamingLoader
from fmristream.errors import ResumeError
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import Atlas, atlas_of_labels

BATCH = 6


def clips_of(url: str, **options) -> StreamingDataset:
    return StreamingDataset(url, **{"window": 7, "split": "train", "seed": 11, **options})


def state_of(clips) -> dict:
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        next(iter(loader))
        return json.loads(json.dumps(loader.state_dict()))


def position_after(clips, state: dict) -> int:
    """Where a stream of these clips goes on with a state."""
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        loader.load_state_dict(state)
        return next(iter(loader)).position


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"normalize": "global-zscore"}, ("normalize voxel-zscore", "streams global-zscore")),
        ({"normalize": "voxel-zscore | clip:5"}, ("normalize voxel-zscore,", "streams voxel-zscore | clip:5")),
        ({"stats": "prefix", "context": 3}, ("stats None", "prefix of 3 frames")),
        ({"stats": "context", "context": 4}, ("stats None", "context of 4 frames")),
        ({"exact": True}, ("exact None", "yes")),
        ({"grid": (8, 8, 8)}, ("grid 9 x 10 x 7", "8 x 8 x 8")),
        ({"orientation": "LPI"}, ("orientation ", "streams LPI")),
    ],
)
def test_a_state_of_other_values_is_refused_with_both_of_them(cohort_url, changes, shown):
    state = state_of(clips_of(cohort_url))
    with pytest.raises(ResumeError) as caught:
        position_after(clips_of(cohort_url, **changes), state)
    assert all(text in str(caught.value) for text in shown)


def test_what_is_only_written_in_another_way_goes_on(cohort_url):
    plain = clips_of(cohort_url, normalize="voxel-zscore | clip:5")
    same = clips_of(
        cohort_url, normalize="voxel-zscore|clip:5.0", grid=plain.grid, orientation=plain.orientation, targets=("sex",)
    )
    assert position_after(same, state_of(plain)) == BATCH


def test_a_published_name_is_the_steps_that_it_stands_for(cohort_url):
    state = state_of(clips_of(cohort_url, normalize="brainlm-subtract-mean"))
    assert position_after(clips_of(cohort_url, normalize="voxel-center"), state) == BATCH


def test_statistics_fitted_anew_are_other_values(cohort_url):
    train = clips_of(cohort_url, normalize="none", seed=None)
    # The first fits the whole run, the second its beginning, the third is the first one under another name.
    fits = [
        fmristream.fit(train, "cohort-zscore", first_frames=frames, name=name)
        for frames, name in ((None, "one"), (9, "one"), (None, "two"))
    ]
    one, beginning, renamed = (clips_of(cohort_url, normalize="cohort-zscore", fitted=[fitted]) for fitted in fits)
    state = state_of(one)
    with pytest.raises(ResumeError, match=r"made with fitted [0-9a-f]{16}, this loader streams [0-9a-f]{16}"):
        position_after(beginning, state)
    assert position_after(renamed, state) == BATCH


def atlas_on(clips: StreamingDataset, *, cut: int) -> Atlas:
    """Two parcels that meet at a plane."""
    run = clips.runs[0]
    labels = np.ones(run.shape, dtype=np.int64)
    labels[cut:] = 2
    return atlas_of_labels(labels, Grid(shape=run.shape, affine=run.affine))


def test_another_atlas_of_the_same_name_gives_other_values(cohort_url):
    plain = clips_of(cohort_url)
    one, other = (
        clips_of(cohort_url, normalize="parcels:mine", atlases={"mine": atlas_on(plain, cut=cut)}) for cut in (4, 5)
    )
    with pytest.raises(ResumeError, match=r"made with atlases [0-9a-f]{16}, this loader streams [0-9a-f]{16}"):
        position_after(other, state_of(one))


def test_members_of_a_mixture_are_held_to_their_own_values(cohort_url):
    def mixture(normalize: str) -> Mixture:
        return Mixture([(clips_of(cohort_url), 1), (clips_of(cohort_url, split="val", normalize=normalize), 1)])

    state = state_of(mixture("voxel-zscore"))
    assert position_after(mixture("voxel-zscore"), state) == BATCH
    with pytest.raises(ResumeError, match=r"normalize of member 1 voxel-zscore, this loader streams none"):
        position_after(mixture("none"), state)


def test_a_state_that_was_written_before_values_were_told_goes_on(cohort_url):
    state = state_of(clips_of(cohort_url))
    del state["values"]
    state["version"] = 2
    assert position_after(clips_of(cohort_url, normalize="none"), state) == BATCH
    with pytest.raises(ResumeError, match="where None"):
        position_after(clips_of(cohort_url, where="age > 30"), state)
