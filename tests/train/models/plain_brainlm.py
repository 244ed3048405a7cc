"""Both BrainLMs written plainly from the published description, in the precision of their weights: the oracle of the tests.

Everything is embedded before anything is hidden, the picture has its three channels, and softmax, convolution and layer
norm are spelled out.
"""

import math

import torch
from torch.nn import functional as F


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def _norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _heads(x, count):
    return torch.stack(x.chunk(count, dim=-1), dim=1)


def _attend(x, weights, name, count, kernel=None):
    q, k, v = (_heads(_linear(x, weights, f"{name}.{part}"), count) for part in ("query", "key", "value"))
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).exp()
    context = scores / scores.sum(-1, keepdim=True) @ v
    if kernel is not None:
        taps = weights[f"{name}.conv.weight"][:, 0, :, 0]
        padded = F.pad(v, (0, 0, kernel // 2, kernel // 2))
        for tap in range(kernel):
            context = context + taps[:, tap, None, None] * padded[:, :, tap : tap + v.shape[2]]
    return torch.cat(context.unbind(1), dim=-1)


def _token_layer(x, weights, name, heads, config):
    attended = _attend(x, weights, f"{name}.attention.self", heads, config.conv_kernel_size)
    attended = _linear(attended, weights, f"{name}.attention.output.dense")
    x = _norm(attended + x, weights, f"{name}.attention.output.LayerNorm", config.layer_norm_eps)
    wide = _linear(_gelu(_linear(x, weights, f"{name}.intermediate.dense")), weights, f"{name}.output.dense")
    return _norm(wide + x, weights, f"{name}.output.LayerNorm", config.layer_norm_eps)


def _image_layer(x, weights, name, heads, config):
    normal = _norm(x, weights, f"{name}.layernorm_before", config.layer_norm_eps)
    attended = _attend(normal, weights, f"{name}.attention.attention", heads)
    x = x + _linear(attended, weights, f"{name}.attention.output.dense")
    normal = _norm(x, weights, f"{name}.layernorm_after", config.layer_norm_eps)
    return x + _linear(_gelu(_linear(normal, weights, f"{name}.intermediate.dense")), weights, f"{name}.output.dense")


def _shown(tokens, order, kept):
    """Each sample's tokens in the order of its noise, the first `kept` of them."""
    return torch.stack([sample[places[:kept]] for sample, places in zip(tokens, order, strict=True)])


def _restored(shown, mask_token, order):
    full = mask_token[0].repeat(len(shown), order.shape[1], 1)
    for sample in range(len(shown)):
        full[sample, order[sample, : shown.shape[1]]] = shown[sample]
    return full


def plain_brainlm(series, xyz, weights, config, noise, ratio):
    """(b, parcels, t), (b, parcels, 3) to the latent tokens and the predicted series."""
    b, parcels, frames = series.shape
    patch = config.timepoint_patching_size
    number = frames // patch
    time = weights["vit.embeddings.pos_embedding.pe"][:number]
    tokens = _linear(series.reshape(b, parcels, number, patch), weights, "vit.embeddings.signal_embedding_projection")
    tokens = tokens + _linear(xyz, weights, "vit.embeddings.xyz_embedding_projection")[:, :, None] + time
    tokens = tokens.reshape(b, parcels * number, -1)
    order = noise.argsort(dim=1)
    kept = int(parcels * number * (1 - ratio))
    x = torch.cat([weights["vit.embeddings.cls_token"].repeat(b, 1, 1), _shown(tokens, order, kept)], dim=1)
    for layer in range(config.num_hidden_layers):
        x = _token_layer(x, weights, f"vit.encoder.layer.{layer}", config.num_attention_heads, config)
    latent = _norm(x, weights, "vit.layernorm", config.layer_norm_eps)
    x = _linear(latent, weights, "decoder.decoder_embed")
    full = _restored(x[:, 1:], weights["decoder.mask_token"], order).reshape(b, parcels, number, -1)
    full = full + _linear(xyz, weights, "decoder.decoder_xyz_projection")[:, :, None] + time
    x = torch.cat([x[:, :1], full.reshape(b, parcels * number, -1)], dim=1)
    for layer in range(config.decoder_num_hidden_layers):
        x = _token_layer(x, weights, f"decoder.decoder_layers.{layer}", config.decoder_num_attention_heads, config)
    x = _linear(
        _norm(x, weights, "decoder.decoder_norm", config.layer_norm_eps)[:, 1:], weights, "decoder.decoder_pred1"
    )
    x = _linear(torch.where(x > 0, x, 0.1 * x), weights, "decoder.decoder_pred2")
    x = x.tanh() if config.use_tanh_decoder else x
    return latent, x.reshape(b, parcels, frames)


def plain_vitmae(series, weights, config, order, kept, blank):
    """(b, parcels, t) to latent tokens and predicted series; `blank` frames before the hidden ones' boundary are 0."""
    b, parcels, frames = series.shape
    size, patch, grid = config.image_size, config.patch_size, config.image_size // config.patch_size
    top, left = (size - parcels) // 2, (size - frames) // 2
    picture = torch.full((b, 3, size, size), -1.0, dtype=series.dtype)
    picture[:, :, top : top + parcels, left : left + frames] = series[:, None]
    picture[:, :, :, left + frames - blank : left + frames] = 0
    name = "vit.embeddings.patch_embeddings.projection"
    tokens = F.conv2d(picture, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=patch)
    table = weights["vit.embeddings.position_embeddings"]
    tokens = tokens.flatten(2).transpose(1, 2) + table[:, 1:]
    cls = weights["vit.embeddings.cls_token"] + table[:, :1]
    x = torch.cat([cls.repeat(b, 1, 1), _shown(tokens, order, kept)], dim=1)
    for layer in range(config.num_hidden_layers):
        x = _image_layer(x, weights, f"vit.encoder.layer.{layer}", config.num_attention_heads, config)
    latent = _norm(x, weights, "vit.layernorm", config.layer_norm_eps)
    x = _linear(latent, weights, "decoder.decoder_embed")
    x = torch.cat([x[:, :1], _restored(x[:, 1:], weights["decoder.mask_token"], order)], dim=1)
    x = x + weights["decoder.decoder_pos_embed"]
    for layer in range(config.decoder_num_hidden_layers):
        x = _image_layer(x, weights, f"decoder.decoder_layers.{layer}", config.decoder_num_attention_heads, config)
    x = _linear(
        _norm(x, weights, "decoder.decoder_norm", config.layer_norm_eps)[:, 1:], weights, "decoder.decoder_pred"
    )
    predicted = torch.zeros(b, size, size, dtype=series.dtype)
    for token, (row, column) in enumerate((row, column) for row in range(grid) for column in range(grid)):
        square = x[:, token].reshape(b, patch, patch, 3).mean(-1)
        predicted[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = square
    return latent, predicted[:, top : top + parcels, left : left + frames]
