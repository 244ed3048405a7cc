"""The sections of a recipe: frozen values, each of which refuses what makes no sense by itself."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fmristream.errors import UsageError
from fmristream.signal.recipes import expand, parse_recipe
from fmristream.signal.steps import Cohort
from fmristream.storage.urls import without_credentials

Kind = Literal["classification", "regression", "contrastive", "reconstruct", "masked"]
SUPERVISED = ("classification", "regression")
_MASK = ("masking", "mask_ratio", "mask_frames")
# Which of the objective's options each kind reads.
_OBJECTIVE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "classification": ("reconstruction_weight", *_MASK),
    "regression": ("loss", "huber_delta", "reconstruction_weight", *_MASK),
    "contrastive": ("temperature",),
    "reconstruct": ("perceptual",),
    "masked": ("loss", *_MASK),
}


def _nothing() -> Mapping[str, Any]:
    return types.MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which dataset, cut into which windows, normalised how, teaching what.

    `window = 0` takes whole runs. `target` is for objectives that have one ("sex" where it is not given). `normalize` is a
    recipe of the library (docs/recipes.md); statistics of the training runs that it needs are fitted at the start.
    `atlases` names the image behind each `parcels:NAME`. `side` series (as `StreamingDataset` has them) and `columns` of the
    participants table go into networks that join them. An empty split name switches that part off.
    """

    url: str = ""
    target: str | None = None
    where: str = ""
    window: int = 20
    stride: int | None = None
    step: int = 1
    random_phase: bool = False
    views: Literal["same-run", "same-subject"] | None = None
    normalize: str = "voxel-zscore"
    stats: Literal["run", "prefix", "context"] = "run"
    context: int | None = None
    atlases: Mapping[str, str] = field(default_factory=_nothing)
    side: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    orientation: str = ""
    grid: tuple[int, int, int] | None = None
    augment: Literal["none", "swift"] = "none"
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    threads: int = 1
    prefetch_batches: int = 2
    # What is on both sides of a split (a run, a subject, a family): ends the run before its first step, is reported, or
    # is not looked for.
    audit: Literal["fail", "warn", "off"] = "fail"

    def __post_init__(self) -> None:
        without_credentials(self.url)
        at_least("data", self, window=0, step=1, threads=1, prefetch_batches=1)
        for name in ("stride", "context"):
            if getattr(self, name) is not None:
                at_least("data", self, **{name: 1})
        if self.target in self.columns:
            raise UsageError(
                f"data.columns has the target {self.target!r}; a network would be told what it is to learn"
            )
        if self.target == "" or not self.train_split:
            raise UsageError("data.target and data.train_split must be names, got an empty string")
        if self.window == 0 and (self.stride is not None or self.random_phase):
            raise UsageError(
                "data.window = 0 takes whole runs, which have no stride and no random_phase; leave them out"
            )
        if not any(isinstance(step, Cohort) for step in expand(self.normalize)):
            parse_recipe(self.normalize, stats=self.stats, context=self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which network, and its own options as its module names them."""

    name: str = "swift"
    options: Mapping[str, Any] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What the outputs are held against; options that the kind does not read are refused.

    Attributes:
        kind: two classes by cross-entropy of one logit, more by softmax; a number; two views of a subject; the input
            itself (TFF); or what was hidden of it.
        loss: of `regression` (mse where not given) and `masked` (the network's own where not given; no huber).
        huber_delta: where Huber's loss turns from square to straight, in SD of the target; 1 where not given.
        temperature: of NT-Xent; .1 where not given, as published for SwiFT.
        masking: what is hidden: random tokens, the last tokens or the last frames; the network's own where not given.
        mask_ratio: the share that is hidden; the network's own where not given.
        mask_frames: of the predicting modes, how many frames are hidden, in place of a share.
        reconstruction_weight: fine-tune on a masked input and add so much of its reconstruction's loss (BrainLM: .5).
        perceptual: features of the perceptual loss: `random`, or a file of VGG16's weights; no such loss where not given.
    """

    kind: Kind = "classification"
    loss: Literal["mse", "l1", "huber"] | None = None
    huber_delta: float | None = None
    temperature: float | None = None
    masking: Literal["auto_encode", "predict_last", "predict_last_pixel"] | None = None
    mask_ratio: float | None = None
    mask_frames: int | None = None
    reconstruction_weight: float | None = None
    perceptual: str | None = None

    def __post_init__(self) -> None:
        for name in dict.fromkeys(name for names in _OBJECTIVE_OPTIONS.values() for name in names):
            if getattr(self, name) is not None and name not in _OBJECTIVE_OPTIONS[self.kind]:
                kinds = [kind for kind, names in _OBJECTIVE_OPTIONS.items() if name in names]
                raise UsageError(f"objective.{name} is of {', '.join(kinds)}, got kind {self.kind!r}; leave it out")
        for name in ("huber_delta", "temperature", "reconstruction_weight", "mask_frames"):
            if getattr(self, name) is not None:
                above_zero("objective", self, name)
        if self.mask_ratio is not None and not 0 < self.mask_ratio < 1:
            raise UsageError(f"objective.mask_ratio must lie in (0, 1), got {self.mask_ratio}")
        if self.huber_delta is not None and self.loss != "huber":
            raise UsageError("objective.huber_delta is of loss 'huber'; set objective.loss, or leave it out")
        if self.kind == "masked" and self.loss == "huber":
            raise UsageError("objective.loss of kind 'masked' is mse or l1, got 'huber'")
        if self.is_supervised and self.reconstruction_weight is None and any(getattr(self, name) for name in _MASK):
            raise UsageError(
                f"objective.{', objective.'.join(_MASK)} hide something of the input of kind {self.kind!r} only with "
                "objective.reconstruction_weight; set it, or leave them out"
            )

    @property
    def is_supervised(self) -> bool:
        """Whether there is a target, so that windows are scored."""
        return self.kind in SUPERVISED


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """What a run begins with, where it does not go on from a checkpoint of its own.

    Attributes:
        from_: written `from`: the folder of another run or of a checkpoint, or a .safetensors file; weights by name, the
            head of another task left out.
        keep_cls: TFF: take over the embedding of the window's own vector too, which published phases make anew.
        brain: 4-D masked autoencoder: whose mask holds where it differs, that of the `weights` or the `model`'s own.
        freeze: parameters whose names begin so do not learn.
    """

    from_: str = ""
    keep_cls: bool = False
    brain: Literal["same", "weights", "model"] = "same"
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW, a linear warm-up, then a schedule that ends at `final_lr_ratio` of the peak or above.

    `cosine` falls over all steps, `constant` stays, `step` multiplies by `decay` every `decay_every` steps.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    decay: float | None = None
    decay_every: int | None = None
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        at_least("optim", self, weight_decay=0, warmup_steps=0, final_lr_ratio=0)
        above_zero("optim", self, "lr", "eps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas must lie in [0, 1), got {list(self.betas)}")
        given = [name for name in ("decay", "decay_every") if getattr(self, name) is not None]
        if len(given) != (2 if self.schedule == "step" else 0):
            raise UsageError(
                f"optim.decay and optim.decay_every are of schedule 'step', which needs both; got schedule {self.schedule!r} "
                f"and {' and '.join(given) or 'neither'}"
            )
        if given:
            above_zero("optim", self, *given)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and what is kept; `batch_size` is global and `clip = 0` clips nothing."""

    steps: int = 1000
    batch_size: int = 8
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    clip: float = 1.0
    eval_every: int = 0  # 0: only at the end
    checkpoint_every: int = 200
    keep_last: int = 2
    log_every: int = 20  # steps between two lines on the screen; the log file has every step
    log_windows: bool = True
    seed: int = 0
    timeout_s: float = 30.0  # how long a rank may keep the others waiting, a checkpoint's writing included

    def __post_init__(self) -> None:
        at_least("train", self, steps=1, batch_size=1, clip=0, eval_every=0, checkpoint_every=1)
        at_least("train", self, keep_last=1, log_every=1, seed=0)
        above_zero("train", self, "timeout_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How validation and test windows are cut and scored; unset values are those of training."""

    batch_size: int | None = None
    stride: int | None = None
    bootstrap_draws: int = 2000
    # Fit functional connectivity and the nuisance-only reader at the end of a run with a target, and compare in pairs.
    baselines: bool = True

    def __post_init__(self) -> None:
        at_least("eval", self, bootstrap_draws=1)
        for name in ("batch_size", "stride"):
            if getattr(self, name) is not None:
                at_least("eval", self, **{name: 1})


def at_least(section: str, config: Any, **minima: float) -> None:
    """Raise UsageError for a value below its minimum."""
    for name, minimum in minima.items():
        if getattr(config, name) < minimum:
            raise UsageError(f"{section}.{name} must be at least {minimum}, got {getattr(config, name)}")


def above_zero(section: str, config: Any, *names: str) -> None:
    """Raise UsageError for a value that is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UsageError(f"{section}.{name} must be above 0, got {getattr(config, name)}")
