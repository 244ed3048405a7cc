"""The state of a stream: through JSON and back, and refused with both values where it belongs to another stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import ResumeError
from fmristream.sampling.state import StreamState

STATE = StreamState(
    consumed=40,
    seed=7,
    window=20,
    stride=10,
    windows=1000,
    selection="a" * 64,
    settings={"split": "train", "where": "(age > 60)", "dataset": "c" * 64},
    values={"normalize": "voxel-zscore", "grid": "96 x 96 x 96"},
)
OF_VERSION_2 = {**{name: value for name, value in STATE.as_dict().items() if name != "values"}, "version": 2}
OF_VERSION_1 = {**{name: value for name, value in OF_VERSION_2.items() if name != "settings"}, "version": 1}
SEEDS = st.one_of(st.none(), st.integers(-(2**63), 2**63))


def changed(**values) -> dict:
    return {**STATE.as_dict(), **values}


@given(consumed=st.integers(0, 2**62 - 1), seed=SEEDS, windows=st.integers(1, 2**40))
def test_a_state_survives_json(consumed, seed, windows):
    state = StreamState(consumed=consumed, seed=seed, window=20, stride=3, windows=windows, selection="b" * 64)
    assert StreamState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_a_state_fits_its_own_stream_wherever_that_is():
    STATE.require_same_stream(StreamState.from_dict(changed(consumed=0)))


@pytest.mark.parametrize(
    ("name", "other", "shown"),
    [
        ("window", 16, ("window 20", "16")),
        ("stride", 20, ("stride 10", "20")),
        ("seed", 8, ("seed 7", "8")),
        ("seed", None, ("seed 7", "None")),
        ("windows", 999, ("windows 1000", "999")),
        ("selection", "b" * 64, ("aaaaaaaaaaaa", "bbbbbbbbbbbb")),
        ("settings", {**STATE.settings, "split": "val"}, ("split train", "val")),
        ("settings", {**STATE.settings, "where": "(age > 61)"}, ("where (age > 60)", "(age > 61)")),
        ("settings", {**STATE.settings, "weights": "subject"}, ("weights None", "subject")),
        ("values", {**STATE.values, "normalize": "none"}, ("normalize voxel-zscore", "streams none")),
        ("values", {**STATE.values, "stats": "prefix of 3 frames"}, ("stats None", "prefix of 3 frames")),
        ("values", {"normalize": "voxel-zscore"}, ("grid 96 x 96 x 96", "None")),
    ],
)
def test_a_state_of_another_stream_is_refused_and_both_values_are_named(name, other, shown):
    here = StreamState.from_dict(changed(**{name: other}))
    with pytest.raises(ResumeError) as caught:
        STATE.require_same_stream(here)
    assert all(text in str(caught.value) for text in shown)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"consumed": 3},
        {**STATE.as_dict(), "rank": 0},
        {name: value for name, value in STATE.as_dict().items() if name != "selection"},
        changed(version=4),
        changed(version=2),
        changed(version=1),
        {**OF_VERSION_1, "version": 2},
        {**OF_VERSION_2, "version": 3},
        changed(settings=None),
        changed(values=None),
        changed(values={"normalize": None}),
        changed(settings={"split": 5}),
        changed(version=True),
        changed(version=0),
        changed(consumed=-1),
        changed(consumed="40"),
        changed(consumed=40.0),
        changed(consumed=True),
        changed(consumed=None),
        changed(selection=5),
        changed(selection=None),
        changed(window="20"),
        changed(windows=None),
        changed(seed="7"),
        changed(seed=7.0),
    ],
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ResumeError):
        StreamState.from_dict(state)


def test_another_version_of_a_dataset_is_the_same_stream_while_the_selection_is_the_same():
    other = StreamState.from_dict(changed(settings={**STATE.settings, "dataset": "d" * 64}))
    STATE.require_same_stream(other)


def test_where_the_selection_differs_contents_of_the_datasets_are_named():
    other = StreamState.from_dict(changed(selection="b" * 64, settings={**STATE.settings, "dataset": "d" * 64}))
    with pytest.raises(ResumeError, match=r"dataset content cccccccccccc, this loader streams dddddddddddd"):
        STATE.require_same_stream(other)


def test_a_state_of_the_first_release_is_read_and_fits_by_its_digest():
    old = StreamState.from_dict(OF_VERSION_1)
    old.require_same_stream(STATE)
    with pytest.raises(ResumeError, match="selection of runs"):
        old.require_same_stream(StreamState.from_dict(changed(selection="b" * 64)))


def test_a_state_of_the_second_release_tells_no_values_and_goes_on_with_any():
    old = StreamState.from_dict(OF_VERSION_2)
    old.require_same_stream(StreamState.from_dict(changed(values={"normalize": "none"})))
    with pytest.raises(ResumeError, match="where \\(age > 60\\), this loader streams None"):
        old.require_same_stream(StreamState.from_dict(changed(settings={"split": "train", "dataset": "c" * 64})))


JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([1]))


@given(st.sampled_from(sorted(STATE.as_dict())), JSON_VALUES)
def test_a_state_with_any_one_value_replaced_is_taken_or_refused_but_never_crashes(name, value):
    try:
        StreamState.from_dict(changed(**{name: value})).require_same_stream(STATE)
    except ResumeError:
        return
    assert name == "consumed" or value == STATE.as_dict()[name]
