"""Recipes against scipy, nilearn and numpy in float64."""

from threading import Barrier, Thread

import numpy as np
import pytest
import scipy.fft
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.signal import clean

from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal.confounds import STRATEGIES
from fmristream.signal.recipes import parse_recipe, prepare
from fmristream.signal.steps import ALIASES, step_names
from tests.signal.array_runs import ArrayRun, brain_like, frames_of, made, table_of

MOTION6 = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
MOTION24 = [f"{name}{more}" for name in MOTION6 for more in ("", "_derivative1", "_power2", "_derivative1_power2")]


def matrix(table: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Columns with the first row filled as nilearn does."""
    columns = np.stack([table[name] for name in names], axis=1)
    columns[0] = np.where(np.isnan(columns[0]), columns[1], columns[0])
    return columns


def z(values: np.ndarray) -> np.ndarray:
    sd = values.std(0)
    return np.where(sd > 1e-9, (values - values.mean(0)) / np.where(sd > 1e-9, sd, 1), 0)


def close(ours: np.ndarray, expected: np.ndarray, *, atol: float = 2e-5, rtol: float = 2e-6) -> None:
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours.astype(np.float64), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", ["<i2", "<u2", "<f4", "<f8"])
@pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (-0.5, 30.0)])
def test_detrending_is_scipys(dtype, slope, inter):
    run = ArrayRun(brain_like(dtype), slope=slope, inter=inter)
    expected = scipy.signal.detrend(run.bold, axis=0)
    close(made(run, "detrend")[0], expected, atol=1e-3)
    close(made(run, "detrend | voxel-zscore")[0], z(expected))


@pytest.mark.parametrize(
    ("names", "strategy"), [(MOTION6, "motion6"), (MOTION24, "motion24"), (["white_matter", "csf"], "wmcsf")]
)
@pytest.mark.parametrize("detrend", [True, False])
def test_confounds_are_taken_out_as_nilearns_clean_does(names, strategy, detrend):
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    expected = clean(
        run.bold, detrend=detrend, standardize=None, confounds=matrix(table, names), standardize_confounds=True
    )
    text = f"detrend | confounds:{strategy}" if detrend else f"confounds:{strategy}"
    close(made(run, text)[0], expected, atol=2e-3)
    close(made(run, f"{text} | voxel-zscore")[0], z(expected))
    sample = clean(run.bold, detrend=detrend, standardize="zscore_sample", confounds=matrix(table, names))
    close(np.delete(made(run, f"{text} | voxel-zscore:sample")[0], 3, 1), np.delete(sample, 3, 1))


@pytest.mark.parametrize("first", ["", "detrend | "])
def test_percent_change_is_nilearns(first):
    run = ArrayRun(brain_like("<i2"))
    expected = clean(run.bold, detrend=bool(first), standardize="psc")
    close(made(run, f"{first}percent-change")[0], expected, atol=1e-4)


def test_what_was_detrended_is_detrended_out_of_confounds_too_whatever_comes_first():
    run = ArrayRun(brain_like(), table=table_of())
    close(
        made(run, "confounds:motion24 | detrend | voxel-zscore"),
        made(run, "detrend | confounds:motion24 | voxel-zscore").astype(np.float64),
    )
    close(
        made(run, "detrend | confounds:motion6 | confounds:wmcsf"),
        made(run, "detrend | confounds:motion6+wmcsf").astype(np.float64), atol=1e-3,
    )  # fmt: skip


# nilearn leaves its cosines out where a confound looks like one of them, as motion here does.
@pytest.mark.parametrize("confounds", ["", " | confounds:wmcsf"])
def test_highpass_is_nilearns_cosine_filter(confounds):
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    expected = clean(
        run.bold, detrend=True, standardize=None, filter="cosine", high_pass=0.02, t_r=2.0,
        confounds=matrix(table, ["white_matter", "csf"]) if confounds else None,
    )  # fmt: skip
    close(made(run, f"detrend | highpass:0.02{confounds}")[0], expected, atol=2e-3)


@pytest.mark.parametrize(
    "text", ["bandpass:0.01-0.1", "bandpass:0-0.08", "detrend | bandpass:0.01-0.1", "bandpass:0.01-0.1 | detrend"]
)
def test_bandpass_is_a_projection_on_cosines(text):
    run = ArrayRun(brain_like("<f8"))
    low, high = (0.0, 0.08) if "0-0.08" in text else (0.01, 0.1)
    hz = np.arange(120) / (2 * 120 * 2.0)
    inside = (hz >= low) & (hz <= high) & (hz > 0)
    if "detrend" in text:  # what is out of the band and a line are taken out together
        stop = scipy.fft.idct(np.eye(120), axis=0, norm="ortho")[:, ~inside]
        design = np.column_stack([stop, np.linspace(-1, 1, 120)])
        expected = run.bold - design @ np.linalg.lstsq(design, run.bold, rcond=None)[0]
    else:
        expected = scipy.fft.idct(scipy.fft.dct(run.bold, axis=0, norm="ortho") * inside[:, None], axis=0, norm="ortho")
    close(made(run, text)[0], expected, atol=2e-3)
    close(made(run, f"{text} | voxel-zscore")[0], z(expected))


@pytest.mark.parametrize("text", ["bandpass:0.01-0.1 | confounds:motion24", "confounds:motion24 | bandpass:0.01-0.1"])
def test_a_band_and_confounds_are_taken_out_together(text):
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    hz = np.arange(120) / (2 * 120 * 2.0)
    stop = scipy.fft.idct(np.eye(120), axis=0, norm="ortho")[:, (hz < 0.01) | (hz > 0.1)]
    columns = matrix(table, MOTION24)
    design = np.column_stack([stop, columns / columns.std(0)])
    expected = run.bold - design @ np.linalg.lstsq(design, run.bold, rcond=1e-12)[0]
    close(made(run, text)[0], expected, atol=5e-3)


def test_noise_components_leave_what_they_share_with_signal():
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    every = np.stack([table[f"ica_{number:02d}"] for number in range(6)], axis=1)
    every = every - every.mean(0)
    beta = np.linalg.lstsq(every, run.bold - run.bold.mean(0), rcond=None)[0]
    expected = run.bold - every[:, [1, 4]] @ beta[[1, 4]]
    close(made(run, "confounds:fix")[0], expected, atol=2e-3)
    close(made(run, "confounds:fix | voxel-zscore")[0], z(expected))


def test_hcps_order_takes_motion_out_of_the_components_first():
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    motion = matrix(table, MOTION24)
    motion = np.column_stack([np.ones(120), motion / motion.std(0)])
    every = np.stack([table[f"ica_{number:02d}"] for number in range(6)], axis=1)
    rest, every = (x - motion @ np.linalg.lstsq(motion, x, rcond=1e-12)[0] for x in (run.bold, every))
    beta = np.linalg.lstsq(every, rest, rcond=None)[0]
    expected = run.bold.mean(0) + rest - every[:, [1, 4]] @ beta[[1, 4]]
    close(made(run, "confounds:motion24 | confounds:fix")[0], expected, atol=5e-3)


def test_scrubbed_frames_enter_no_statistic():
    table = table_of()
    run = ArrayRun(brain_like("<f8"), table=table)
    bad = np.isin(np.arange(120), [20, 21, 22, 23, 24, 60, 118, 119])  # 22 and 23 lie between, 119 behind
    design = np.column_stack([np.ones(120), matrix(table, MOTION6)])
    kept = run.bold[~bad]
    rest = run.bold - design @ np.linalg.lstsq(design[~bad], kept, rcond=None)[0]
    expected = np.where(np.arange(40) == 3, 0, rest / np.where(np.arange(40) == 3, 1, rest[~bad].std(0)))
    close(made(run, "confounds:motion6+scrub | voxel-zscore")[0], expected, atol=5e-5)
    np.testing.assert_array_equal(prepare(parse_recipe("confounds:motion6+scrub"), run).kept, ~bad)
    steady = prepare(parse_recipe("skip:3 | confounds:steady"), run).kept
    np.testing.assert_array_equal(steady, np.arange(120) > 0)  # what is skipped is no worse than the rest
    assert prepare(parse_recipe("skip:3 | confounds:motion6"), run).kept is None


def test_collinear_confounds_count_once():
    table = table_of() | {"csf": table_of()["white_matter"] * 3 + 7}
    run = ArrayRun(brain_like("<f8"), table=table)
    expected = clean(run.bold, detrend=True, standardize=None, confounds=table["white_matter"][:, None])
    close(made(run, "detrend | confounds:wmcsf")[0], expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_what_is_missing_counts_as_the_mean_and_becomes_the_fill(dtype):
    stored = brain_like(dtype)
    stored[5, :7] = np.nan
    stored[0, 2] = np.inf
    stored[:, 9] = np.nan
    run = ArrayRun(stored, table=table_of())
    known = np.isfinite(run.bold)
    count = np.maximum(known.sum(0), 1)
    filled = np.where(known, run.bold, np.where(known, run.bold, 0).sum(0) / count)
    design = np.column_stack([np.ones(120), np.linspace(-1, 1, 120), matrix(run.table, MOTION6)])
    rest = filled - design @ np.linalg.lstsq(design, filled, rcond=None)[0]
    close(made(run, "detrend | confounds:motion6")[0], np.where(known, rest, 0), atol=2e-3)
    centred = np.where(known, filled - filled.mean(0), 0)
    sd = np.sqrt((centred**2).sum(0) / np.maximum(count - 1, 1))
    close(made(run, "voxel-zscore:sample")[0], np.where(sd > 0, centred / np.where(sd > 0, sd, 1), 0))


def global_minmax(x: np.ndarray) -> np.ndarray:
    """What is exactly 0 stays."""
    return np.where(x == 0, 0, (x - x.min()) / np.ptp(x))


ORACLES = {
    "voxel-center": lambda x: x - x.mean(0),
    "voxel-minmax": lambda x: np.where(np.ptp(x, 0) > 0, (x - x.min(0)) / np.where(np.ptp(x, 0) > 0, np.ptp(x, 0), 1), 0),
    "voxel-minmax:keep": lambda x: np.where(np.ptp(x, 0) > 0, (x - x.min(0)) / np.where(np.ptp(x, 0) > 0, np.ptp(x, 0), 1), x),
    "run-minmax": lambda x: (x - x.min()) / np.ptp(x),
    "frame-zscore": lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True),
    "frame-center": lambda x: x - x.mean(1, keepdims=True),
    "frame-minmax": lambda x: (x - x.min(1, keepdims=True)) / np.ptp(x, axis=1, keepdims=True),
    "clip:900,1500": lambda x: np.clip(x, 900, 1500),
    "divide:7": lambda x: x / 7,
    "none": lambda x: x,
    "voxel-zscore | clip:1.5": lambda x: np.clip(z(x), -1.5, 1.5),
    "voxel-zscore | frame-zscore": lambda x: ORACLES["frame-zscore"](z(x)),
    "frame-center | voxel-zscore": lambda x: z(ORACLES["frame-center"](x)),
    "clip:900,1500 | voxel-zscore": lambda x: z(np.clip(x, 900, 1500)),
    "clip:900,1500 | run-minmax": lambda x: (np.clip(x, 900, 1500) - 900) / 600,
    "global-zscore | clip:1": lambda x: np.clip((x - x[x != 0].mean()) / x[x != 0].std(ddof=1), -1, 1),
    "voxel-center | global-minmax-zeroback": lambda x: global_minmax(x - x.mean(0)),
}  # fmt: skip


@pytest.mark.parametrize("text", ORACLES)
@pytest.mark.parametrize("dtype", ["<i2", "<f4"])
def test_steps_are_what_they_say(text, dtype):
    run = ArrayRun(brain_like(dtype), slope=0.5, inter=3.0)
    expected = ORACLES[text](run.bold)
    close(made(run, text)[0], expected, atol=1e-4 if "center" in text else 2e-5, rtol=1e-6)
    part = made(run, text, range(30, 60, 3))
    close(part[0], expected[30:60:3], atol=1e-4 if "center" in text else 2e-5, rtol=1e-6)


def test_a_frame_alone_is_what_it_is_in_its_window():
    run = ArrayRun(brain_like(), table=table_of())
    for text in (
        "detrend | confounds:motion24 | voxel-zscore | clip:3",
        "frame-zscore | clip:2",
        "tff",
        "bandpass:0.01-0.1",
    ):
        prepared = prepare(parse_recipe(text), run)
        assert prepared.is_framewise
        whole = made(run, text)
        for frame in (0, 57, 119):
            np.testing.assert_array_equal(made(run, text, range(frame, frame + 1))[:, 0], whole[:, frame])


def test_stored_statistics_spare_reading_the_run_and_the_others_read_it_once():
    for text in ("voxel-zscore", "global-zscore | clip:3", "voxel-center", "percent-change", "frame-zscore"):
        run = ArrayRun(brain_like())
        made(run, text)
        assert run.reads == []
    run = ArrayRun(brain_like(), table=table_of())
    made(run, "detrend | highpass:0.01 | confounds:motion24+wmcsf | voxel-zscore | clip:5")
    assert run.reads == [(0, 120)]


def test_threads_that_want_the_same_run_read_it_once():
    run = ArrayRun(brain_like())
    prepared = prepare(parse_recipe("detrend | voxel-zscore"), run)
    start, found = Barrier(6), []

    def use() -> None:
        out = np.empty((1, 120, 40), dtype=np.float32)
        start.wait()
        prepared(frames_of(run, range(120)), range(120), out)
        found.append(out)

    threads = [Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.reads == [(0, 120)]
    assert all((out == found[0]).all() for out in found)


def test_a_pass_holds_a_bounded_number_of_frames(monkeypatch):
    monkeypatch.setattr("fmristream.signal.heads._BLOCK_BYTES", 8 * 40 * 7)
    run = ArrayRun(brain_like())
    in_blocks = made(run, "detrend | voxel-zscore")
    assert max(stop - start for start, stop in run.reads) <= 7
    monkeypatch.undo()
    np.testing.assert_array_equal(in_blocks, made(run, "detrend | voxel-zscore"))


def test_tff_has_two_channels_and_a_fill_of_each():
    stored = brain_like()
    stored[:, 5] = 0
    stored[7, 6] = 0
    run = ArrayRun(stored)
    x = run.bold
    inside = x != 0
    mean, sd = x[inside].mean(), x[inside].std(ddof=1)
    fill = min(-mean / sd, ((x[inside] - mean) / sd).min())
    out = made(run, "tff")
    close(out[0], np.where(inside, (x - mean) / sd, fill))
    spread = x.std(0, ddof=1)
    close(out[1], np.where(inside & (spread > 0), (x - x.mean(0)) / np.where(spread > 0, spread, 1), 0))
    np.testing.assert_allclose(prepare(parse_recipe("tff"), run).fill, [fill, 0], rtol=1e-6)
    np.testing.assert_allclose(prepare(parse_recipe("tff | clip:2"), run).fill, [-2, 0])
    out = made(run, "skip:10 | tff")
    part = x[10:]
    mean, sd = part[part != 0].mean(), part[part != 0].std(ddof=1)
    close(out[0, 10:], np.where(inside[10:], (part - mean) / sd, -mean / sd))


@pytest.mark.parametrize("text", ["voxel-zscore", "none"])
@pytest.mark.parametrize("slope", [2.0, -0.5])
def test_an_affine_recipe_says_so(text, slope):
    run = ArrayRun(brain_like(), slope=slope, inter=5.0)
    scale, offset = prepare(parse_recipe(text), run, exact=True).affine
    residual = (run.stored - run.reference).astype(np.float32)
    close(residual * scale + offset, made(run, text)[0].astype(np.float64), atol=1e-5, rtol=1e-5)
    for other in ("global-zscore", "voxel-zscore | clip:5", "detrend", "frame-zscore"):
        assert prepare(parse_recipe(other), run).affine is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("voxel-zscor", "did you mean 'voxel-zscore'.*use one of none, voxel-zscore"),
        ("voxel-zscore:5", "expected 'voxel-zscore:sample'"),
        ("detrend:2", "takes no argument"),
        ("detrend | ", "a step is empty"),
        ("detrend || voxel-zscore", "a step is empty"),
        ("clip", "is no number"),
        ("clip:-1", "above 0"),
        ("clip:3,2", "two rising ones"),
        ("bandpass:0.1", "two frequencies"),
        ("bandpass:0.1-0.01", "the lower frequency first"),
        ("highpass:nan", "is no number"),
        ("confounds:motion", "no strategy 'motion'; there are motion6"),
        ("confounds:motion6+motion24", "comes twice"),
        ("confounds:fix+motion6", "a step of their own"),
        ("skip:3", "no step makes anything"),
        ("voxel-zscore | skip:3", "move it to the front"),
        ("tff | voxel-zscore", "takes one channel, tff gives two"),
        ("pool:1", "whole number of 2 or more"),
        ("crop:1:2,3", "slices of three axes"),
        ("cohort-zscore", "needs statistics of kind 'moments' fitted to the training runs after 'none', given were: none"),
        ("brainlm-robust", "after 'voxel-center'"),
        ("divide:0", "above 0"),
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused_by_what_is_wrong(text, said):
    with pytest.raises(UsageError, match=said):
        parse_recipe(text)


def test_names_are_unique_and_every_published_name_resolves():
    assert len(step_names()) == len(set(step_names()))
    for name, steps in ALIASES.items():
        if "cohort" not in steps:
            assert parse_recipe(name).text == steps
    assert len(STRATEGIES) == len(set(STRATEGIES))


@pytest.mark.parametrize(
    ("text", "table", "said"),
    [
        ("confounds:motion6", None, "the run has no table"),
        ("confounds:motion6", {"trans_x": np.zeros(120)}, "no column 'trans_y'; it has trans_x"),
        ("confounds:acompcor9", table_of(), "6 columns a_comp_cor_"),
        ("confounds:aroma", table_of(), "needs the courses of all components"),
        ("confounds:wmcsf", table_of() | {"csf": np.full(120, np.nan)}, "'csf' has no value in some frames"),
        ("confounds:scrub", {"framewise_displacement": np.zeros(120)}, "no column 'std_dvars'"),
        ("bandpass:0.3-0.5", table_of(), "no frequency"),
        ("confounds:scrub | bandpass:0.01-0.1", table_of(), "needs every frame"),
        ("skip:120 | detrend", None, "no frame is left"),
        ("skip:110 | confounds:motion24", table_of(), "10 frames may be used to fit"),
    ],
)
def test_a_run_that_lacks_what_a_recipe_needs_is_refused_by_name(text, table, said):
    with pytest.raises(UsageError, match=said):
        made(ArrayRun(brain_like(), table=table), text)
    with pytest.raises(UsageError, match=r"sub-1_bold|bandpass"):
        made(ArrayRun(brain_like(), table=table), text)


def test_a_filter_needs_the_time_between_frames():
    with pytest.raises(UsageError, match="tr_s"):
        made(ArrayRun(brain_like(), tr_s=None), "highpass:0.01")


def test_a_run_without_spread_is_refused():
    with pytest.raises(CorruptDataError, match="no spread"):
        made(ArrayRun(np.full((9, 4), 7, "<i2")), "clip:1,10 | run-minmax")


FORECASTS = [
    "voxel-zscore", "detrend | voxel-zscore | clip:4", "detrend | confounds:motion6 | voxel-zscore", "percent-change",
    "global-zscore-zeroback", "global-minmax-zeroback", "run-minmax", "voxel-minmax", "highpass:0.02 | voxel-zscore",
    "frame-zscore | voxel-zscore", "voxel-center | divide:3", "frame-zscore", "skip:5 | voxel-zscore:sample",
]  # fmt: skip


@pytest.mark.parametrize("stats", ["prefix", "context"])
@pytest.mark.parametrize("text", FORECASTS)
@settings(max_examples=4)
@given(start=st.integers(0, 60), step=st.integers(1, 2), seed=st.integers(0, 99))
def test_no_statistic_sees_the_future(stats, text, start, step, seed):
    frames = range(start, start + 28 * step, step)
    last = frames[15]  # of a context of 16
    stored = brain_like("<f4" if seed % 2 else "<i2", seed=seed)
    other = stored.copy()
    other[last + 1 :] = np.random.default_rng(seed + 1).uniform(0, 4000, other[last + 1 :].shape).astype(other.dtype)
    table, later = table_of(), table_of()
    for column in later.values():
        column[last + 1 :] = column[last + 1 :] * 3 + 1
    options = {"stats": stats, "context": 16}
    ours = made(ArrayRun(stored, table=table), text, frames, **options)
    theirs = made(ArrayRun(other, table=later), text, frames, **options)
    np.testing.assert_array_equal(ours[:, :16], theirs[:, :16])
    # Also frames beyond: each by itself, under the statistics of the past.
    changed = other.copy()
    changed[last + 2 :] = stored[last + 2 :]
    if step == 1:
        np.testing.assert_array_equal(
            made(ArrayRun(changed, table=later), text, frames, **options)[:, 16], theirs[:, 16]
        )


@pytest.mark.parametrize("stats", ["prefix", "context"])
def test_the_past_gives_the_statistics(stats):
    run = ArrayRun(brain_like())
    past = run.bold[40:56] if stats == "context" else run.bold[:56]
    moves = past.std(0) > 0
    expected = np.where(moves, (run.bold[40:70] - past.mean(0)) / np.where(moves, past.std(0), 1), 0)
    close(made(run, "voxel-zscore", range(40, 70), stats=stats, context=16)[0], expected)
    assert (max(stop for _, stop in run.reads) if run.reads else 0) == (56 if stats == "prefix" else 0)


def test_a_clip_has_the_same_bits_whichever_came_before_it():
    run = ArrayRun(brain_like("<f4"))
    prepared = prepare(parse_recipe("detrend | voxel-zscore", stats="prefix", context=8), run)
    found = {}
    for start in (50, 10, 50, 90, 30, 70, 10, 50):
        out = np.empty((1, 20, 40), dtype=np.float32)
        prepared(frames_of(run, range(start, start + 20)), range(start, start + 20), out)
        np.testing.assert_array_equal(found.setdefault(start, out), out)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("global-zscore", "its background is a statistic"),
        ("tff", "its background is a statistic"),
        ("confounds:acompcor5", "computed from the whole run"),
        ("confounds:fix", "computed from the whole run"),
        ("confounds:motion6+scrub", "neighbours on both sides"),
        ("bandpass:0.01-0.1", "use highpass"),
    ],
)
@pytest.mark.parametrize("stats", ["prefix", "context"])
def test_what_knows_the_whole_run_by_nature_is_refused_for_forecasts(text, said, stats):
    with pytest.raises(UsageError, match=said):
        parse_recipe(text, stats=stats, context=5)


@pytest.mark.parametrize(
    "options", [{"stats": "future"}, {"stats": "prefix"}, {"context": 5}, {"stats": "context", "context": 0}]
)
def test_statistics_of_a_clip_need_a_context_and_only_they(options):
    with pytest.raises(UsageError, match="stats="):
        parse_recipe("voxel-zscore", **options)
