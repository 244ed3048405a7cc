"""The network for other people's code gives what the tasks give, and refuses what it can see to be other data."""

from contextlib import ExitStack

import numpy as np
import pytest

from fmristream.errors import SpaceError, UsageError
from train.beyond.api import load
from train.beyond.features import features_of
from train.beyond.opened import open_for
from train.beyond.predict import score_windows
from train.beyond.streaming import in_order
from train.beyond.trained import load_trained
from train.launch import World


def test_arrays_give_the_vectors_and_scores_of_the_tasks(trained_sex, cohort):
    network = load(trained_sex)
    assert (network.normalize, network.targets) == ("voxel-zscore", ("score_sex",))
    with ExitStack() as stack:
        opened = open_for(load_trained(str(trained_sex)), cohort, split="val", world=World(), stack=stack)
        scores = score_windows(opened).score[:5]
        rows = next(in_order(opened, lambda batch: features_of(opened.model, batch.bold, {}))).values
        bold = np.concatenate([opened.clips[0]["bold"][0], opened.clips[1]["bold"][0][..., 1:]], axis=-1)
        bold = np.concatenate([bold, *(opened.clips[number]["bold"][0][..., 1:] for number in (2, 3, 4))], axis=-1)
        affine = opened.clips.affine
    assert bold.shape == (12, 12, 12, 36)
    assert np.allclose(network.predict(bold, tr_s=2.0, affine=affine), scores, atol=1e-5)
    assert np.allclose(network.embed(bold)[: len(rows)], rows[:5], atol=1e-5)


def test_what_can_be_seen_to_differ_is_refused(trained_sex):
    network = load(trained_sex)
    bold = np.zeros((12, 12, 12, 16))
    affine = np.diag([16.0, 16.0, 16.0, 1.0])
    with pytest.raises(SpaceError, match=r"TR is 0\.72 s"):
        network.embed(bold, tr_s=0.72)
    with pytest.raises(SpaceError, match="bring the run onto that"):
        network.embed(bold[:11])
    with pytest.raises(SpaceError, match=r"voxels of|axes run to"):
        network.embed(bold, affine=affine * [[-1.01], [1.2], [1], [1]])
    with pytest.raises(UsageError, match="spans 8"):
        network.embed(bold[..., :7])
    with pytest.raises(UsageError, match="not finite"):
        network.embed(np.full((12, 12, 12, 16), np.nan))
