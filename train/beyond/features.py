"""One vector a window: what a network's head reads, or, where a network has no such head, the mean of what its encoder gives.

| network | vector |
| --- | --- |
| swift | mean over all places and times of the last stage |
| tff1 | mean over frames of each frame's vector |
| tff2 | mean over frames of what the transformer gives |
| tff3, tff-contrast | the pooled vector of the window |
| brainlm, brainlm-vitmae | mean of all tokens but cls; fine-tuned: what the head reads (cls or that mean) |
| mae4d-pretrain | mean of all tokens but cls; fine-tuned: what the head reads (cls, that mean, or the attention's) |
| cnn_rnn | what the readout makes of the states, before columns join |
| mlp, lstm | what the last linear map reads |
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmristream.errors import UsageError
from train.models.brainlm import Brainlm
from train.models.brainlm_heads import FineTuned
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.cnn_rnn import CnnRnn
from train.models.heads import HeadedModel, mean_token
from train.models.mae4d import Mae4d, Mae4dPretrain
from train.models.series_nets import SeriesLstm, SeriesMlp
from train.models.tff import (
    AutoEncoder,
    EncoderTransformerContrast,
    EncoderTransformerDecoder,
    EncoderTransformerHead,
)

Named = dict[str, Tensor]


def features_of(model: nn.Module, signal: Tensor, named: Named) -> Tensor:
    """(b, features) float32 of a batch, without gradients; `signal` and `named` are of `Inputs`.

    Raises:
        UsageError: nothing is known of such a network's features.
    """
    for kind, read in _READERS:
        if isinstance(model, kind):
            found = read(model, signal, named)
            assert found.dim() == 2, "one vector a window"
            return found.float()
    raise UsageError(f"{type(model).__name__}: has no features that can be read; give a network of train/models")


def _headed(model: Any, signal: Tensor, named: Named) -> Tensor:
    return mean_token(model.model(signal))


def _fine_tuned(model: Any, signal: Tensor, named: Named) -> Tensor:
    tokens: Tensor = model.model.features(signal, **_positions(named))
    return tokens[:, 0] if model.pooling == "cls" else _without_cls(tokens)


def _series_tokens(model: Any, signal: Tensor, named: Named) -> Tensor:
    return _without_cls(model.features(signal, **_positions(named)))


def _volume_tokens(model: Any, signal: Tensor, named: Named) -> Tensor:
    return _without_cls(model.features(signal))


def _mae4d(model: Any, signal: Tensor, named: Named) -> Tensor:
    tokens: Tensor = model.features(signal)
    if model.config.pooling == "cls":
        return tokens[:, 0]
    return _without_cls(tokens) if model.pool is None else model.pool(tokens[:, 1:]).float().mean(1)


def _frames(model: Any, signal: Tensor, named: Named) -> Tensor:
    return model.encode(signal).float().mean(1)  # type: ignore[no-any-return]


def _transformed(model: Any, signal: Tensor, named: Named) -> Tensor:
    return _without_cls(model.transformer(model.encode(signal)))


def _summary(model: Any, signal: Tensor, named: Named) -> Tensor:
    pooled: Tensor = model.summarise(signal)
    return pooled


def _states(model: Any, signal: Tensor, named: Named) -> Tensor:
    lengths = named.get("lengths")
    states = model.features(signal, lengths=lengths, side=named.get("side"))
    if lengths is None:
        lengths = torch.full((len(signal),), signal.shape[5], device=signal.device)
    read: Tensor = model.readout(states, lengths.to(signal.device))
    return read


def _before_head(model: Any, signal: Tensor, named: Named) -> Tensor:
    with _input_of(model.head) as seen:
        model(signal, **named)
    return seen[-1]


@contextmanager
def _input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = layer.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def _positions(named: Named) -> Named:
    return {name: value for name, value in named.items() if name == "xyz"}


def _without_cls(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].float().mean(1)


Reader = Callable[[Any, Tensor, Named], Tensor]
_READERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Reader], ...] = (
    (HeadedModel, _headed),
    (FineTuned, _fine_tuned),
    ((Brainlm, BrainlmVitmae), _series_tokens),
    (Mae4dPretrain, _volume_tokens),
    (Mae4d, _mae4d),
    (AutoEncoder, _frames),
    (EncoderTransformerDecoder, _transformed),
    ((EncoderTransformerHead, EncoderTransformerContrast), _summary),
    (CnnRnn, _states),
    ((SeriesMlp, SeriesLstm), _before_head),
)
