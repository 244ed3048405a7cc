"""The 4-D masked autoencoder put together from torch's own transformer layers, in float64: the oracle of the tests.

All patches are embedded before any is hidden, and go back to their order before the decoder.
"""

import torch
from torch import nn


def _sub(weights, beginning):
    return {name.removeprefix(beginning): tensor for name, tensor in weights.items() if name.startswith(beginning)}


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention_state(weights, beginning=""):
    own = _sub(weights, beginning)
    return {
        "in_proj_weight": torch.cat([own["query.weight"], own["key_value.weight"]]),
        "in_proj_bias": torch.cat([own["query.bias"], own["key_value.bias"]]),
        "out_proj.weight": own["proj.weight"],
        "out_proj.bias": own["proj.bias"],
    }


def multihead(weights, beginning, heads):
    """torch's attention with the weights of one of ours."""
    state = _attention_state(weights, beginning)
    attention = nn.MultiheadAttention(state["out_proj.weight"].shape[0], heads, batch_first=True).double()
    attention.load_state_dict(state)
    return attention


def self_layers(x, weights, heads):
    """torch's pre-norm encoder layers with exact GELU, one for each number in the names."""
    for number in sorted({int(name.split(".")[0]) for name in weights}):
        own = _sub(weights, f"{number}.")
        width = len(own["mlp.linear1.bias"])
        layer = nn.TransformerEncoderLayer(
            x.shape[-1], heads, width, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        state = {f"self_attn.{name}": tensor for name, tensor in _attention_state(own, "attn.").items()}
        for name in ("norm1", "norm2"):
            state |= {f"{name}.{part}": own[f"{name}.{part}"] for part in ("weight", "bias")}
        for name in ("linear1", "linear2"):
            state |= {f"{name}.{part}": own[f"mlp.{name}.{part}"] for part in ("weight", "bias")}
        layer.double().load_state_dict(state)
        x = layer(x)
    return x


def cross_layers(x, memory, weights, heads):
    """Attention to the memory alone, then an MLP."""
    for number in sorted({int(name.split(".")[0]) for name in weights}):
        own = _sub(weights, f"{number}.")
        normal = _norm(memory, own, "norm_memory")
        x = x + multihead(own, "attn.", heads)(_norm(x, own, "norm1"), normal, normal)[0]
        wide = _linear(_norm(x, own, "norm2"), own, "mlp.linear1")
        x = x + _linear(wide * 0.5 * (1 + torch.erf(wide / 2**0.5)), own, "mlp.linear2")
    return x


def table(weights, places, times):
    """Token by token, time and place."""
    rows = [
        weights["positions.time"][time] + weights["positions.space"][place] for time in range(times) for place in places
    ]
    return torch.stack(rows)


def plain_encoder(patches, weights, places, heads, shown=None):
    """(b, tokens, values) to (b, 1 + shown, channels)."""
    times = patches.shape[1] // len(places)
    tokens = _linear(patches, weights, "embed") + table(weights, places, times)
    if shown is not None:
        tokens = torch.stack([sample[numbers] for sample, numbers in zip(tokens, shown, strict=True)])
    x = torch.cat([weights["cls_token"].repeat(len(tokens), 1, 1), tokens], dim=1)
    return _norm(self_layers(x, _sub(weights, "layers."), heads), weights, "norm")


def plain_decoder(latent, weights, places, times, heads, shown, *, cross):
    """(b, 1 + shown, channels) to the values of every token, (b, tokens, values)."""
    x = _linear(latent, weights, "embed")
    positions = table(weights, places, times)
    full = weights["mask_token"].repeat(len(x), len(positions), 1)
    for sample, numbers in enumerate(shown):
        full[sample, numbers] = x[sample, 1:]
    full = full + positions
    if cross:
        seen = torch.stack([sample[numbers] for sample, numbers in zip(full, shown, strict=True)])
        full = cross_layers(full, torch.cat([x[:, :1], seen], dim=1), _sub(weights, "layers."), heads)
    else:
        full = self_layers(torch.cat([x[:, :1], full], dim=1), _sub(weights, "layers."), heads)[:, 1:]
    return _linear(_norm(full, weights, "norm"), weights, "pred")
