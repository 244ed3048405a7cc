"""Strategies by name against nilearn's load_confounds on a derivative of fMRIPrep."""

import json

import nibabel
import numpy as np
import pytest
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.signal import clean

from fmristream.errors import UsageError
from fmristream.signal.confounds import parse_strategy, select
from tests.signal.array_runs import ArrayRun, brain_like, made, table_of

OPTIONS = {
    "motion6": {"strategy": ["motion"], "motion": "basic"},
    "motion12": {"strategy": ["motion"], "motion": "derivatives"},
    "motion24": {"strategy": ["motion"], "motion": "full"},
    "motion24+wmcsf": {"strategy": ["motion", "wm_csf"], "motion": "full", "wm_csf": "basic"},
    "motion6+global": {"strategy": ["motion", "global_signal"], "motion": "basic", "global_signal": "basic"},
    "motion6+acompcor5+cosine": {
        "strategy": ["motion", "high_pass", "compcor"], "motion": "basic", "compcor": "anat_combined", "n_compcor": 5,
    },
    "motion6+scrub+steady": {
        "strategy": ["motion", "scrub", "non_steady_state"], "motion": "basic", "scrub": 5, "fd_threshold": 0.5,
        "std_dvars_threshold": 1.5,
    },
    "aroma-aggressive": None,
}  # fmt: skip


@pytest.fixture
def derivative(tmp_path):
    """(path of a bold file beside its confounds, the table)."""
    table = table_of() | {
        f"cosine{number:02d}": np.cos(np.pi / 120 * (np.arange(120) + 0.5) * number) for number in (1, 2)
    }
    name = f"{tmp_path}/sub-1_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 120), dtype=np.float32), np.eye(4)), name)
    rows = ["\t".join(table)]
    rows += [
        "\t".join("n/a" if np.isnan(x) else repr(float(x)) for x in row) for row in np.stack(list(table.values()), 1)
    ]
    (tmp_path / "sub-1_task-rest_desc-confounds_timeseries.tsv").write_text("\n".join(rows))
    about = {
        f"a_comp_cor_{number:02d}": {
            "Method": "aCompCor",
            "Mask": "combined",
            "Retained": True,
            "VarianceExplained": 0.1,
        }
        for number in range(6)
    }
    (tmp_path / "sub-1_task-rest_desc-confounds_timeseries.json").write_text(json.dumps(about))
    return name, table


@pytest.mark.parametrize("strategy", [name for name, options in OPTIONS.items() if options])
def test_columns_and_frames_are_those_of_load_confounds(derivative, strategy):
    name, table = derivative
    theirs, sample_mask = load_confounds(name, demean=False, **OPTIONS[strategy])
    ours = select(parse_strategy(strategy), table, frames=120, where="here")
    assert ours.removed.shape[1] == theirs.shape[1]
    columns = sorted(map(tuple, np.round(theirs.to_numpy().T, 9)))
    np.testing.assert_allclose(sorted(map(tuple, np.round(ours.removed.T, 9))), columns, atol=1e-8)
    # nilearn leaves out the frames before the steady state unasked; here `steady` says so.
    kept = sample_mask if "steady" in strategy else np.arange(120)
    np.testing.assert_array_equal(np.flatnonzero(~ours.is_left_out), kept)


def test_a_cleaned_and_scrubbed_run_is_nilearns_in_the_frames_that_are_left(derivative):
    name, table = derivative
    run = ArrayRun(brain_like("<f8"), table=table)
    confounds, sample_mask = load_confounds(name, **OPTIONS["motion6+scrub+steady"])
    expected = clean(run.bold, detrend=True, standardize=None, confounds=confounds.to_numpy(), sample_mask=sample_mask)
    # nilearn numbers the frames that are left anew before it takes out a line; here a frame keeps its time.
    line = np.stack([np.ones(120), np.arange(120)], 1)[sample_mask]
    design = np.column_stack([line, confounds.to_numpy()[sample_mask]])
    kept = run.bold[sample_mask]
    by_time = kept - design @ np.linalg.lstsq(design, kept, rcond=None)[0]
    ours = made(run, "detrend | confounds:motion6+scrub+steady")[0][sample_mask]
    np.testing.assert_allclose(ours, by_time, atol=2e-3)
    assert np.corrcoef(ours[:, 0], expected[:, 0])[0, 1] > 0.99
    same = clean(run.bold, detrend=False, standardize=None, confounds=confounds.to_numpy(), sample_mask=sample_mask)
    np.testing.assert_allclose(made(run, "confounds:motion6+scrub+steady")[0][sample_mask], same, atol=2e-3)


@pytest.mark.parametrize("seed", range(40))
def test_short_stretches_between_moved_frames_go_as_in_nilearn(seed):
    from nilearn.interfaces.fmriprep.load_confounds_scrub import optimize_scrub

    rng = np.random.default_rng(seed)
    frames = int(rng.integers(8, 60))
    bad = np.flatnonzero(rng.random(frames) < rng.uniform(0.02, 0.4))
    table = {"framewise_displacement": np.full(frames, 0.1), "std_dvars": np.ones(frames)}
    table["framewise_displacement"][bad] = 0.8
    ours = select(parse_strategy("scrub"), table, frames=frames, where="here").is_left_out
    theirs = optimize_scrub(bad, frames, 5) if len(bad) else bad
    np.testing.assert_array_equal(np.flatnonzero(ours), theirs)


def test_aggressive_aroma_takes_the_columns_of_noise():
    table = {"aroma_motion_03": np.arange(9.0), "aroma_motion_11": np.arange(9.0) ** 2}
    found = select(parse_strategy("aroma-aggressive"), table, frames=9, where="here")
    np.testing.assert_array_equal(found.removed, np.stack(list(table.values()), 1))
    with pytest.raises(UsageError, match="use aroma-aggressive"):
        select(parse_strategy("aroma"), table, frames=9, where="here")


def test_an_empty_table_names_what_is_missing():
    with pytest.raises(UsageError, match="here: confounds:global: the table has no column 'global_signal'"):
        select(parse_strategy("global"), {}, frames=9, where="here")
