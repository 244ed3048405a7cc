"""Every network has one finite vector a window, whatever its windows are."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from tests.train.test_tasks import FROM_OTHER_MODULES, SCORED, UNSCORED, without_none
from train.beyond.embed import vectors
from train.beyond.features import features_of
from train.beyond.opened import open_for
from train.beyond.trained import load_trained
from train.launch import World
from train.models.series_nets import build_mlp

EVERY = UNSCORED | SCORED | FROM_OTHER_MODULES
CHOSEN = ["contrast", "contrast-tff", "tff1", "tff2", "masked", "masked-picture", "joint", "series-classes", "l1-tff3"]
CHOSEN += ["mae4d", "mae4d-classes", "cnn_rnn", "mlp", "lstm"]


def test_what_the_head_of_a_plain_network_reads_is_its_vector():
    torch.manual_seed(0)
    model = build_mlp({"parcels": 5, "frames": 9, "outputs": 2, "hidden": [4]}).eval()
    series = torch.randn(3, 5, 9)
    found = features_of(model, series, {})
    assert found.shape == (3, 4)
    assert torch.allclose(model.head(found), model(series), atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("name", CHOSEN)
def test_every_network_has_vectors(parcelled, train_tables, name):
    data, model, objective = EVERY[name]
    tables = {"data": without_none({"url": parcelled, "window": 8, "stride": 8} | data), "model": model}
    run = train_tables(**tables, objective=objective)
    with ExitStack() as stack:
        opened = open_for(load_trained(str(run)), parcelled, split="test", world=World(), stack=stack)
        rows = list(vectors(opened))
    values = np.concatenate([one.values for one in rows])
    assert len(values) == opened.clips.num_windows
    assert values.shape[1] >= 4
    assert np.isfinite(values).all()
    assert np.ptp(values, axis=0).max() > 0
