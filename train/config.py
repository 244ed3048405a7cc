"""What a recipe may say: a TOML file and `--set a.b=c` become one frozen tree; what it does not know is an error."""

import collections.abc
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
from train.sections import (
    METRICS_OF,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    StartConfig,
    TargetKind,
    TrainConfig,
    WatchConfig,
)

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")

# What is taught where a recipe does not say.
_TARGET = "sex"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a run, but where it writes and how many processes share the work."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    start: StartConfig = field(default_factory=StartConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.objective.is_supervised and not self.objective.targets and self.data.target is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, target=_TARGET))
        _require_fitting_data(self.data, self.objective)
        if self.eval.metric is not None:
            _require_fitting_metric(self.eval.metric, self.targets)

    @property
    def targets(self) -> Mapping[str, TargetKind]:
        """How each column is learnt, in the order of the network's outputs; none for objectives without a target."""
        kind = self.objective.kind
        if kind == "classification" or kind == "regression":
            assert self.data.target is not None
            return {self.data.target: kind}
        return self.objective.targets or {}


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
        values = {_written(item.name): getattr(part, item.name) for item in dataclasses.fields(part)}
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


def _require_fitting_data(data: DataConfig, objective: ObjectiveConfig) -> None:
    """Raise UsageError where the streams are not those that the objective learns from."""
    kind = objective.kind
    if (data.views is not None) != (kind == "contrastive"):
        raise UsageError(
            f"objective.kind {kind!r} learns from {'two views' if kind == 'contrastive' else 'one view'} of a sample, got "
            f"data.views {data.views!r}; kind 'contrastive' needs 'same-subject' or 'same-run', the others none"
        )
    if not objective.is_supervised and (data.side or data.columns):
        raise UsageError(
            f"data.side and data.columns are of objectives with a target, got kind {kind!r}; leave them out"
        )
    if objective.targets and data.target is not None:
        raise UsageError(
            f"objective.kind 'multitask' has its targets in objective.targets, got data.target {data.target!r}; leave it out"
        )
    for name in objective.targets or ():
        if name in data.columns:
            raise UsageError(f"data.columns has the target {name!r}; a network would be told what it is to learn")
    if not objective.is_supervised and data.target is not None:
        raise UsageError(f"objective.kind {kind!r} has no target, got data.target {data.target!r}; leave it out")
    if not objective.is_supervised and data.window == 0:
        raise UsageError(
            f"objective.kind {kind!r} learns from windows, got data.window 0 (whole runs); give their length"
        )


def _require_fitting_metric(metric: str, targets: Mapping[str, TargetKind]) -> None:
    """Raise UsageError for a metric that no look at validation will give."""
    prefix = "{}." if len(targets) > 1 else ""
    known = [prefix.format(name) + one for name, kind in targets.items() for one in METRICS_OF[kind]] or ["loss"]
    if metric not in known:
        raise UsageError(
            f"eval.metric {metric!r}: validation of this objective does not give it{_nearest(metric, known)}"
        )


def _written(name: str) -> str:
    """A field's name in a recipe: Python keeps some names for itself, and those end in an underscore here."""
    return name.removesuffix("_")


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Make one dataclass of the tree; `prefix` is its name followed by a dot."""
    hints = {_written(name): hint for name, hint in get_type_hints(cls).items()}
    names = {_written(item.name): item.name for item in dataclasses.fields(cast(Any, cls))}
    for key in values:
        if key not in hints:
            what = "key" if prefix else "section"
            raise UsageError(f"{prefix}{key}: the recipe has an unknown {what}{_nearest(key, sorted(hints))}")
    return cls(**{names[key]: _convert(hints[key], value, prefix + key) for key, value in values.items()})


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
    if origin is collections.abc.Mapping:
        return _convert_table(get_args(expected)[1], value, name)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        raise UsageError(f"{name}: expected {_KINDS[expected]}, got {value!r}")
    return value


def _convert_table(kind: Any, value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}: expected a table, got {value!r}")
    return types.MappingProxyType({key: _convert(kind, item, f"{name}.{key}") for key, item in value.items()})


def _convert_list(kinds: Sequence[Any], value: Any, name: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name}: expected a list in brackets, got {value!r}")
        kinds = [kinds[0]] * len(value)
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise UsageError(f"{name}: expected a list of {len(kinds)} values, got {value!r}")
    return tuple(_convert(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


_KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}


def _nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
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
