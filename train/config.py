"""What a recipe may say: a TOML file and `--set a.b=c` become one frozen tree; what it does not know is an error."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fmristream.errors import UsageError
from fmristream.storage.urls import without_credentials

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which dataset, cut into which windows, teaching what; an empty split name switches that part off."""

    url: str = ""
    target: str = "sex"
    window: int = 20
    stride: int | None = None
    normalize: Literal["voxel-zscore", "global-zscore", "none"] = "voxel-zscore"
    grid: tuple[int, int, int] | None = None
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    threads: int = 1
    prefetch_batches: int = 2

    def __post_init__(self) -> None:
        without_credentials(self.url)
        _at_least("data", self, window=1, threads=1, prefetch_batches=1)
        if self.stride is not None:
            _at_least("data", self, stride=1)
        if not self.target or not self.train_split:
            raise UsageError("data.target and data.train_split must be names, got an empty string")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which network, and its own options as its module names them."""

    name: str = "swift"
    options: Mapping[str, Any] = field(default_factory=lambda: types.MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What the outputs are held against."""

    kind: Literal["classification", "regression"] = "classification"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW, a linear warm-up and a cosine down to `final_lr_ratio` of the peak."""

    lr: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _at_least("optim", self, weight_decay=0, warmup_steps=0, final_lr_ratio=0)
        _above_zero("optim", self, "lr", "eps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas must lie in [0, 1), got {list(self.betas)}")


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
        _at_least("train", self, steps=1, batch_size=1, clip=0, eval_every=0, checkpoint_every=1)
        _at_least("train", self, keep_last=1, log_every=1, seed=0)
        _above_zero("train", self, "timeout_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How validation and test windows are cut and scored; unset values are those of training."""

    batch_size: int | None = None
    stride: int | None = None
    bootstrap_draws: int = 2000

    def __post_init__(self) -> None:
        _at_least("eval", self, bootstrap_draws=1)
        for name in ("batch_size", "stride"):
            if getattr(self, name) is not None:
                _at_least("eval", self, **{name: 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a run, but where it writes and how many processes share the work."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def recipe_path(source: str) -> Path:
    """The file of a recipe: a path, or a name in `train/recipes`."""
    if source.endswith(".toml") or "/" in source:
        return Path(source)
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if source not in names:
        raise UsageError(f"{source}: there is no recipe of that name{_nearest(source, names)}")
    return RECIPES / f"{source}.toml"


def load_recipe(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides in order.

    Raises:
        UsageError: the file is missing or not TOML, a key is unknown, or a value has the wrong type or range.
    """
    path = recipe_path(source)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such recipe") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return recipe_from(tree)


def recipe_from(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from nested tables, checked key by key."""
    sections = dict(tree)
    model = _model_section(sections.pop("model", {}))
    recipe = _build(Recipe, sections, "")
    return dataclasses.replace(recipe, model=model)


def as_tables(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as nested tables of plain values, with what is unset left out; `recipe_from` reads it back."""
    tables: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        values = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
        values |= values.pop("options", {})
        tables[section.name] = {key: _plain(value) for key, value in values.items() if value is not None}
    return tables


def as_toml(recipe: Recipe) -> str:
    """The recipe as TOML text, every default spelled out."""
    blocks = []
    for name, values in as_tables(recipe).items():
        lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items()]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=c`; a value that is not TOML is taken as text, so that paths and names need no quotes."""
    name, equals, text = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise UsageError(f"--set {override}: expected SECTION.KEY=VALUE, for example optim.lr=1e-3")
    try:
        parsed = tomllib.loads(f"value = {text.strip()}")
        value = parsed["value"] if len(parsed) == 1 else text.strip()
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tree
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {key} is a value, not a section")
    table[keys[-1]] = value


def _model_section(values: Any) -> ModelConfig:
    if not isinstance(values, Mapping):
        raise UsageError(f"model: expected a section, got {values!r}")
    options = {key: value for key, value in values.items() if key != "name"}
    name = _convert(str, values.get("name", ModelConfig().name), "model.name")
    return ModelConfig(name=name, options=types.MappingProxyType(options))


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Make one dataclass of the tree; `prefix` is its name followed by a dot."""
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            what = "key" if prefix else "section"
            raise UsageError(f"{prefix}{key}: the recipe has an unknown {what}{_nearest(key, sorted(hints))}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(expected: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type; nothing is guessed but an integer where a float is wanted."""
    origin = get_origin(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: expected a section, got {value!r}")
        return _build(cast(type[Any], expected), value, f"{name}.")
    if origin in (types.UnionType, Union):
        (inner,) = [kind for kind in get_args(expected) if kind is not types.NoneType]
        return _convert(inner, value, name)
    if origin is Literal:
        if value not in get_args(expected):
            raise UsageError(f"{name}: {value!r} is not a choice{_nearest(str(value), get_args(expected))}")
        return value
    if origin is tuple:
        return _convert_list(get_args(expected), value, name)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        raise UsageError(f"{name}: expected {_KINDS[expected]}, got {value!r}")
    return value


def _convert_list(kinds: Sequence[Any], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise UsageError(f"{name}: expected a list of {len(kinds)} values, got {value!r}")
    return tuple(_convert(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


_KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}


def _nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _at_least(section: str, config: Any, **minima: float) -> None:
    for name, minimum in minima.items():
        if getattr(config, name) < minimum:
            raise UsageError(f"{section}.{name} must be at least {minimum}, got {getattr(config, name)}")


def _above_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise UsageError(f"{section}.{name} must be above 0, got {getattr(config, name)}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_text(key)


def _toml_text(text: str) -> str:
    """Quoted text: JSON's escapes are TOML's, which only asks for one more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    """One value as TOML; JSON's spelling is TOML's for booleans and finite numbers."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UsageError(f"a recipe holds text, numbers, booleans, lists and tables, got {value!r}")
