"""Other data as a trained network is to see them: cut, normalised and placed as in training, every window once, in order."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.recipes import expand
from fmristream.signal.steps import Cohort, ParcelMeans
from train import build
from train.beyond.facts import differences
from train.beyond.trained import Trained, remap
from train.data import Part, Signal, open_clips, signal_of
from train.evaluate import under_autocast
from train.launch import World
from train.objectives import Objective
from train.tasks import Inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fmristream.stream.batch import Batch
    from fmristream.stream.clips import StreamingDataset

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """A trained network before data.

    Attributes:
        trained: the network's past.
        model: the network, on the device of `world`, in evaluation.
        inputs: how batches become what it is called with.
        part: the data, in stored order.
        signal: what the windows are.
        world: who computes.
        truth: by target, that of every subject in the codes of training; targets that the data do not have are not there.
        recoded: of columns whose words have other codes here, the codes of training.
        told: in which ways the data are not those of training, and what is left out.
    """

    trained: Trained
    model: nn.Module
    inputs: Inputs
    part: Part
    signal: Signal
    world: World
    truth: Mapping[str, Mapping[str, float]]
    recoded: Mapping[str, NDArray[np.float64]]
    told: tuple[str, ...]

    @property
    def clips(self) -> "StreamingDataset":
        """The windows."""
        return self.part.clips

    @property
    def network(self) -> "Callable[..., Any]":
        """The network as tasks call it, in the precision of its run."""
        return under_autocast(self.model, device=self.world.device, bf16=self.bf16)

    @property
    def bf16(self) -> bool:
        """Whether its run computes in bfloat16 on this device."""
        precision = self.trained.recipe.train.precision
        return precision == "bf16" or (precision == "auto" and self.world.device.type == "cuda")

    def batches(self) -> Iterator["Batch"]:
        """This rank's shares of all batches, on its device."""
        for packed in self.part.loader:
            batch = packed.to(self.world.device)
            yield _recoded(batch, self.recoded) if self.recoded else batch


def open_for(
    trained: Trained, url: str, *, split: str = ALL, where: str = "", world: World, stack: ExitStack
) -> Opened:
    """Put a trained network before a dataset.

    Args:
        trained: the network.
        url: of a converted dataset.
        split: `train`, `val`, `test`, or all runs.
        where: a condition over columns of runs and participants.
        world: who computes.
        stack: closes what is opened.

    Raises:
        SpaceError: the data lie elsewhere than those of training.
        UsageError: the network takes no such windows.
    """
    from fmristream import StreamingLoader, open

    recipe = trained.recipe
    dataset_columns = set(open(url).participant_columns) - {"subject"}
    missing = [name for name in trained.columns if name not in dataset_columns]
    if missing:
        raise UsageError(f"{url}: the network is given the columns {', '.join(missing)}, which the data do not have")
    targets = tuple(target for target in trained.targets if target in dataset_columns)
    wanted = tuple(dict.fromkeys(targets + trained.columns))
    clips = _clips(trained, url, split=split, where=where, targets=wanted)
    _require_same_voxels(trained, clips)
    told = [*trained.notes, *(differences(trained.facts, clips) if trained.facts is not None else ())]
    unknown = [name for name in wanted if trained.facts is None and clips.target_labels[name]]
    if set(unknown) & set(trained.columns):
        raise UsageError(
            f"{url}: which code each word of {', '.join(unknown)} had in training is not known; train again"
        )
    told += [f"{name}: which word was which class in training is not known; truths are left out" for name in unknown]
    told += [f"{count} left out: {why}" for why, count in clips.left_out.items()]
    loader = StreamingLoader(
        clips,
        batch_size=recipe.eval.batch_size or recipe.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        threads=recipe.data.threads,
        prefetch_batches=recipe.data.prefetch_batches,
    )
    stack.callback(loader.close)
    part = Part(clips=clips, loader=loader)
    signal = signal_of({"train": part})
    model = trained.network(signal).to(world.device)
    recoded = {
        name: remap(trained.labels[name], clips.target_labels[name], column=name, where=url)
        for name in wanted
        if name in trained.labels and tuple(trained.labels[name]) != tuple(clips.target_labels[name])
    }
    return Opened(
        trained=trained,
        model=model,
        inputs=build.make_inputs(recipe, model, signal, trained.extras),
        part=part,
        signal=signal,
        world=world,
        truth={
            objective.target: _truth(trained, objective, clips, recoded, where=url)
            for objective in trained.objectives
            if objective.target in targets and objective.target not in unknown
        },
        recoded={name: codes for name, codes in recoded.items() if name in trained.columns},
        told=tuple(told),
    )


def _clips(trained: Trained, url: str, *, split: str, where: str, targets: tuple[str, ...]) -> "StreamingDataset":
    data = trained.recipe.data
    stride = data.stride if trained.recipe.eval.stride is None or not data.window else trained.recipe.eval.stride
    arguments: dict[str, Any] = {
        "split": None if split == ALL else split,
        "normalize": data.normalize,
        "window": data.window or None,
        "stride": stride,
        "step": data.step,
        "seed": None,
        "targets": targets,
        "side": data.side,
        "grid": data.grid,
        "stats": data.stats,
        "context": data.context,
        "fitted": trained.statistics,
        "fitted_elsewhere": True,
    }
    clips = open_clips(trained.recipe, url=url, where=where, orientation=data.orientation or None, **arguments)
    axes = "" if trained.facts is None else trained.facts["orientation"]
    if data.orientation or not axes or not clips.orientation or clips.orientation == axes:
        return clips
    # As stored, in training: turned to those axes, which interpolates nothing, brains lie as the network knows them.
    return open_clips(trained.recipe, url=url, where=where, orientation=axes, **arguments)


def _require_same_voxels(trained: Trained, clips: "StreamingDataset") -> None:
    """Raise SpaceError where statistics of the training's voxels would be taken for those of other voxels."""
    steps = expand(trained.recipe.data.normalize)
    places = [place for place, step in enumerate(steps) if isinstance(step, Cohort)]
    if not places or any(isinstance(step, ParcelMeans) for step in steps[: places[0]]):
        return
    known = "" if trained.facts is None else trained.facts["space_digest"]
    here = clips.runs[0].space_digest
    if known != here and any(one.content_digest != clips.content_digest for one in trained.statistics):
        raise SpaceError(
            f"{clips.dataset.store.name}: has stored voxels of space {here[:12]}, the statistics of training are of voxels of "
            f"{known[:12] or 'a space that nobody noted'}; convert the data with the training data's mask"
        )


def _truth(
    trained: Trained,
    objective: Objective,
    clips: "StreamingDataset",
    recoded: Mapping[str, NDArray[np.float64]],
    *,
    where: str,
) -> dict[str, float]:
    """Every subject's target as training coded it, NaN where it is not known.

    Raises:
        UsageError: a subject has a class that training did not have.
    """
    codes = np.array(clips.target_values[objective.target], dtype=np.float64)
    known = np.isfinite(codes)
    here = codes.copy()
    if objective.target in recoded:
        here[known] = recoded[objective.target][codes[known].astype(np.int64)]
    here = here.astype(np.float32).astype(np.float64)  # as batches carry them
    values = np.array(objective.values)
    strange = known & ~np.isin(here, values.astype(np.float32)) if len(values) else np.zeros(len(here), dtype=bool)
    if strange.any():
        labels = clips.target_labels[objective.target]
        found = sorted({labels[int(code)] if labels else f"{code:g}" for code in codes[strange]})
        raise UsageError(
            f"{where}: {int(strange.sum())} subjects have a {objective.target} that the network does not know "
            f"({', '.join(found[:5])}; it knows {', '.join(trained.class_names(objective))}); leave them out with --where"
        )
    return dict(zip(sorted(set(clips.subjects)), here.tolist(), strict=True))


def _recoded(batch: "Batch", recoded: Mapping[str, NDArray[np.float64]]) -> "Batch":
    """The same with the codes of training; words that it did not have are not known."""
    targets = dict(batch.targets)
    for name, codes in recoded.items():
        values = targets[name]
        table = torch.from_numpy(np.append(codes, np.nan)).to(values)
        place = torch.where(torch.isfinite(values), values, float(len(codes))).long()
        targets[name] = table[place]
    return replace(batch, targets=targets)
