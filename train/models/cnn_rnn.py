"""CNN-RNN, the hybrid for age: one 3-D network turns each frame into a vector, a recurrence reads the vectors in time order.

All windows of a batch share the frames' network: frames are handled as one long batch, a chunk at a time, and frames after
a window's true end are left out before it, so that nothing there can change anything. Vectors, recurrence, readout and head
compute in float32 also under autocast: rounding would add up over some hundred frames, and they cost next to nothing.

The architecture is described in docs/models/cnn_rnn.md; there is no published code of it.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fmristream.errors import UsageError
from train.models.cnn_rnn_config import CnnRnnConfig, cnn_rnn_config
from train.models.cnn_rnn_fusion import RECURRENT, Columns, SideSeries
from train.models.cnn_rnn_norm import FrameBatchNorm, make_norm, moments
from train.models.convolution import Conv3d
from train.models.load import Loaded, load_named
from train.models.tff import Encoder, IntoBert
from train.models.tff_config import TffConfig
from train.models.tff_load import NEVER_USED, PARTS

# What phase 1 of TFF gives to this network.
_OF_TFF = ("encoder.", "into_bert.")
_BEGINS_ANEW = "of a layer above the frames' network, which begins anew"


class FrameBlock(nn.Module):
    """Convolution, normalisation, the largest of each 2 x 2 x 2 voxels, and ReLU; odd borders are kept."""

    def __init__(self, in_channels: int, channels: int, config: CnnRnnConfig) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = make_norm(config.norm, channels, groups=config.norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, channels, x, y, z) to (frames, channels of the block, halves of x, y and z, rounded up)."""
        return _half(self.norm(self.conv(x)))

    def with_batch_statistics(self, frames: Tensor, chunk: int) -> Tensor:
        """The same with the statistics of all frames, of which a chunk at a time is in memory; convolves twice."""
        norm, chunks = cast(FrameBatchNorm, self.norm), torch.split(frames, chunk)
        parts = [checkpoint(lambda x: moments(self.conv(x)), x, use_reentrant=False) for x in chunks]
        counts = frames.new_tensor([x.numel() / x.shape[1] for x in chunks], dtype=torch.float32)
        mean, variance = norm.pool(torch.stack(cast(list[Tensor], parts)), counts)

        def finish(x: Tensor) -> Tensor:
            return _half(norm.normalise(self.conv(x), mean, variance))

        return torch.cat([cast(Tensor, checkpoint(finish, x, use_reentrant=False)) for x in chunks])


def _half(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 x 2 voxels, and ReLU: in this order the same function on an eighth of the voxels."""
    return F.relu(F.max_pool3d(x, 2, ceil_mode=True))


class FrameCnn(nn.Module):
    """Our own small network over a frame: blocks, and the mean over what is left of the grid."""

    def __init__(self, config: CnnRnnConfig) -> None:
        super().__init__()
        widths = (config.in_chans, *config.channels)
        self.blocks = nn.ModuleList(FrameBlock(*pair, config) for pair in pairwise(widths))
        self.width = config.channels[-1]

    def forward(self, frames: Tensor) -> Tensor:
        """(frames, c, x, y, z) to (frames, width), float32."""
        for block in self.blocks:
            frames = block(frames)
        return frames.flatten(2).float().mean(2)

    def with_batch_statistics(self, frames: Tensor, chunk: int) -> Tensor:
        """The same with the statistics of all frames, of which a chunk at a time is in memory."""
        for block in self.blocks:
            frames = cast(FrameBlock, block).with_batch_statistics(frames, chunk)
        return frames.flatten(2).float().mean(2)


class TffFrames(nn.Module):
    """What phase 1 of TFF makes of a frame, under its names: encoder and bottleneck."""

    def __init__(self, config: CnnRnnConfig) -> None:
        super().__init__()
        sizes = TffConfig(
            img_size=config.img_size,
            in_chans=config.in_chans,
            model_depth=config.model_depth,
            dropout_green=config.dropout_green,
            intermediate_vec=config.intermediate_vec or 1,
            num_attention_heads=1,
        )
        self.width = config.intermediate_vec or prod(sizes.bottleneck)
        sizes = dataclasses.replace(sizes, intermediate_vec=self.width)
        self.encoder = Encoder(sizes)
        self.into_bert = IntoBert(sizes)

    def forward(self, frames: Tensor) -> Tensor:
        """(frames, c, x, y, z) to (frames, width), float32."""
        out: Tensor = self.into_bert(self.encoder(frames))
        return out.float()


class Readout(nn.Module):
    """From the states of a window's true frames to one vector."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.width = 2 * channels if kind == "last+mean" else channels
        if kind == "attention":
            # No bias at the end: softmax would take it away again.
            self.score = nn.Sequential(nn.Linear(channels, channels), nn.Tanh(), nn.Linear(channels, 1, bias=False))

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """(b, t, channels), 0 in frames after the true end, and (b,) true frames to (b, width)."""
        if self.kind == "attention":
            scores = self.score(states).squeeze(2).masked_fill(~true_frames(lengths, states.shape[1]), -torch.inf)
            attended: Tensor = (scores.softmax(1).unsqueeze(2) * states).sum(1)
            return attended
        parts = []
        if "last" in self.kind:
            parts.append(states[torch.arange(len(states), device=states.device), lengths - 1])
        if "mean" in self.kind:
            parts.append(states.sum(1) / lengths.unsqueeze(1))
        return torch.cat(parts, dim=1)


def true_frames(lengths: Tensor, frames: int) -> Tensor:
    """(b, frames) bool: which frames of each window come before its true end."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


class CnnRnn(nn.Module):
    """Frames to vectors, to states, to a prediction; what else is known of the scan is joined before the head."""

    # Its blocks are also called by other methods than `forward`, at which FSDP would not gather them.
    blocks_to_shard: tuple[nn.Module, ...] = ()

    def __init__(self, config: CnnRnnConfig) -> None:
        super().__init__()
        self.config = config
        self.cnn: FrameCnn | TffFrames = FrameCnn(config) if config.encoder == "own" else TffFrames(config)
        self.cnn.requires_grad_(not config.freeze_cnn)
        self.reduce, width = _reduction(config, self.cnn.width)
        if config.rnn != "none":
            between = config.dropout if config.layers > 1 else 0.0
            self.rnn = RECURRENT[config.rnn](width, config.hidden, config.layers, batch_first=True, dropout=between)
            width = config.hidden
        if config.side:
            self.side = SideSeries(config.side, width=config.fusion, rnn=config.rnn)
        self.num_features = width + (config.fusion if config.side else 0)
        self.readout = Readout(config.readout, self.num_features)
        if config.columns:
            self.columns = Columns(config.columns, width=config.fusion)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.readout.width + (config.fusion if config.columns else 0), config.outputs)
        self.train()

    def train(self, mode: bool = True) -> "CnnRnn":
        """As of any module; a frozen frames' network stays in evaluation, with its dropout off and its statistics still."""
        super().train(mode)
        if self.config.freeze_cnn:
            self.cnn.eval()
        return self

    def forward(
        self,
        bold: Tensor,
        *,
        lengths: Tensor | None = None,
        side: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Predict from windows.

        Args:
            bold: (b, c, x, y, z, t).
            lengths: (b,) whole numbers, how many frames of each window are true, 1 to t; all where it is None.
            side: (b, t, series), where the network has `side`; what is not known is NaN.
            columns: (b, columns), where the network has `columns`; what is not known is NaN.

        Returns:
            (b, outputs) float32.
        """
        if (columns is None) != (not self.config.columns):
            raise UsageError(_presence("columns", self.config.columns, "(b, columns)"))
        states = self.features(bold, lengths=lengths, side=side)
        if lengths is None:
            lengths = torch.full((len(bold),), bold.shape[5], device=bold.device)
        with torch.autocast(bold.device.type, enabled=False):
            summary = self.readout(states, lengths.to(bold.device))
            if columns is not None:
                summary = torch.cat([summary, self.columns(columns, len(bold))], dim=1)
            return cast(Tensor, self.head(self.dropout(summary)))

    def features(self, bold: Tensor, *, lengths: Tensor | None = None, side: Tensor | None = None) -> Tensor:
        """(b, t, num_features) float32: the state after each frame, 0 in frames after a window's true end."""
        self._check(bold, lengths)
        if (side is None) != (not self.config.side):
            raise UsageError(_presence("side", self.config.side, "(b, t, series)"))
        is_true = None if lengths is None else true_frames(lengths.to(bold.device), bold.shape[5])
        vectors = self._encode(bold, is_true)
        with torch.autocast(bold.device.type, enabled=False):
            vectors = self.reduce(vectors)
            # What comes after the true end cannot change a state before it: no packing, and no wait for the device.
            states = vectors if self.config.rnn == "none" else self.rnn(vectors)[0]
            if side is not None:
                states = torch.cat([states, self.side(side, (len(bold), bold.shape[5]))], dim=2)
        return states if is_true is None else torch.where(is_true.unsqueeze(2), states, 0)

    def _encode(self, bold: Tensor, is_true: Tensor | None) -> Tensor:
        """(b, c, x, y, z, t) to (b, t, width), float32; frames that are not true are not looked at and give 0."""
        frames = bold.permute(0, 5, 1, 2, 3, 4).flatten(0, 1)
        if is_true is None:
            return self._by_chunks(frames).view(len(bold), bold.shape[5], -1)
        places = is_true.flatten().nonzero().squeeze(1)
        vectors = self._by_chunks(frames.index_select(0, places))
        empty = vectors.new_zeros(len(frames), vectors.shape[1])
        return empty.index_copy(0, places, vectors).view(len(bold), bold.shape[5], -1)

    def _by_chunks(self, frames: Tensor) -> Tensor:
        """(frames, c, x, y, z) to (frames, width), some at a time; batch statistics are of all of them."""
        recomputes = self.config.checkpointing and torch.is_grad_enabled()
        if self.config.has_batch_statistics and self.training:
            cnn = cast(FrameCnn, self.cnn)
            return cnn.with_batch_statistics(frames, self.config.frame_chunk) if recomputes else cnn(frames)
        chunks = torch.split(frames, self.config.frame_chunk or len(frames))
        if recomputes:
            outputs = [cast(Tensor, checkpoint(self.cnn, chunk, use_reentrant=False)) for chunk in chunks]
        else:
            outputs = [self.cnn(chunk) for chunk in chunks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _check(self, bold: Tensor, lengths: Tensor | None) -> None:
        expected = (self.config.in_chans, *self.config.img_size[:3])
        if bold.dim() != 6 or tuple(bold.shape[1:5]) != expected or not bold.shape[5] or not len(bold):
            raise UsageError(
                f"cnn_rnn: expected (batch, {', '.join(map(str, expected))}, frames) as (b, c, x, y, z, t), "
                f"got {tuple(bold.shape)}; give the model the img_size and in_chans of the data"
            )
        if lengths is None:
            return
        if lengths.shape != (len(bold),) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise UsageError(
                f"cnn_rnn: lengths must be ({len(bold)},) whole numbers, "
                f"got {tuple(lengths.shape)} of {lengths.dtype}; give one for each window"
            )
        if int(lengths.min()) < 1 or int(lengths.max()) > bold.shape[5]:
            raise UsageError(
                f"cnn_rnn: lengths must lie in 1 to {bold.shape[5]}, the window's frames, got {lengths.tolist()}; "
                "leave out windows without a true frame"
            )


def _reduction(config: CnnRnnConfig, width: int) -> tuple[nn.Module, int]:
    """From a frame's vector to the recurrence's input, and how wide that is; our own network's vector goes as it is."""
    if config.encoder == "own":
        return nn.Identity(), width
    # Normalised, because an auto-encoder's vectors have any scale and gates saturate.
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        linear=nn.Linear(width, config.frame_vec), norm=nn.LayerNorm(config.frame_vec)
    )
    return nn.Sequential(parts), config.frame_vec


def _presence(name: str, option: object, shape: str) -> str:
    if option:
        return (
            f"cnn_rnn: the network was built with {name} = {option!r}; give {name} {shape}, NaN where nothing is known"
        )
    return f"cnn_rnn: {name} was given to a network built without; build it with the option {name}"


def build_cnn_rnn(options: Mapping[str, Any]) -> CnnRnn:
    """The network from a recipe's model section; the options are those of `CnnRnnConfig`."""
    return CnnRnn(cnn_rnn_config(options))


def load_lower_layers(model: CnnRnn, weights: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Begin with a trained network over frames: a TFF's of any phase (encoder = "tff"), or another CNN-RNN's (own).

    `source` names the weights in errors.

    Raises:
        WeightsError: a name of the frames' network is missing, unexpected or of another shape, or a name is of neither
            kind of network; the model is unchanged.
    """
    if isinstance(model.cnn, TffFrames):
        others = {part: _BEGINS_ANEW for part in PARTS if part not in _OF_TFF}
        return load_named(model.cnn, weights, source=source, ignored=others | NEVER_USED)
    holder = nn.ModuleDict({"cnn": model.cnn})
    above = dict.fromkeys(("reduce.", "rnn.", "side.", "readout.", "columns.", "head."), _BEGINS_ANEW)
    return load_named(holder, weights, source=source, ignored=above)
