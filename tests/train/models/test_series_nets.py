"""The plain networks on parcel series are torch's own layers on each sample's true frames, and train in both precisions."""

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import UsageError
from train.models.series_nets import build_lstm, build_mlp, fisher_z

SIZES = {"parcels": 7, "frames": 12, "outputs": 3}
LENGTHS = (12, 5, 2, 9)
BUILDERS = {"mlp": build_mlp, "lstm": build_lstm}
VARIANTS = [
    ("mlp", {"hidden": [16, 8]}),
    ("mlp", {"hidden": [16, 8], "inputs": "series"}),
    ("lstm", {"hidden": 10}),
    ("lstm", {"hidden": 10, "layers": 2, "bidirectional": True, "dropout": 0.2}),
    ("lstm", {"hidden": 10, "cell": "gru", "layers": 2, "bidirectional": True, "pooling": "mean"}),
]
NAMES = ["mlp", "mlp of series", "lstm", "deep lstm both ways", "deep gru both ways, mean"]


def network(name, options, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[name](SIZES | options)


def drawn(batch=4, frames=12):
    return torch.randn(batch, 7, frames, generator=torch.Generator().manual_seed(1))


def train_two_steps(name, options, *, bf16, checkpointing):
    model = network(name, options | {"checkpointing": checkpointing})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(5)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            outputs = model(drawn(), lengths=torch.tensor(LENGTHS))
        assert outputs.dtype == torch.float32
        loss = (outputs - torch.tensor([1.0, -1.0, 0.5])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_two_training_steps_agree_in_both_precisions_with_and_without_checkpointing(name, options):
    exact = train_two_steps(name, options, bf16=False, checkpointing=False)
    assert exact[2] < exact[0]
    assert train_two_steps(name, options, bf16=False, checkpointing=True) == pytest.approx(exact, rel=1e-6)
    rough = train_two_steps(name, options, bf16=True, checkpointing=False)
    assert rough == pytest.approx(exact, rel=0.05)
    assert train_two_steps(name, options, bf16=True, checkpointing=True) == pytest.approx(rough, rel=1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_a_padded_batch_gives_what_each_sample_alone_gives_whatever_the_padding_holds(name, options):
    model, series = network(name, options).eval(), drawn()
    alone = torch.cat([model(series[row : row + 1, :, :length]) for row, length in enumerate(LENGTHS)])
    for filler in (0.0, 1e6, torch.nan):
        padded = series.clone()
        for row, length in enumerate(LENGTHS):
            padded[row, :, length:] = filler
        torch.testing.assert_close(model(padded, lengths=torch.tensor(LENGTHS)), alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(series), alone, atol=1e-3)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_recurrence_is_torchs_on_packed_sequences(cell, pooling, layers, bidirectional):
    options = {"hidden": 6, "cell": cell, "pooling": pooling, "layers": layers, "bidirectional": bidirectional}
    model = network("lstm", options).eval()
    make = nn.LSTM if cell == "lstm" else nn.GRU
    theirs = make(7, 6, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    for way, cells in (("", model.forwards), ("_reverse", model.backwards)):
        for number, ours in enumerate(cells):
            for key, value in ours.state_dict().items():
                getattr(theirs, f"{key.removesuffix('_l0')}_l{number}{way}").data.copy_(value)
    series, lengths = drawn(), torch.tensor(LENGTHS)
    packed = nn.utils.rnn.pack_padded_sequence(series.transpose(1, 2), lengths, batch_first=True, enforce_sorted=False)
    states, last = theirs(packed)
    if pooling == "mean":
        padded, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
        pooled = padded.sum(1) / lengths[:, None]
    else:
        hidden = last[0] if cell == "lstm" else last
        pooled = torch.cat(list(hidden[-2 if bidirectional else -1 :]), dim=1)
    torch.testing.assert_close(model(series, lengths=lengths), model.head(pooled), rtol=1e-5, atol=1e-6)


def test_connectivity_is_numpys_and_constant_parcels_have_none():
    series = drawn(batch=2).double() * 100 + 1e3
    series[1, 2] = 7.0
    found = fisher_z(series, torch.ones(2, 12, dtype=torch.bool)).numpy()
    off = ~np.eye(7, dtype=bool)
    np.testing.assert_allclose(found[0][off], np.arctanh(np.corrcoef(series[0].numpy())[off]), rtol=1e-9)
    assert (found[1, 2] == 0).all()
    assert np.isfinite(found).all()


def test_the_perceptron_is_torchs_sequence_of_layers():
    model = network("mlp", {"hidden": [16, 8]}).eval()
    pairs = np.triu_indices(7, 1)
    series = drawn()
    z = torch.from_numpy(np.stack([np.arctanh(np.corrcoef(row)[pairs]) for row in series.double().numpy()])).float()
    plain = nn.Sequential(model.layers[0], nn.GELU(), model.layers[1], nn.GELU(), model.head)
    torch.testing.assert_close(model(series), plain(z), rtol=1e-4, atol=1e-5)
    flat = network("mlp", {"hidden": [16], "inputs": "series"}).eval()
    plain = nn.Sequential(nn.Flatten(), flat.layers[0], nn.GELU(), flat.head)
    torch.testing.assert_close(flat(series), plain(series), rtol=1e-6, atol=1e-6)


def test_gradients_of_connectivity_are_finite_where_a_parcel_is_constant_or_doubled():
    series = drawn()
    series[:, 1], series[:, 3] = 0.0, series[:, 4]
    series.requires_grad_()
    network("mlp", {})(series).sum().backward()
    assert torch.isfinite(series.grad).all()
    assert series.grad.any()


@pytest.mark.parametrize(("name", "options"), [VARIANTS[0], VARIANTS[3]], ids=["mlp", "lstm"])
def test_compiled_it_is_the_same(name, options):
    """The perceptron as one graph; torch.compile leaves recurrent layers to eager mode."""
    model, series, lengths = network(name, options | {"dropout": 0.0}), drawn(), torch.tensor(LENGTHS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name == "mlp")
    torch.testing.assert_close(compiled(series, lengths=lengths), model(series, lengths=lengths))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mlp", {"hiden": [3]}, "did you mean hidden"),
        ("lstm", {"hidden": [3]}, "hidden must be a whole number"),
        ("mlp", {"hidden": []}, "one width or more"),
        ("mlp", {"inputs": "volumes"}, "connectivity, series"),
        ("lstm", {"cell": "rnn"}, "lstm, gru"),
        ("lstm", {"dropout": 1.0}, r"\[0, 1\)"),
        ("mlp", {"checkpointing": 1}, "true or false"),
        ("mlp", {"parcels": 1}, "no correlations"),
        ("lstm", {"outputs": 0}, "outputs must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        network(name, options)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_missing_options_and_other_series_are_refused(name):
    with pytest.raises(UsageError, match="needs parcels, frames"):
        BUILDERS[name]({})
    for shape in ((2, 6, 12), (2, 7, 13), (2, 7)):
        with pytest.raises(UsageError, match="1 to 12"):
            network(name, {})(torch.zeros(shape))
    assert network(name, {}).takes == "series"
