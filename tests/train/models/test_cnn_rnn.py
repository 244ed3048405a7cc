"""The CNN-RNN is what its parts are by torch's own layers, knows nothing of padding, and says what it cannot take."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fmristream.errors import UsageError
from train.models.cnn_rnn import CnnRnn, FrameBlock, Readout, build_cnn_rnn, load_lower_layers
from train.models.cnn_rnn_config import cnn_rnn_config
from train.models.load import WeightsError
from train.models.tff import build_tff
from train.order_ablation import reversed_frames, shuffled_frames

GRID = (9, 8, 7)
SMALL = {
    "img_size": [*GRID, 6],
    "channels": [8, 16],
    "norm_groups": 4,
    "hidden": 12,
    "fusion": 5,
    "frame_chunk": 4,
}
SMALL_TFF = {
    "img_size": [*GRID, 6],
    "in_chans": 2,
    "encoder": "tff",
    "hidden": 12,
    "frame_vec": 10,
    "frame_chunk": 4,
    "dropout_green": 0.0,
}
FUSED = {"side": 2, "columns": [0, 3, 0]}
LENGTHS = torch.tensor([4, 6, 1])
VARIANTS = {
    "gru": {},
    "lstm, two layers": {"rnn": "lstm", "layers": 2, "dropout": 0.2},
    "attention, fused": {"readout": "attention", **FUSED},
    "batch norm": {"norm": "batch"},
    "sync batch norm": {"norm": "sync_batch"},
    "no order": {"rnn": "none", "readout": "mean", **FUSED},
}


def network(seed=0, **options):
    torch.manual_seed(seed)
    base = SMALL_TFF if options.get("encoder") == "tff" else SMALL
    return build_cnn_rnn(base | options)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_bold(batch=3, channels=1, frames=6):
    return noise(batch, channels, *GRID, frames)


def others(batch=3, frames=6):
    """Side series and columns with gaps."""
    side, columns = noise(batch, frames, 2, seed=1), noise(batch, 3, seed=2)
    side[0, 1, 0], columns[1, 2] = torch.nan, torch.nan
    columns[:, 1] = torch.arange(batch) % 3
    return {"side": side, "columns": columns}


def inputs_of(model, **sizes):
    given = others(**sizes)
    return {name: given[name] for name in ("side", "columns") if getattr(model.config, name)}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_frames_vector_is_what_torchs_layers_make_of_the_frame(norm):
    cnn = network(norm=norm).cnn
    layers = []
    for width, block in zip((1, 8), cnn.blocks, strict=True):
        out = 2 * max(width, 4)
        own = nn.GroupNorm(4, out) if norm == "group" else nn.BatchNorm3d(out)
        layers += [nn.Conv3d(width, out, 3, padding=1, bias=False), own, nn.ReLU(), nn.MaxPool3d(2, ceil_mode=True)]
        nn.init.normal_(block.norm.weight)
        nn.init.normal_(block.norm.bias)
        layers[-4].load_state_dict(block.conv.state_dict())
        layers[-3].load_state_dict(block.norm.state_dict())
    oracle = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())
    frames = noise(5, 1, *GRID)
    torch.testing.assert_close(cnn(frames), oracle(frames))
    assert oracle[:-2](frames).shape == (5, 16, 3, 2, 2)


@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_states_are_those_of_packed_sequences(rnn):
    model, bold = network(rnn=rnn, layers=2), small_bold()
    vectors = torch.stack([model.cnn(bold[..., frame]) for frame in range(6)], dim=1)
    packed = pack_padded_sequence(vectors, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(model.rnn(packed)[0], batch_first=True, total_length=6)
    states = model.features(bold, lengths=LENGTHS)
    assert states.shape == (3, 6, model.num_features)
    torch.testing.assert_close(states, expected)


def test_a_gru_is_its_equations_in_float64():
    model = network().eval()
    bold = small_bold(batch=1)
    vectors = torch.stack([model.cnn(bold[..., frame])[0] for frame in range(6)]).double().detach().numpy()
    weights = {name: value.double().numpy() for name, value in model.rnn.state_dict().items()}
    state, states = np.zeros(12), []
    for vector in vectors:
        came, was = (
            (weights[f"weight_{part}_l0"] @ x + weights[f"bias_{part}_l0"]).reshape(3, 12)
            for part, x in (("ih", vector), ("hh", state))
        )
        reset, update = 1 / (1 + np.exp(-(came[:2] + was[:2])))
        state = (1 - update) * np.tanh(came[2] + reset * was[2]) + update * state
        states.append(state)
    summary = np.concatenate([states[-1], np.mean(states, axis=0)])
    expected = summary @ model.head.weight.double().detach().numpy().T + model.head.bias.double().detach().numpy()
    torch.testing.assert_close(model(bold)[0].double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_readouts_are_worked_out_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 1.0], [6.0, 2.0]]])
    lengths = torch.tensor([2, 3])
    last, mean = [[3.0, 6.0], [6.0, 2.0]], [[2.0, 4.0], [3.0, 1.0]]
    assert Readout("last", 2)(states, lengths).tolist() == last
    assert Readout("mean", 2)(states, lengths).tolist() == mean
    assert Readout("last+mean", 2)(states, lengths).tolist() == [a + b for a, b in zip(last, mean, strict=True)]
    attention = Readout("attention", 2)
    for row, length, found in zip(states, lengths, attention(states, lengths), strict=True):
        weights = attention.score(row[:length]).softmax(0)
        torch.testing.assert_close(found, (weights * row[:length]).sum(0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rubbish", [torch.nan, 1e30])
def test_padded_frames_change_nothing(variant, rubbish):
    model, bold = network(**VARIANTS[variant], seed=3), small_bold()
    given = inputs_of(model)
    filled, filled_given = bold.clone(), {name: values.clone() for name, values in given.items()}
    for row, length in enumerate(LENGTHS):
        filled[row, ..., length:] = rubbish
        if "side" in given:
            filled_given["side"][row, length:] = rubbish
    found = []
    for inputs, more in ((bold, given), (filled, filled_given)):
        torch.manual_seed(7)  # of dropout
        model.zero_grad()
        out = model(inputs, lengths=LENGTHS, **more)
        out.square().sum().backward()
        found.append([out, *(parameter.grad.clone() for parameter in model.parameters())])
    assert found[1][0].isfinite().all()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_in_a_padded_batch_gives_what_it_gives_alone(variant):
    model, bold = network(**VARIANTS[variant]).eval(), small_bold()
    given = inputs_of(model)
    together = model(bold, lengths=LENGTHS, **given)
    for row, length in enumerate(LENGTHS):
        cut = {"side": slice(None, length), "columns": slice(None)}
        alone = {name: values[row, cut[name]][None] for name, values in given.items()}
        torch.testing.assert_close(model(bold[row : row + 1, ..., :length], **alone)[0], together[row])


def test_full_lengths_are_no_lengths():
    model, bold = network(), small_bold()
    torch.testing.assert_close(model(bold, lengths=torch.full((3,), 6)), model(bold))


def test_batch_statistics_are_of_true_frames_alone_and_of_all_of_them():
    model, bold = network(norm="batch", frame_chunk=2), small_bold()
    model(bold, lengths=LENGTHS)
    frames = torch.cat([bold[row, ..., :length].movedim(-1, 0) for row, length in enumerate(LENGTHS)])
    maps = model.cnn.blocks[0].conv(frames)
    norm = model.cnn.blocks[0].norm
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean((0, 2, 3, 4)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * maps.var((0, 2, 3, 4)))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_number_of_frames_at_once_does_not_matter(norm):
    for training in (True, False):
        expected = network(norm=norm, frame_chunk=0).train(training)(small_bold())
        for frame_chunk in (1, 4, 100):
            model = network(norm=norm, frame_chunk=frame_chunk).train(training)
            torch.testing.assert_close(model(small_bold()), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    model = network(**VARIANTS[variant])
    model(small_bold(), lengths=LENGTHS, **inputs_of(model)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def two_steps(*, bf16, **options):
    """The losses of two steps and of a third, and the first step's gradients."""
    model = network(**options)
    bold, given, target = small_bold(channels=model.config.in_chans), inputs_of(model), torch.tensor([0.3, -1.0, 2.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], []
    torch.manual_seed(1)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = model(bold, lengths=LENGTHS, **given)
        assert out.dtype == torch.float32
        loss = F.smooth_l1_loss(out.squeeze(1), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        gradients = gradients or [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("variant", [*VARIANTS, "tff"])
def test_two_steps_are_the_same_with_and_without_checkpointing_and_near_in_bfloat16(variant):
    options = {"encoder": "tff", "dropout_green": 0.2} if variant == "tff" else VARIANTS[variant]
    exact, gradients = two_steps(bf16=False, **options)
    again, recomputed = two_steps(bf16=False, checkpointing=True, **options)
    assert again == pytest.approx(exact, rel=1e-6)
    for one, other in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    rough, _ = two_steps(bf16=True, **options)
    # Statistics from chunks round to bfloat16 later than torch's whole batch norm does.
    tolerance = 5e-3 if "batch" in variant else 1e-5
    assert two_steps(bf16=True, checkpointing=True, **options)[0] == pytest.approx(rough, rel=tolerance)
    assert rough == pytest.approx(exact, rel=0.05, abs=0.02)
    assert exact[2] != exact[0]


@pytest.mark.parametrize("frame_chunk", [1, 4, 11])
def test_batch_statistics_from_chunks_are_those_of_all_frames(frame_chunk):
    bold = 20 + small_bold()  # digits of a variance would be lost far from zero
    found = []
    for options in ({}, {"checkpointing": True, "frame_chunk": frame_chunk}):
        model = network(norm="batch", **options)
        out = model(bold, lengths=LENGTHS)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters()), *(b.clone().double() for b in model.buffers())])
        found[-1].append(model.eval()(bold, lengths=LENGTHS))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_checkpointing_keeps_less(norm):
    def kept(**options):
        model, sizes = network(norm=norm, **options), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(small_bold(frames=24))
        return sum(sizes)

    assert kept(checkpointing=True) < kept() / 4


def test_a_block_compiles_whole():
    config = cnn_rnn_config(SMALL)
    torch.manual_seed(0)
    module, x = FrameBlock(1, 8, config), noise(4, 1, *GRID)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    gradients = []
    for running in (module, compiled):
        module.zero_grad()
        running(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_the_sizes_are_those_of_the_plan():
    with torch.device("meta"):
        age = build_cnn_rnn({"img_size": [48, 56, 48, 150], "in_chans": 2})
        tff = build_cnn_rnn({"img_size": [75, 93, 81, 150], "in_chans": 2, "encoder": "tff"})
    convolutions = 27 * (2 * 16 + 16 * 32 + 32 * 64 + 64 * 128)
    assert sum(p.numel() for p in age.cnn.parameters()) == convolutions + 2 * (16 + 32 + 64 + 128)
    assert {name: tuple(p.shape) for name, p in age.named_parameters() if not name.startswith("cnn.")} == {
        "rnn.weight_ih_l0": (384, 128),
        "rnn.weight_hh_l0": (384, 128),
        "rnn.bias_ih_l0": (384,),
        "rnn.bias_hh_l0": (384,),
        "head.weight": (1, 256),
        "head.bias": (1,),
    }
    assert tff.cnn.width == 2640


def test_without_a_recurrence_the_order_of_frames_is_unknown_and_with_one_it_is_not():
    bold, keys = small_bold(), [1, 2, 3]
    for rnn, knows_order in (("none", False), ("gru", True), ("lstm", True)):
        for readout in ("mean", "attention"):
            model = network(rnn=rnn, readout=readout).eval()
            expected = model(bold, lengths=LENGTHS)
            for changed in (reversed_frames(bold, lengths=LENGTHS), shuffled_frames(bold, keys, lengths=LENGTHS)):
                difference = (model(changed, lengths=LENGTHS) - expected).abs().flatten()
                assert difference[:2].max() > 1e-4 if knows_order else difference.max() < 1e-6
                assert difference[2] == 0  # one true frame


@pytest.mark.parametrize(("intermediate_vec", "tables"), [(0, {}), (24, {"intermediate_vec": 24})])
@pytest.mark.parametrize("phase", ["tff1", "tff3"])
def test_lower_layers_begin_with_those_of_a_tff(intermediate_vec, tables, phase):
    flat = 2 * 2 * 1 * 1
    sizes = {"img_size": [*GRID, 6], "intermediate_vec": intermediate_vec or flat, "num_attention_heads": 4}
    torch.manual_seed(5)
    trained = build_tff(phase, sizes | {"bert_intermediate_size": 8}).eval()
    model = network(encoder="tff", **tables).eval()
    bold = small_bold(channels=2)
    loaded = load_lower_layers(model, trained.state_dict(), source="phase1")
    vectors = torch.stack([model.cnn(bold[..., frame]) for frame in range(6)], dim=1)
    torch.testing.assert_close(vectors, trained.encode(bold))
    assert loaded.tensors == len(model.cnn.state_dict())
    assert set(loaded.ignored) == set(trained.state_dict()) - set(model.cnn.state_dict())
    assert model(bold, lengths=LENGTHS).shape == (3, 1)


def test_lower_layers_of_another_cnn_rnn_are_taken_whatever_is_above_them():
    trained, model = network(seed=1, rnn="lstm", **FUSED), network(seed=2)
    head = model.head.weight.clone()
    wrapped = {f"module.{name}": value for name, value in trained.state_dict().items()}
    load_lower_layers(model, wrapped, source="trained")
    assert all(torch.equal(a, b) for a, b in zip(model.cnn.parameters(), trained.cnn.parameters(), strict=True))
    assert torch.equal(model.head.weight, head)


def test_lower_layers_that_do_not_fit_are_refused_and_change_nothing():
    model, tff = network(), network(encoder="tff")
    before = {name: value.clone() for name, value in (model.state_dict() | tff.state_dict()).items()}
    wide = network(channels=[8, 24]).state_dict()
    for target, weights in (
        (model, wide),
        (model, tff.state_dict()),
        (model, model.state_dict() | {"stem.weight": torch.zeros(1)}),
        (tff, model.state_dict()),
        (tff, build_tff("tff1", {"img_size": [*GRID, 6], "intermediate_vec": 16}).state_dict()),
    ):
        with pytest.raises(WeightsError, match=r"trained: \d+ names do not fit"):
            load_lower_layers(target, weights, source="trained")
    after = model.state_dict() | tff.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"encoder": "tff", "dropout_green": 0.5}])
def test_frozen_lower_layers_stay_as_they_are(options):
    model = network(freeze_cnn=True, checkpointing=True, **options)
    bold = small_bold(channels=model.config.in_chans)
    before = {name: value.clone() for name, value in model.cnn.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    first = model(bold)
    assert torch.equal(first, model(bold))  # no dropout, no batch statistics
    model.train()
    first.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.cnn.state_dict().items())
    assert all(parameter.grad is None for parameter in model.cnn.parameters())
    assert not torch.equal(model(bold), first)


def test_the_gradient_reaches_the_bold_also_through_chunks_and_padding():
    model = network(checkpointing=True, freeze_cnn=True)
    bold = small_bold().requires_grad_()
    model(bold, lengths=LENGTHS).sum().backward()
    reached = bold.grad.abs().amax((1, 2, 3, 4)) > 0
    assert torch.equal(reached, torch.arange(6) < LENGTHS[:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": [9, 8, 7]}, "img_size must be a list of 4 whole numbers"),
        ({"channels": []}, "channels must be a list of whole numbers above 0"),
        ({"channels": 8}, "channels must be a list of whole numbers above 0, one for a block, got 8"),
        ({"channels": [8, 18]}, "norm_groups 4 does not divide channels 18"),
        ({"channels": [8] * 5}, "one voxel after 4 halvings"),
        ({"outputs": 0}, "outputs must be a whole number above 0, got 0"),
        ({"hidden": True}, "hidden must be a whole number above 0, got True"),
        ({"side": -1}, "side must be a whole number, 0 or more, got -1"),
        ({"columns": [0, 1]}, r"columns must be a list with 0 for a number and n, 2 or more.*got \(0, 1\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"checkpointing": 1}, "checkpointing must be true or false"),
        ({"checkpointing": True, "frame_chunk": 0}, "give frame_chunk too"),
        ({"norm": "layer"}, "norm must be one of group, batch, sync_batch, got 'layer'"),
        ({"rnn": "rnn"}, "rnn must be one of gru, lstm, none"),
        ({"rnn": "none"}, r"readout = 'last\+mean' makes no sense"),
        ({"encoder": "vit"}, "encoder must be one of own, tff"),
        ({"frame_vec": 12}, "frame_vec mean nothing to encoder = 'own'"),
        ({"encoder": "tff"}, "channels, norm_groups mean nothing to encoder = 'tff'"),
        ({"hiden": 12}, r"cnn_rnn has no option hiden; did you mean hidden\?"),
        ({"window": 12}, "cnn_rnn has no option window; known: img_size"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(UsageError, match=message):
        build_cnn_rnn(SMALL | change)


def test_a_config_without_a_size_is_refused():
    with pytest.raises(UsageError, match="cnn_rnn needs img_size"):
        build_cnn_rnn({})


@pytest.mark.parametrize(
    "shape", [(2, 2, *GRID, 6), (2, 1, 8, 9, 7, 6), (2, 1, *GRID, 0), (0, 1, *GRID, 6), (1, *GRID, 6)]
)
def test_bold_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match=r"expected \(batch, 1, 9, 8, 7, frames\)"):
        network()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([4, 6, 0]), r"must lie in 1 to 6, the window's frames, got \[4, 6, 0\]"),
        (torch.tensor([4, 7, 1]), r"must lie in 1 to 6, the window's frames, got \[4, 7, 1\]"),
        (torch.tensor([4, 6]), r"must be \(3,\) whole numbers, got \(2,\)"),
        (torch.tensor([4.0, 6.0, 1.0]), r"must be \(3,\) whole numbers, got \(3,\) of torch.float32"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, message):
    with pytest.raises(UsageError, match=message):
        network()(small_bold(), lengths=lengths)


def test_other_inputs_must_come_where_the_network_has_them_and_only_there():
    bold, given = small_bold(), others()
    fused, plain = network(**FUSED), network()
    with pytest.raises(UsageError, match="built with side = 2; give side"):
        fused(bold, columns=given["columns"])
    with pytest.raises(UsageError, match=r"built with columns = \(0, 3, 0\); give columns"):
        fused(bold, side=given["side"])
    with pytest.raises(UsageError, match="side was given to a network built without"):
        plain(bold, side=given["side"])
    with pytest.raises(UsageError, match="columns was given to a network built without"):
        plain(bold, columns=given["columns"])
    with pytest.raises(UsageError, match=r"side must be \(3, 6, 2\)"):
        fused(bold, side=given["side"][:, :4], columns=given["columns"])
    with pytest.raises(UsageError, match=r"columns must be \(3, 3\)"):
        fused(bold, side=given["side"], columns=given["columns"][:, :2])


def test_the_network_learns_which_half_comes_first_and_its_control_without_order_cannot():
    def windows(count, seed):
        bold = 0.3 * noise(count, 1, 4, 4, 4, 6, seed=seed)
        is_left_first = torch.arange(count) % 2 == 0
        when = torch.where(is_left_first, 1, 4)
        for row in range(count):
            bold[row, :, :2, :, :, when[row]] += 3
            bold[row, :, 2:, :, :, 5 - when[row]] += 1.5
        return bold, is_left_first.float()

    def accuracy(**options):
        torch.manual_seed(0)
        model = CnnRnn(cnn_rnn_config({"img_size": [4, 4, 4, 6], "channels": [8], "norm_groups": 1} | options))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            bold, target = windows(16, step)
            F.binary_cross_entropy_with_logits(model(bold).squeeze(1), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        bold, target = windows(64, 1000)
        return ((model.eval()(bold).squeeze(1) > 0) == target.bool()).float().mean().item()

    assert accuracy(hidden=16) > 0.95
    assert accuracy(rnn="none", readout="mean") < 0.75
