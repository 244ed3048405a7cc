"""What the proof compares: every effect × model × input × seed is a cell, which has a recipe and a cohort of its own.

Sizes are small (50,000 to 150,000 weights, 16 frames), so that all cells together take a few core-hours. Nothing was
chosen by looking at test subjects of the proof: SwiFT has the options of `swift_tiny_cpu`, the others are made about as
large, and learning rates are round numbers. BrainLM's input, pooling, depth and patch were chosen by training loss on a
cohort of seed 7.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fmristream.errors import UsageError
from fmristream.synth import Cohort
from train.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, Recipe, TrainConfig, as_tables

# Effect -> its strength (fmristream/synth/courses.py); coupling as in the demo, the others as large as can be told in
# 16 frames.
EFFECTS: Mapping[str, float] = {"coupling": 1.6, "amplitude": 2.0, "order": 3.0, "states": 2.0}
# Shares of the subjects that train, validate (nothing is chosen by validation) and test.
SPLIT_RATIOS = (0.6, 0.0, 0.4)

Takes = Literal["volume", "series", "features"]
# In the place of a patch's edge: a quarter of the grid's.
QUARTER = ("quarter",) * 3 + (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How large all cells are."""

    subjects: int = 192
    shape: tuple[int, int, int] = (24, 24, 24)
    frames: int = 64
    window: int = 16
    stride: int = 8  # of training windows; those of test subjects do not overlap
    batch_size: int = 8
    steps: int = 700

    @property
    def block(self) -> int:
        """Voxels along a parcel: a sixth of the grid, as in tools/controls.py."""
        return max(1, max(self.shape) // 6)

    def cohort(self, effect: str, seed: int) -> Cohort:
        """The cohort that all models of an effect and a seed are trained and tested on."""
        return Cohort(
            subjects=self.subjects,
            shape=self.shape,
            voxel_size_mm=192 / max(self.shape),
            frames=self.frames,
            effect=effect,
            strength=EFFECTS[effect],
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What a network is given: a recipe of normalisation, and what becomes of its channels (tools/proof_inputs.py)."""

    normalize: str
    words: str
    channels: int = 1
    change: Literal["", "static-mean", "scaled"] = ""


INPUTS: Mapping[str, Input] = {
    "voxel": Input(normalize="voxel-zscore", words="voxel z"),
    "global": Input(normalize="global-zscore", words="global z (SwiFT as published)"),
    "voxel+mean": Input(normalize="tff", words="voxel z + static mean channel", channels=2, change="static-mean"),
    "two": Input(normalize="tff", words="global z and voxel z (TFF as published)", channels=2),
    "two-scaled": Input(
        normalize="tff", words="global z and voxel z, each divided by its SD", channels=2, change="scaled"
    ),
    "parcels": Input(normalize="parcels | voxel-zscore", words="z of parcel series"),
    # BrainLM adds a linear map of each parcel's position in mm, beside which z of about 1 is lost.
    "parcels-x20": Input(normalize="parcels | voxel-zscore | divide:0.05", words="z of parcel series, times 20"),
    "features": Input(normalize="none", words="a fixed summary of the run"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network by its name in the trainer, or a reader of fixed features.

    Attributes:
        words: what people call it.
        takes: volumes, series of parcels, or features.
        options: of its recipe; QUARTER stands for a quarter of the grid.
        lr: peak learning rate.
        pool: voxels along a cube that is averaged first, for convolutions that would take minutes on whole grids.
        inputs: the first is its own, the others are its ablation.
        expected_s: seconds a cell takes on one core, for the estimate before any was measured.
        name: in the trainer, where it is another one.
    """

    words: str
    takes: Takes
    expected_s: float
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    pool: int = 1
    inputs: tuple[str, ...] = ("voxel",)
    name: str = ""


FEATURES: Mapping[str, Model] = {
    name: Model(words=words, takes="features", inputs=("features",), expected_s=5)
    for name, words in (
        ("mean", "mean image, ridge"),
        ("sd", "SD image, ridge"),
        ("fc", "functional connectivity, ridge"),
        ("lagged-fc", "lagged connectivity, ridge (oracle of timing)"),
    )
}
NETWORKS: Mapping[str, Model] = {
    "swift": Model(
        words="SwiFT",
        takes="volume",
        options={
            "patch_size": QUARTER,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [3, 6],
            "window_size": [4, 4, 4, 4],
            "first_window_size": [4, 4, 4, 4],
        },
        lr=3e-3,
        inputs=("voxel", "global", "voxel+mean", "two-scaled", "two"),
        expected_s=87,
    ),
    "tff3": Model(
        words="TFF, phase 3 from scratch",
        takes="volume",
        options={
            "model_depth": 4,
            "intermediate_vec": 48,
            "transformer_hidden_layers": 2,
            "bert_intermediate_size": 96,
            "num_attention_heads": 4,
            "dropout_green": 0.0,
            "dropout_transformer": 0.0,
        },
        pool=2,
        expected_s=140,
    ),
    "cnn_rnn": Model(
        words="CNN-RNN",
        takes="volume",
        options={"channels": [16, 32, 48], "hidden": 64, "frame_chunk": 0},
        pool=2,
        expected_s=80,
    ),
    "mae4d": Model(
        words="4-D MAE encoder from scratch",
        takes="volume",
        options={
            "patch_size": [*QUARTER[:3], 2],
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 4,
        },
        expected_s=110,
    ),
    "brainlm": Model(
        words="BrainLM from scratch",
        takes="series",
        options={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            # Not used by a classifier, but every configuration has a decoder.
            "decoder_hidden_size": 48,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 96,
            "timepoint_patching_size": 16,
            "pooling": "mean",
        },
        inputs=("parcels-x20",),
        expected_s=15,
    ),
    "lstm": Model(words="LSTM on parcels", takes="series", options={"hidden": 96}, inputs=("parcels",), expected_s=6),
    "mlp": Model(
        words="MLP on a window's parcels",
        takes="series",
        options={"inputs": "series", "hidden": [64]},
        inputs=("parcels",),
        expected_s=5,
    ),
    "mlp-fc": Model(
        words="MLP on a window's connectivity",
        takes="series",
        name="mlp",
        options={"inputs": "connectivity", "hidden": [32]},
        inputs=("parcels",),
        expected_s=8,
    ),
}
MODELS: Mapping[str, Model] = {**FEATURES, **NETWORKS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entry of the table."""

    effect: str
    model: str
    input: str
    seed: int

    @property
    def key(self) -> str:
        """coupling/swift/voxel/0."""
        return f"{self.effect}/{self.model}/{self.input}/{self.seed}"


def cells(models: Sequence[str], effects: Sequence[str], seeds: Iterable[int]) -> list[Cell]:
    """All cells in the order of work: the first seed of everything first, own inputs before ablations, readers before nets.

    Raises:
        UsageError: a name is not known.
    """
    for what, names, known in (("model", models, MODELS), ("effect", effects, EFFECTS)):
        for name in names:
            if name not in known:
                raise UsageError(f"--{what}s {name}: there is no such {what}; known: {', '.join(known)}")
    found = [
        Cell(effect=effect, model=model, input=given, seed=seed)
        for seed in dict.fromkeys(seeds)
        for model in MODELS
        if model in models
        for given in MODELS[model].inputs
        for effect in EFFECTS
        if effect in effects
    ]
    place = {cell: number for number, cell in enumerate(found)}
    return sorted(found, key=lambda cell: (cell.seed, _is_ablation(cell), place[cell]))


def recipe_of(cell: Cell, settings: Settings, *, url: str) -> Recipe:
    """What the trainer is asked to do for a network's cell."""
    model, given = MODELS[cell.model], INPUTS[cell.input]
    pooled = f" | pool:{model.pool}" if model.pool > 1 else ""
    return Recipe(
        data=DataConfig(
            url=url,
            target="sex",
            window=settings.window,
            stride=settings.stride,
            normalize=given.normalize + pooled,
            val_split="",
        ),
        model=ModelConfig(name=model.name or cell.model, options=_options(model, given, settings)),
        optim=OptimConfig(lr=model.lr, warmup_steps=min(40, settings.steps // 10)),
        train=TrainConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            precision="fp32",
            checkpoint_every=250,
            keep_last=1,
            log_every=100,
            log_windows=False,
            seed=cell.seed,
        ),
        eval=EvalConfig(batch_size=32, stride=settings.window),
    )


def described(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Everything that decides a cell's result but code, versions and the machine; places are not in it."""
    facts: dict[str, Any] = {
        "cell": cell.key,
        "cohort": settings.cohort(cell.effect, cell.seed).url(),
        "split_ratios": list(SPLIT_RATIOS),
        "block": settings.block,
        "window": settings.window,
    }
    if MODELS[cell.model].takes != "features":
        tables = as_tables(recipe_of(cell, settings, url=""))
        facts |= {"recipe": tables, "change": INPUTS[cell.input].change}
    return facts


def digest_of(facts: Mapping[str, Any]) -> str:
    """16 letters that differ where anything described does."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ablation(cell: Cell) -> bool:
    return cell.input != MODELS[cell.model].inputs[0]


def _options(model: Model, given: Input, settings: Settings) -> dict[str, Any]:
    options = dict(model.options)
    if "patch_size" in options:
        frames = options["patch_size"][3]
        options["patch_size"] = [*(size // 4 for size in settings.shape), frames]
    return options
