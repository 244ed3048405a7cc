"""synth:// URLs say a cohort, and a cohort says its URL."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.synth import Cohort, parse_url
from fmristream.synth.courses import MAX_STRENGTH

SIZES = st.integers(1, 200)


@st.composite
def cohorts(draw):
    effect = draw(st.sampled_from(sorted(MAX_STRENGTH)))
    return Cohort(
        subjects=draw(st.integers(1, 10**6)),
        runs=draw(st.integers(1, 9)),
        shape=(draw(SIZES), draw(SIZES), draw(SIZES)),
        frames=draw(st.integers(1, 10**5)),
        tr_s=draw(st.floats(1e-3, 30)),
        voxel_size_mm=draw(st.floats(0.1, 50)),
        seed=draw(st.integers(0, 2**70)),
        effect=effect,
        strength=draw(st.floats(0, MAX_STRENGTH[effect])),
        dtype=draw(st.sampled_from(["int16", "uint16", "int32", "float32", "float64"])),
        masked=draw(st.booleans()),
        kind=draw(st.sampled_from(["bold", "dummy"] if effect == "none" else ["bold"])),
    )


@given(cohorts())
def test_a_cohort_comes_back_from_its_url(cohort):
    assert parse_url(cohort.url()) == cohort
    assert parse_url(cohort.url()).url() == cohort.url()


def test_what_a_url_leaves_out_has_its_default():
    assert parse_url("synth://") == Cohort()
    assert parse_url("synth://?") == Cohort()
    assert Cohort().url() == "synth://"
    url = "synth://?shape=12x14x16&subjects=3&effect=coupling&masked=0&strength=1.20"
    cohort = parse_url(url)
    assert cohort == Cohort(
        shape=(12, 14, 16), subjects=3, effect="coupling", masked=False, strength=1.2, voxel_size_mm=12.0
    )
    assert cohort.url() == "synth://?subjects=3&shape=12x14x16&effect=coupling&strength=1.2&masked=false"


def test_the_voxel_size_follows_the_shape_unless_it_is_given():
    assert parse_url("synth://?shape=96x80x64").voxel_size_mm == 2.0
    assert parse_url("synth://?shape=96x80x64&voxel_size_mm=8").voxel_size_mm == 8.0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("synth://?subject=3", "did you mean subjects"),
        ("synth://?tr=2", "did you mean tr_s"),
        ("synth://?qqqq=2", "known are subjects, runs"),
        ("synth://?subjects=many", "a whole number"),
        ("synth://?shape=24x24", "three sizes"),
        ("synth://?shape=24x24x0", "1 or more"),
        ("synth://?masked=maybe", "true or false"),
        ("synth://?subjects=2&subjects=3", "twice"),
        ("synth://?subjects", "name=value"),
        ("synth://cohort?subjects=2", "expected synth://"),
        ("s3://bucket?subjects=2", "expected synth://"),
        ("synth://?effect=coupling&strength=3", "0 to 1.6"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_by_name(url, words):
    with pytest.raises(UsageError, match=words):
        parse_url(url)
