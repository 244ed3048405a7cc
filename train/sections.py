"""The sections of a recipe: frozen values, each of which refuses what makes no sense by itself."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fmristream.catalog.where import nearest
from fmristream.errors import UsageError
from fmristream.signal.recipes import expand, parse_recipe
from fmristream.signal.steps import Cohort
from fmristream.storage.urls import display_url, scheme_of, without_credentials, without_query

TargetKind = Literal["classification", "regression"]
Kind = Literal["classification", "regression", "multitask", "contrastive", "reconstruct", "masked"]
SUPERVISED = ("classification", "regression", "multitask")
_MASK = ("masking", "mask_ratio", "mask_frames")
# Numbers of validation that can tell which weights are better -> whether more of it is.
METRICS: Mapping[str, bool] = {
    "auroc": True,
    "balanced_accuracy": True,
    "accuracy": True,
    "balanced_accuracy_at_0": True,
    "accuracy_at_0": True,
    "f1": True,
    "f1_at_0": True,
    "r": True,
    "r_squared": True,
    "r2": True,
    "mae": False,
    "mse": False,
    "loss": False,
}
# What of them a target has; without one there is the loss.
METRICS_OF: Mapping[TargetKind, tuple[str, ...]] = {
    "classification": tuple(METRICS)[:7],
    "regression": tuple(METRICS)[7:12],
}
# Which of the objective's options each kind reads.
_OBJECTIVE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "classification": ("balance", "reconstruction_weight", *_MASK),
    "regression": ("loss", "huber_delta", "reconstruction_weight", *_MASK),
    "multitask": ("targets", "weights", "balance", "loss", "huber_delta", "reconstruction_weight", *_MASK),
    "contrastive": ("temperature",),
    "reconstruct": ("perceptual",),
    "masked": ("loss", *_MASK),
}


# Every rank's own seed follows from it and fits into the 64 bits that torch takes.
_SEEDS = 2**62


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
    # Learn from so many of the training groups (subjects, families): those that come first in an order drawn by the seed, so
    # that more of them hold fewer; all where not given.
    train_groups: int | None = None
    train_groups_seed: int = 0
    # What is on both sides of a split (a run, a subject, a family): ends the run before its first step, is reported, or
    # is not looked for.
    audit: Literal["fail", "warn", "off"] = "fail"

    def __post_init__(self) -> None:
        without_query(without_credentials(self.url))
        for name, path in self.atlases.items():
            _require_no_secret(f"data.atlases.{name}", path)
        if self.train_groups is not None:
            at_least("data", self, train_groups=1)
        at_least("data", self, train_groups_seed=0)
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
        kind: two classes by cross-entropy of one logit, more by softmax; a number; several `targets`; two views of a
            subject; the input itself (TFF); or what was hidden of it.
        loss: of numbers (mse where not given) and of `masked` (the network's own where not given; no huber).
        huber_delta: where Huber's loss turns from square to straight, in SD of the target; 1 where not given.
        temperature: of NT-Xent; .1 where not given, as published for SwiFT.
        masking: what is hidden: random tokens, the last tokens or the last frames; the network's own where not given.
        mask_ratio: the share that is hidden; the network's own where not given.
        mask_frames: of the predicting modes, how many frames are hidden, in place of a share.
        reconstruction_weight: fine-tune on a masked input and add so much of its reconstruction's loss (BrainLM: .5).
        perceptual: features of the perceptual loss: `random`, or a file of VGG16's weights; no such loss where not given.
        targets: of `multitask`, how each column is learnt; sorted by name, so that a network's outputs are in one order
            however the table was written.
        weights: of `multitask`, by what the loss of a target is multiplied; 1 for those that are not named.
        balance: weigh each class by its inverse frequency among the training subjects, mean 1 over them.
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
    targets: Mapping[str, TargetKind] | None = None
    weights: Mapping[str, float] | None = None
    balance: bool | None = None

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
        if self.kind == "multitask":
            object.__setattr__(self, "targets", self._several())

    @property
    def is_supervised(self) -> bool:
        """Whether there is a target, so that windows are scored."""
        return self.kind in SUPERVISED

    def _several(self) -> Mapping[str, TargetKind]:
        """The targets of `multitask`, sorted and held against the other options."""
        targets = dict(sorted((self.targets or {}).items()))
        if len(targets) < 2 or "" in targets:
            raise UsageError(
                "objective.targets of kind 'multitask' must name two columns or more, such as { age = \"regression\", sex = "
                f'"classification" }}, got {", ".join(map(repr, targets)) or "none"}; one target is of kind '
                "'classification' or 'regression' with data.target"
            )
        for name, weight in (self.weights or {}).items():
            if name not in targets:
                raise UsageError(
                    f"objective.weights: {name!r} is not in objective.targets{nearest(name, list(targets))}"
                )
            if weight <= 0:
                raise UsageError(
                    f"objective.weights.{name} must be above 0, got {weight}; leave the target out of objective.targets"
                )
        kinds = set(targets.values())
        for option, kind in (("loss", "regression"), ("huber_delta", "regression"), ("balance", "classification")):
            if getattr(self, option) is not None and kind not in kinds:
                raise UsageError(
                    f"objective.{option} is of {kind}, which no target of objective.targets is; leave it out"
                )
        return types.MappingProxyType(targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """What a run begins with, where it does not go on from a checkpoint of its own.

    Attributes:
        from_: written `from`: another run or a checkpoint, here or in a bucket, or a .safetensors file; weights by name, the
            head of another task left out. Of a run those that it scored: last or best, averaged where it averages.
        keep_cls: TFF: take over the embedding of the window's own vector too, which published phases make anew.
        brain: 4-D masked autoencoder: whose mask holds where it differs, that of the `weights` or the `model`'s own.
        freeze: parameters whose names begin so do not learn.
    """

    from_: str = ""
    keep_cls: bool = False
    brain: Literal["same", "weights", "model"] = "same"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_no_secret("start.from", self.from_)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW, a linear warm-up, then a schedule that ends at `final_lr_ratio` of the peak or above.

    `cosine` falls over all steps, `constant` stays, `step` multiplies by `decay` every `decay_every` steps. `layer_decay`
    gives every layer that factor times the rate of the layer above it; what lies above all layers has the whole rate.
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
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        at_least("optim", self, weight_decay=0, warmup_steps=0, final_lr_ratio=0)
        if not 0 < self.layer_decay <= 1:
            raise UsageError(
                f"optim.layer_decay must lie in (0, 1], got {self.layer_decay}; 1 gives all layers one rate"
            )
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
    """How long, how much at once, and what is kept; `batch_size` is global and `clip = 0` clips nothing.

    Attributes:
        accumulate: into how many pieces a rank cuts its share of a batch, one in memory at a time.
        compile: whether torch.compile makes the network; not in evaluation, but of the blocks under `fsdp`.
        compile_backend: of torch.compile.
        parallel: each rank has the whole network (`ddp`), or a shard of its parameters, gradients and optimiser state.
        ema: of the weights' running mean that evaluation uses, per step; 0 for none.
        patience: looks at validation in a row without a better `eval.metric` after which training ends; 0: never.
    """

    steps: int = 1000
    batch_size: int = 8
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    clip: float = 1.0
    eval_every: int = 0  # 0: only at the end
    checkpoint_every: int = 200
    keep_last: int = 2
    log_every: int = 20  # steps between two lines on the screen; the log file has every step
    log_windows: bool = True
    seed: int = 0
    timeout_s: float = 30.0  # how long a rank may keep the others waiting; slow storage keeps nobody
    checkpoints: str = ""  # a folder or URL of this run alone; "": OUT/checkpoints
    checkpoint_async: bool = True  # train on while one is written; false: wait for each
    keep_best: int = 1  # of those that were the best so far when they were written, beside the newest
    accumulate: int = 1
    compile: bool = False
    compile_backend: str = "inductor"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    ema: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        at_least("train", self, steps=1, batch_size=1, clip=0, eval_every=0, checkpoint_every=1)
        at_least("train", self, keep_last=1, log_every=1, seed=0)
        if self.seed >= _SEEDS:
            raise UsageError(f"train.seed must be below 2^62, got {self.seed}")
        _require_writable(self.checkpoints)
        at_least("train", self, keep_best=0)
        above_zero("train", self, "timeout_s")
        at_least("train", self, accumulate=1, patience=0)
        if self.patience and not self.eval_every:
            raise UsageError(
                f"train.patience {self.patience} counts looks at validation, and train.eval_every is 0; set it to the steps "
                "from one look to the next"
            )
        if not 0 <= self.ema < 1:
            raise UsageError(f"train.ema must lie in [0, 1), got {self.ema}; 0 is off, and .999 usual")


def _require_no_secret(name: str, url: str) -> None:
    """Raise UsageError for a URL that may hold a secret: recipe.toml and every checkpoint would keep it."""
    if scheme_of(without_credentials(url)) != "file" and ("?" in url or "#" in url):
        raise UsageError(
            f"{name} {display_url(url)}: the URL has a query ('?...', not shown: it may hold a secret), which recipe.toml and "
            "every checkpoint would keep; give it without, or a copy on a disk"
        )


def _require_writable(checkpoints: str) -> None:
    if scheme_of(without_credentials(checkpoints)) in ("http", "https"):
        raise UsageError(
            f"train.checkpoints {display_url(checkpoints)}: a web server takes no checkpoints; give a folder or a bucket"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How validation and test windows are cut and scored; unset values are those of training.

    Attributes:
        batch_size: global.
        stride: frames from one window's start to the next.
        bootstrap_draws: of the intervals.
        metric: of validation subjects, by which weights are the best; by objective where not given: auroc of two classes,
            balanced_accuracy of more, mae of a number, loss without a target; of several targets the first's (`TARGET.METRIC`).
        use: which weights are scored at the end, the last ones or the best of all looks (`train.eval_every`); the best
            where not given and `train.patience` is set, else the last.
        average: of classes: what is averaged over windows, the logits (SwiFT) or their sigmoids, of several classes
            softmaxes (TFF).
        unit: what is scored: subjects or their sessions; `auto`: sessions where the label varies between a subject's.
    """

    batch_size: int | None = None
    stride: int | None = None
    bootstrap_draws: int = 2000
    metric: str | None = None
    use: Literal["last", "best"] | None = None
    average: Literal["logit", "sigmoid"] = "logit"
    unit: Literal["auto", "subject", "session"] = "auto"
    urls: tuple[str, ...] = ()  # other data, scored at the end with everything that was fitted left as it is
    # Fit functional connectivity and the nuisance-only reader at the end of a run with a target, and compare in pairs.
    baselines: bool = True

    def __post_init__(self) -> None:
        at_least("eval", self, bootstrap_draws=1)
        if self.metric is not None and self.metric.rpartition(".")[2] not in METRICS:
            raise UsageError(
                f"eval.metric must be one of {', '.join(METRICS)} (of several targets TARGET.METRIC), got {self.metric!r}"
            )
        for url in self.urls:
            without_query(without_credentials(url))
        for name in ("batch_size", "stride"):
            if getattr(self, name) is not None:
                at_least("eval", self, **{name: 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """How a run is followed, beside its log.

    Attributes:
        trackers: where its numbers are sent, too; `tensorboard` is files in the run's folder.
        project: of Weights & Biases, experiment of MLflow.
        profile: how many steps are timed part by part, and as many traced, after some to warm up; 0 for none.
    """

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    project: str = "fmristream"
    profile: int = 0

    def __post_init__(self) -> None:
        at_least("watch", self, profile=0)
        if len(set(self.trackers)) < len(self.trackers):
            raise UsageError(f"watch.trackers names one twice: {list(self.trackers)}")


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
