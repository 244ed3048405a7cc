"""The smallest network of every published family, its weights as the published code would store them, and what must be told."""

import torch

from train.models.published import FAMILIES

_SWIFT = {
    "img_size": [8, 8, 8, 4],
    "patch_size": [2, 2, 2, 1],
    "in_chans": 1,
    "embed_dim": 4,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "c_multiplier": 2,
    "window_size": [2, 2, 2, 2],
    "first_window_size": [4, 4, 4, 4],
    "last_layer_full_MSA": True,
    "head": "v1",
    "outputs": 1,
}
_TFF1 = {
    "img_size": [9, 9, 9, 4],
    "in_chans": 2,
    "out_chans": 1,
    "model_depth": 4,
    "intermediate_vec": 32,
}
_BERT = {
    "num_attention_heads": 4,
    "bert_intermediate_size": 40,
    "max_position_embeddings": 8,
    "transformer_hidden_layers": 2,
}
_TFF3 = {name: value for name, value in (_TFF1 | _BERT).items() if name != "out_chans"} | {"outputs": 1}
_WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 20,
    "layer_norm_eps": 1e-12,
}
_BRAINLM = {
    "num_timepoints_per_voxel": 20,
    "timepoint_patching_size": 5,
    "conv_kernel_size": 7,
    "use_tanh_decoder": False,
}
_IMAGE = {"decoder_hidden_size": 12, "image_size": 24, "patch_size": 4, "num_channels": 3, "qkv_bias": True}
# All options that an import must find.
OPTIONS = {
    "swift": _SWIFT,
    "tff1": _TFF1,
    "tff2": _TFF1 | _BERT,
    "tff3": _TFF3,
    "brainlm": _WIDTHS | _BRAINLM,
    "brainlm-vitmae": _WIDTHS | _IMAGE,
}
# Those of them that no tensor shows.
UNSEEN = {
    "swift": ("patch_size", "num_heads", "window_size", "first_window_size", "last_layer_full_MSA"),
    "tff1": ("img_size",),
    "tff2": ("img_size", "num_attention_heads"),
    "tff3": ("img_size", "num_attention_heads"),
    "brainlm": ("num_timepoints_per_voxel",),
    "brainlm-vitmae": ("num_attention_heads", "decoder_num_attention_heads"),
}
_COUNTERS = {
    "transformer.bert.embeddings.position_ids": torch.arange(8).unsqueeze(0),
    "transformer.bert.embeddings.word_embeddings.weight": torch.ones(1, 32),
}
# Names that the published code stores and never uses.
UNUSED = {
    "swift": {"model.norm.weight": torch.ones(8), "model.norm.bias": torch.zeros(8)},
    "tff1": {},
    "tff2": _COUNTERS
    | {
        "transformer.bert.pooler.dense.weight": torch.ones(32, 32),
        "transformer.bert.pooler.dense.bias": torch.ones(32),
    },
    "tff3": _COUNTERS,
    "brainlm": {"decoder.decoder_pred.weight": torch.ones(3, 16), "decoder.decoder_pred.bias": torch.ones(3)},
    "brainlm-vitmae": {},
}
NETWORKS = tuple(OPTIONS)


def network(name, seed=0, **options):
    """A network in eval mode with every value at random, norms, tables and tokens too."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build(OPTIONS[name] | options).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn(tensor.shape)
    return model


def published(name, seed=1, dtype=torch.float32, **options):
    """What the published code would store: our names and those that it never uses."""
    state = dict(network(name, seed, **options).state_dict()) | UNUSED[name]
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor.clone() for key, tensor in state.items()}


def unseen(name):
    """The options that have to be told."""
    return {option: OPTIONS[name][option] for option in UNSEEN[name]}


def example(name, seed=2):
    """Inputs of the network: bold (b, c, x, y, z, t), or series (b, parcels, t), positions and noise."""
    generator = torch.Generator().manual_seed(seed)
    options = OPTIONS[name]
    if "img_size" in options:
        return (torch.randn(1, options["in_chans"], *options["img_size"], generator=generator),)
    tokens = 6 * 4 if name == "brainlm" else 36
    return (
        torch.randn(1, 6, 20, generator=generator),
        torch.randn(6, 3, generator=generator),
        torch.rand(1, tokens, generator=generator),
    )


def run(model, inputs):
    """What the network gives, as a tuple of tensors."""
    with torch.no_grad():
        if len(inputs) == 1:
            return (model(*inputs),)
        series, xyz, noise = inputs
        return tuple(model(series, xyz, noise=noise))
