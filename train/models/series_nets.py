"""The two plain networks on parcel series (b, parcels, t): a perceptron of connectivity or values, and an LSTM or GRU.

They stand between the linear baselines and the networks of the field: what a few layers make of the same parcels. Frames
behind a sample's true length are never seen, exactly: a padded batch gives what each sample alone gives.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.models.series_nets_config import LstmConfig, MlpConfig, lstm_config, mlp_config

# As in train/baselines_connectivity.py: Fisher's z of this is 3.8.
_LARGEST_CORRELATION = 0.999
# Summed squares of z-scored or raw series are far above, those of constant ones below.
_LEAST_SQUARES = 1e-12


class SeriesMlp(nn.Module):
    """Linear maps with GELU and dropout between, of Fisher's z of the correlations or of all values of a window."""

    takes = "series"
    pairs: Tensor

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.width, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(widths[-1], config.outputs)
        first, second = torch.triu_indices(config.parcels, config.parcels, offset=1)
        self.register_buffer("pairs", first * config.parcels + second, persistent=False)

    def forward(self, series: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(b, parcels, t) and true lengths (b,) to (b, outputs) in float32."""
        _check_series("mlp", series, self.config)
        x = self._inputs(series, lengths)
        for layer in self.layers:
            x = checkpoint(self._layer, layer, x, use_reentrant=False) if self._recomputes else self._layer(layer, x)
        with torch.autocast(series.device.type, enabled=False):
            out: Tensor = self.head(x.float())
        return out

    @property
    def _recomputes(self) -> bool:
        return self.config.checkpointing and self.training

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(F.gelu(layer(x)))
        return out

    def _inputs(self, series: Tensor, lengths: Tensor | None) -> Tensor:
        with torch.autocast(series.device.type, enabled=False):
            seen = _seen(series, lengths)
            if self.config.inputs == "connectivity":
                return fisher_z(series.float(), seen).flatten(1)[:, self.pairs]
            padded = F.pad(_masked(series.float(), seen), (0, self.config.frames - series.shape[2]))
            return padded.flatten(1)


class SeriesLstm(nn.Module):
    """An LSTM or GRU over the frames; the other way round it starts at each sample's own last frame.

    The recurrence computes in float32 also under autocast: it carries its rounding from frame to frame.
    """

    takes = "series"

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.config = config
        make = nn.LSTM if config.cell == "lstm" else nn.GRU
        ways = 2 if config.bidirectional else 1
        widths = [config.parcels, *[ways * config.hidden] * (config.layers - 1)]
        self.forwards = nn.ModuleList(make(width, config.hidden, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(
            make(width, config.hidden, batch_first=True) for width in (widths if config.bidirectional else ())
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(ways * config.hidden, config.outputs)

    def forward(self, series: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(b, parcels, t) and true lengths (b,) to (b, outputs) in float32."""
        _check_series("lstm", series, self.config)
        with torch.autocast(series.device.type, enabled=False):
            seen = _seen(series, lengths)
            x = _masked(series.float(), seen).transpose(1, 2)
            last = seen.sum(1) - 1
            # Frame i of the reversed sample is frame last - i; what lies behind its end stays where it is.
            frames = torch.arange(x.shape[1], device=x.device)
            turned = torch.where(seen, last[:, None] - frames, frames)
            for number in range(self.config.layers):
                x = self._layer(number, self.dropout(x) if number else x, turned)
            out: Tensor = self.head(self.dropout(self._pooled(x, seen, last)))
        return out

    def _layer(self, number: int, x: Tensor, turned: Tensor) -> Tensor:
        """(b, t, channels) to (b, t, ways x hidden)."""
        ahead = self._run(self.forwards[number], x)
        if not self.config.bidirectional:
            return ahead
        back = self._run(self.backwards[number], _in_order(x, turned))
        return torch.cat([ahead, _in_order(back, turned)], dim=2)

    def _run(self, cell: nn.Module, x: Tensor) -> Tensor:
        if self.config.checkpointing and self.training:
            return checkpoint(_states, cell, x, use_reentrant=False)  # type: ignore[no-any-return]
        return _states(cell, x)

    def _pooled(self, x: Tensor, seen: Tensor, last: Tensor) -> Tensor:
        """(b, t, ways x hidden) to (b, ways x hidden): the state after the last frame of each way, or the mean."""
        if self.config.pooling == "mean":
            return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        ahead = x[torch.arange(len(x), device=x.device), last, : self.config.hidden]
        return torch.cat([ahead, x[:, 0, self.config.hidden :]], dim=1)


def fisher_z(series: Tensor, seen: Tensor) -> Tensor:
    """(b, parcels, parcels) Fisher's z of the correlations over the frames seen (b, t); 0 where a series is constant."""
    count = seen.sum(1).clamp(min=1)[:, None, None]
    mean = _masked(series, seen).sum(2, keepdim=True) / count
    centred = _masked(series - mean, seen)
    squares = centred.square().sum(2, keepdim=True)
    unit = centred * torch.where(squares > _LEAST_SQUARES, squares, 1.0).rsqrt() * (squares > _LEAST_SQUARES)
    return (unit @ unit.transpose(1, 2)).clamp(-_LARGEST_CORRELATION, _LARGEST_CORRELATION).atanh()


def build_mlp(options: Mapping[str, Any]) -> SeriesMlp:
    """From a recipe's model section; `parcels`, `frames` and `outputs` come from data and objective."""
    return SeriesMlp(mlp_config(options))


def build_lstm(options: Mapping[str, Any]) -> SeriesLstm:
    """From a recipe's model section; `parcels`, `frames` and `outputs` come from data and objective."""
    return SeriesLstm(lstm_config(options))


def _states(cell: nn.Module, x: Tensor) -> Tensor:
    """(b, t, hidden) states after each frame."""
    states: Tensor = cell(x)[0]
    return states


def _in_order(x: Tensor, frames: Tensor) -> Tensor:
    """(b, t, channels) with its frames in another order (b, t)."""
    return x.gather(1, frames[..., None].expand_as(x))


def _seen(series: Tensor, lengths: Tensor | None) -> Tensor:
    """(b, t) bool, which frames are the sample's own."""
    frames = torch.arange(series.shape[2], device=series.device)
    if lengths is None:
        return torch.ones_like(series[:, 0], dtype=torch.bool)
    return frames < lengths.to(series.device)[:, None]


def _masked(series: Tensor, seen: Tensor) -> Tensor:
    """0 in frames that are not seen, whatever stands there."""
    return torch.where(seen[:, None], series, 0.0)


def _check_series(family: str, series: Tensor, config: MlpConfig | LstmConfig) -> None:
    if series.dim() != 3 or series.shape[1] != config.parcels or not 1 <= series.shape[2] <= config.frames:
        raise UsageError(
            f"{family}: expected (batch, {config.parcels}, 1 to {config.frames}) as (b, parcels, t), got "
            f"{tuple(series.shape)}; give the model the parcels and frames of the data"
        )
