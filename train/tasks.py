"""What a network learns from a batch: the loss of each sample, and what evaluation keeps of each window.

A task calls the network (as it is to be called: inside DDP, under autocast) with what the batch holds, and gives one loss
for each sample in float32. The trainer sums them and divides by the global batch, so that no number of ranks changes what
is learned; therefore a sample's loss depends on that sample alone (contrastive learning: on all ranks' samples), and what
is drawn for it is keyed by seed, epoch and position in the stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fmristream.errors import UsageError
from fmristream.sampling.keys import key_of
from train.contrastive import nt_xent, nt_xent_alone
from train.data import uniform_noise
from train.extras import NO_EXTRAS, Extras
from train.masked_objectives import MASKED_LOSSES, joint_loss
from train.models.brainlm_heads import FineTuneOutput
from train.models.series_masking import Masking, Reconstruction
from train.objectives import Objective
from train.reconstruction import FeatureNet, tff_losses
from train.targets import joined_scores, summed_losses

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

Network = Callable[..., Any]


class Task(Protocol):
    """What the trainer, evaluation and checkpoints ask for."""

    @property
    def target(self) -> str | None:
        """Column that windows are scored against; None where there is none, and validation is a loss."""
        ...

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The targets in the order of the columns of `rows`; none where validation is a loss."""
        ...

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        """(samples,) float32."""
        ...

    def rows(self, network: Network, batch: "Batch") -> Tensor:
        """(samples, k) float32: what evaluation keeps of each window; where there are targets, the scores of each in turn."""
        ...

    def state(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from, as JSON has it."""
        ...


class UnscoredTask(Task, Protocol):
    """A task without a target."""

    def window_losses(self, rows: Tensor, subjects: Sequence[str]) -> Tensor:
        """(windows,) of a split, from the rows of all its windows in the order of their numbers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """How a batch becomes what a network is called with.

    Attributes:
        takes: `volume` or `series`.
        names: arguments that the network's `forward` has by name; `xyz` and `lengths` are given where it has them.
        parcels: (p,) places of the parcels in a packed frame.
        xyz: (p, 3) mm.
        extras: columns and side series.
    """

    takes: str
    names: frozenset[str]
    parcels: Tensor | None = None
    xyz: Tensor | None = None
    extras: Extras = NO_EXTRAS

    def __call__(self, batch: "Batch") -> tuple[Tensor, dict[str, Tensor]]:
        """The first argument and the others; series are (rows, parcels, t)."""
        named: dict[str, Tensor] = {}
        if self.takes == "volume":
            signal = batch.bold
        else:
            assert self.parcels is not None
            values = batch.values[:, 0]
            signal = values.index_select(2, self.parcels.to(values.device)).transpose(1, 2).contiguous()
        if "xyz" in self.names and self.xyz is not None:
            named["xyz"] = self.xyz.to(signal.device)
        if "lengths" in self.names and batch.lengths is not None:
            named["lengths"] = batch.lengths
        return signal, named | self.extras(batch)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Supervised:
    """Targets, one or several: classes or numbers. The network's outputs are those of each in turn."""

    objectives: tuple[Objective, ...]
    inputs: Inputs

    @property
    def target(self) -> str | None:
        return self.objectives[0].target if len(self.objectives) == 1 else None  # of several, none

    @property
    def objective(self) -> Objective:
        """The only target."""
        (only,) = self.objectives
        return only

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        return summed_losses(self.objectives, self._outputs(network, batch), batch.targets)

    def rows(self, network: Network, batch: "Batch") -> Tensor:
        return joined_scores(self.objectives, self._outputs(network, batch))

    def state(self) -> dict[str, Any]:
        return self._state() | self.inputs.extras.state()

    def _state(self) -> dict[str, Any]:
        if len(self.objectives) == 1:
            return self.objective.state()
        return {"kind": "multitask", "objectives": [objective.state() for objective in self.objectives]}

    def _outputs(self, network: Network, batch: "Batch") -> Tensor:
        signal, named = self.inputs(batch)
        found = network(signal, **named)
        outputs: Tensor = found.outputs if isinstance(found, FineTuneOutput) else found
        return outputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hiding:
    """Which parts of a window are hidden: what the network decides by the noise that is drawn here.

    Attributes:
        seed: of the noise.
        masking: mode and extent, for networks that are told them; None for those whose configuration says.
        size: how many numbers a window takes, by the shape of its input.
    """

    seed: int
    masking: Masking | None
    size: Callable[[torch.Size], int]

    def __call__(self, signal: Tensor, batch: "Batch") -> dict[str, Any]:
        """Arguments of the network beside its input."""
        count = self.size(signal.shape)
        keys = sample_keys(batch, what="mask", seed=self.seed)
        noise = torch.stack([uniform_noise(key, count) for key in keys]).to(signal.device)
        return {"noise": noise, **({} if self.masking is None else {"masking": self.masking})}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointlySupervised(Supervised):
    """Targets, from a masked input, and what was hidden beside them: BrainLM's published fine-tuning."""

    hiding: Hiding
    loss: str
    weight: float

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        signal, named = self.inputs(batch)
        found = network(signal, **named, **self.hiding(signal, batch))
        task = summed_losses(self.objectives, found.outputs, batch.targets)
        hidden, _ = hidden_losses(found.reconstruction, signal, self.loss, frames=counted_frames(batch))
        return joint_loss(task, hidden, weight=self.weight)

    def state(self) -> dict[str, Any]:
        return self._state() | {"reconstruction_weight": self.weight}


class _MeanLoss(ABC):
    """Evaluation of tasks whose samples have losses of their own: their mean."""

    __slots__ = ()

    @abstractmethod
    def losses(self, network: Network, batch: "Batch") -> Tensor: ...

    @property
    def target(self) -> str | None:
        return None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return ()

    def rows(self, network: Network, batch: "Batch") -> Tensor:
        return self.losses(network, batch).unsqueeze(1)

    def window_losses(self, rows: Tensor, subjects: Sequence[str]) -> Tensor:
        return rows[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masked(_MeanLoss):
    """What was hidden of a window, from what was not: BrainLM, the masked autoencoder of volumes, forecasts.

    Frames that the recipe scrubs do not count. A window of which nothing else was hidden costs nothing, and is not one of
    those whose mean evaluation tells.
    """

    inputs: Inputs
    hiding: Hiding
    loss: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        return self._losses(network, batch)[0]

    def rows(self, network: Network, batch: "Batch") -> Tensor:
        """(samples, 2): the loss, and 1 where something counted."""
        losses, counts = self._losses(network, batch)
        return torch.stack([losses, counts.to(losses.dtype)], dim=1)

    def window_losses(self, rows: Tensor, subjects: Sequence[str]) -> Tensor:
        """NaN for a window of which nothing counted."""
        loss, counts = rows.unbind(1)
        return torch.where(counts > 0, loss, torch.nan)

    def _losses(self, network: Network, batch: "Batch") -> tuple[Tensor, Tensor]:
        signal, named = self.inputs(batch)
        found = network(signal, **named, **self.hiding(signal, batch))
        return hidden_losses(found, signal, self.loss, frames=counted_frames(batch))

    def state(self) -> dict[str, Any]:
        return {"kind": "masked", "loss": self.loss, **self.about}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rebuilding(_MeanLoss):
    """The input itself, first channel: TFF's phases 1 and 2.

    Attributes:
        inputs: of two channels.
        seed: of the slices that the perceptual loss looks at.
        features: of the perceptual loss; None for none.
        share: of a window's axial slices that it looks at.
        perceptual: what `features` are, in words.
    """

    inputs: Inputs
    seed: int
    features: FeatureNet | None
    share: float
    perceptual: str

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        signal, named = self.inputs(batch)
        rebuilt = network(signal, **named)
        keys = sample_keys(batch, what="slices", seed=self.seed)
        rows = zip(torch.split(rebuilt, 1), torch.split(signal, 1), keys, strict=True)
        return torch.stack([self._loss(*row) for row in rows])

    def _loss(self, rebuilt: Tensor, bold: Tensor, key: int) -> Tensor:
        slices = None
        if self.features is not None:
            count = bold.shape[4] * bold.shape[5]
            chosen = uniform_noise(key, count).argsort(stable=True)[: max(1, int(self.share * count))]
            slices = chosen.sort().values.to(bold.device)
        terms = tff_losses(rebuilt, bold, net=self.features, slices=slices)
        return torch.stack(list(terms.values())).sum()

    def state(self) -> dict[str, Any]:
        return {"kind": "reconstruct", "perceptual": self.perceptual}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrastive:
    """Two windows of a subject, to be found among those of others.

    Attributes:
        inputs: of both views at once: rows of the first ones, then of the second ones.
        temperature: of NT-Xent.
        group: samples that are compared with each other in evaluation; in training it is the global batch.
    """

    inputs: Inputs
    temperature: float
    group: int

    @property
    def target(self) -> str | None:
        return None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return ()

    def losses(self, network: Network, batch: "Batch") -> Tensor:
        pairs = self._pairs(network, batch)
        subjects = torch.tensor([subject_number(label) for label in batch.subject[: len(pairs)]])
        return nt_xent(pairs, subjects.to(pairs.device), self.temperature)

    def rows(self, network: Network, batch: "Batch") -> Tensor:
        return self._pairs(network, batch).float().flatten(1)

    def window_losses(self, rows: Tensor, subjects: Sequence[str]) -> Tensor:
        """Compared in groups that are the same however they were computed."""
        order = uniform_noise(key_of("fmristream-contrast-groups-v1"), len(rows)).argsort(stable=True)
        pairs = rows[order].view(len(rows), 2, -1)
        numbers = torch.tensor([subject_number(label) for label in subjects])[order]
        count = -(-len(rows) // self.group)
        losses = [
            nt_xent_alone(group, of, self.temperature)
            for group, of in zip(pairs.tensor_split(count), numbers.tensor_split(count), strict=True)
        ]
        return torch.cat(losses)[order.argsort()]

    def state(self) -> dict[str, Any]:
        return {"kind": "contrastive", "temperature": self.temperature}

    def _pairs(self, network: Network, batch: "Batch") -> Tensor:
        """(samples, 2, width)."""
        signal, named = self.inputs(batch)
        embeddings: Tensor = network(signal, **named)
        return torch.stack(embeddings.chunk(2), dim=1)


def counted_frames(batch: "Batch") -> Tensor | None:
    """(b, t) bool, False where a frame was scrubbed or is none of the run's; None where the recipe scrubs none."""
    return None if batch.kept is None else batch.frames_valid & batch.frames_kept


def hidden_losses(found: Any, signal: Tensor, loss: str, *, frames: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean loss over what was hidden of each sample in the frames (b, t) that count, and whether there was such: both (b,).

    Each window counts alike, whatever share of it was hidden; `frames` is None where all count.
    """
    if isinstance(found, Reconstruction):
        predicted, target, counted = found.series, signal, found.hidden
        counted = counted if frames is None else counted & frames[:, None]
    else:
        predicted, target, counted = found.predicted, found.target, found.counted
        counted = counted if frames is None else counted & found.of_frames(frames)
    distance = MASKED_LOSSES[loss]
    losses = torch.stack([distance(*row) for row in zip(predicted, target, counted, strict=True)])
    return losses, counted.flatten(1).any(1)


def sample_keys(batch: "Batch", *, what: str, seed: int) -> list[int]:
    """What each row's draws come from: the same on any number of ranks, threads, and after any interruption."""
    if batch.epoch is None or batch.sample is None:
        raise UsageError(
            "the batch does not say which epoch and sample its rows are; take batches from a StreamingLoader"
        )
    rows = zip(batch.epoch.tolist(), batch.sample.tolist(), strict=True)
    return [key_of(f"fmristream-{what}-v1", seed, *row) for row in rows]


def subject_number(label: str) -> int:
    """A whole number that stands for a subject on every rank."""
    return int.from_bytes(sha256(label.encode()).digest()[:8], "little", signed=True)
