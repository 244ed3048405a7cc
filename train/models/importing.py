"""From a checkpoint of somebody else to a network of ours: every option known, every name explained, or a refusal in a table."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fmristream.errors import UsageError
from train.models.load import (
    HEAD_OF_ANOTHER_TASK,
    WeightsError,
    find_misfits,
    leave_out,
    printable,
    shape_text,
)
from train.models.published import FAMILIES, Family, family_of

_ROWS_SHOWN = 40
_SEEN = "tensors"
_ASSUMED = "assumed: all published weights share it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Options that somebody named, and who: later ones replace earlier ones. `only_known` refuses names of no option."""

    by: str
    options: Mapping[str, Any]
    only_known: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table that a refusal shows."""

    kind: str
    name: str
    model: str
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Weights that fit a network of ours whole: its options and where each is known from, and what was left out and why."""

    network: str
    options: Mapping[str, Any]
    known_from: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    backbone: bool


def fit_weights(
    weights: Mapping[str, Tensor], network: str, *, source: str, told: Sequence[Told] = (), backbone: bool = False
) -> Fitted:
    """Find the network that the weights belong to and hold every name and shape against it.

    Args:
        weights: by published names, without wrappers.
        network: a name of `published.FAMILIES`.
        source: name of the weights in errors.
        told: options from elsewhere, the strongest last.
        backbone: leave the head behind, and take weights that have none.

    Raises:
        UsageError: an option is unknown, makes no sense, or is needed and not told.
        WeightsError: a name, a shape or a value does not fit; the text has a table.
    """
    family = _family(network, backbone=backbone)
    weights = family.renamed(weights)
    named = _named(family, told, network)
    _check_anchors(weights, network, source=source)
    seen = family.shown(weights, {name: value for name, (value, _) in named.items()})
    options, known_from = _options(family, seen, named, about=f"{source}: as {network}")
    own = _expected(family, options, backbone=backbone)
    ignored = {**family.ignored, **(HEAD_OF_ANOTHER_TASK if backbone else {})}
    wanted, left_out = leave_out(own, weights, ignored=ignored)
    misfits = [
        Row(kind=row.kind, name=row.name, model=shape_text(row.model), file=shape_text(row.weights))
        for row in find_misfits(own, wanted)
    ]
    contradictions = _contradictions(seen, named)
    if misfits:
        hints = [*_other_family(weights, network), *contradictions, *_head_hint(family, misfits)]
        raise _refusal(source, network, misfits, expected=len(own), hints=hints)
    if contradictions:
        raise UsageError(f"{source}: {'; '.join(contradictions)}: say one thing, or leave it to the tensors")
    _check_values(wanted, own, network, source=source)
    return Fitted(
        network=network,
        options=options,
        known_from=known_from,
        tensors={name: wanted[name] for name in own},
        ignored=left_out,
        backbone=backbone,
    )


def build_fitted(fitted: Fitted) -> nn.Module:
    """The network, with the weights in it; without its head's if they were left behind."""
    return load_fitted(fitted.network, fitted.options, fitted.tensors, backbone=fitted.backbone)


def load_fitted(
    network: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], *, backbone: bool
) -> nn.Module:
    """Build a network and load all of it, or all but a head that begins anew.

    Raises:
        WeightsError: a name or a shape does not fit.
    """
    family = _family(network, backbone=backbone)
    model = family.build(options)
    own = {name: tensor for name, tensor in model.state_dict().items() if not (backbone and _in_head(family, name))}
    misfits = find_misfits(own, tensors)
    if misfits:
        raise WeightsError(f"{network}: {len(misfits)} names do not fit, the first is {misfits[0]}; import them again")
    model.load_state_dict({**model.state_dict(), **tensors}, strict=True)
    return model


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE with a value as in TOML; what is not TOML is taken as text."""
    import tomllib

    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise UsageError(f"--set {text}: expected NAME=VALUE, for example num_heads=[3, 6, 12, 24]")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return name, value
    return name, parsed["value"] if len(parsed) == 1 else value


def _family(network: str, *, backbone: bool) -> Family:
    if network not in FAMILIES:
        raise UsageError(f"there is no import for {network!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[network]
    if backbone and not family.head:
        having = ", ".join(name for name, other in FAMILIES.items() if other.head)
        raise UsageError(f"{network} has no head that could be left behind; only {having} has")
    return family


def _named(family: Family, told: Sequence[Told], network: str) -> dict[str, tuple[Any, str]]:
    """What was told, with who told it."""
    return {name: (value, one.by) for one in told for name, value in _known(family, one, network).items()}


def _options(
    family: Family, seen: Mapping[str, Any], named: Mapping[str, tuple[Any, str]], *, about: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """All options and where each is known from; what is told stands above what is seen, so that the table shows both."""
    defaults = {item.name: item.default for item in fields(family.config)}
    values = {name: (defaults[name], _ASSUMED) for name in family.assumed}
    values |= {name: (value, _SEEN) for name, value in seen.items()}
    values |= {name: value for name, value in named.items() if name in family.options}
    asked = {name: what for name, what in family.asked.items() if name not in values}
    if asked:
        width = max(map(len, asked))
        raise UsageError(
            f"{about}, {len(asked)} option{'s' * (len(asked) > 1)} cannot be seen in the tensors, and a wrong one would "
            "compute something else without complaint; give them by --set NAME=VALUE or --config FILE\n"
            + "\n".join(f"  {name:{width}}  {what}" for name, what in asked.items())
        )
    return {name: value for name, (value, _) in values.items()}, {name: by for name, (_, by) in values.items()}


def _known(family: Family, told: Told, network: str) -> dict[str, Any]:
    """What was told in our names; names of no option are left out, or refused where a person wrote them."""
    known = {*family.options, *family.hints}
    options = dict(told.options)
    if family.sizes and "size" in options:
        size = options.pop("size")
        if size not in family.sizes:
            raise UsageError(f"{told.by} size: {network} has no size {size!r}; known: {', '.join(family.sizes)}")
        options = {**family.sizes[size], **options}
    renamed = {family.aliases.get(name, name): value for name, value in options.items()}
    unknown = [name for name in renamed if name not in known]
    if unknown and told.only_known:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise UsageError(f"{told.by} {unknown[0]}: {network} has no such option; {hint}")
    return {name: value for name, value in renamed.items() if name in known}


def _expected(family: Family, options: Mapping[str, Any], *, backbone: bool) -> dict[str, Tensor]:
    """The network's own tensors, without memory behind them."""
    with torch.device("meta"):
        own = family.build(options).state_dict()
    return {name: tensor for name, tensor in own.items() if not (backbone and _in_head(family, name))}


def _in_head(family: Family, name: str) -> bool:
    return bool(family.head) and name.startswith(family.head)


def _check_anchors(weights: Mapping[str, Tensor], network: str, *, source: str) -> None:
    """Weights of something else: there is no network to hold them against, so all that is known goes into the table."""
    family = FAMILIES[network]
    absent = [name for name in family.anchors if name not in weights]
    if not absent:
        return
    rows = [Row(kind="missing", name=name, model="any size", file="-") for name in absent]
    rows += [
        Row(kind="unexpected", name=name, model="-", file=shape_text(tuple(tensor.shape)))
        for name, tensor in weights.items()
        if not _may_belong(name, family)
    ]
    raise _refusal(source, network, rows, expected=None, hints=_other_family(weights, network))


def _may_belong(name: str, family: Family) -> bool:
    """Whether the name begins as one of the family's does, as far as that is known without its sizes."""
    beginnings = tuple(anchor.split(".")[0] + "." for anchor in family.anchors)
    return name.startswith((*beginnings, *family.ignored, *([family.head] if family.head else [])))


def _other_family(weights: Mapping[str, Tensor], network: str) -> list[str]:
    other = family_of(weights)
    return [] if other in (None, network) else [f"these are names of {other}: did you mean --as {other}?"]


def _contradictions(seen: Mapping[str, Any], named: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Where what was told differs from what the tensors show."""
    return [
        f"{name} is {named[name][0]} by {named[name][1]}, and {value} by the tensors"
        for name, value in seen.items()
        if name in named and _plain(named[name][0]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _head_hint(family: Family, rows: Sequence[Row]) -> list[str]:
    in_head = family.head and all(_in_head(family, row.name) for row in rows)
    return ["only the head does not fit: --backbone imports the weights without it"] if in_head else []


def _check_values(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], network: str, *, source: str) -> None:
    """Refuse values that are not finite, and numbers of another kind than the network's."""
    kinds = [
        Row(kind="dtype", name=name, model=_dtype(own[name]), file=_dtype(tensor))
        for name, tensor in weights.items()
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex()
    ]
    if kinds:
        raise _refusal(source, network, kinds, expected=len(own), hints=[])
    counts = {name: int(torch.isfinite(tensor).logical_not().sum()) for name, tensor in weights.items()}
    rows = [
        Row(kind="not finite", name=name, model="numbers", file=f"{count} of {weights[name].numel()} NaN or infinite")
        for name, count in counts.items()
        if count
    ]
    if rows:
        hint = "training diverged before this was saved, or the file is damaged: take an earlier checkpoint"
        raise _refusal(source, network, rows, expected=len(own), hints=[hint])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refusal(
    source: str, network: str, rows: Sequence[Row], *, expected: int | None, hints: Sequence[str]
) -> WeightsError:
    """One sentence, the table, and what may have gone wrong."""
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in rows).items())
    of = "" if expected is None else f", of {expected} expected"
    lines = [f"{source}: refused as {network}: {len(rows)} tensors do not fit ({counts}{of}); nothing is taken from it"]
    return WeightsError("\n".join([*lines, *table(rows), *hints]))


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines under a heading, the first ones of many, with what is left out counted by kind."""
    shown = [Row(kind="", name="tensor", model="network", file="file"), *rows[:_ROWS_SHOWN]]
    widths = [max(len(getattr(row, part)) for row in shown) for part in ("kind", "name", "model")]
    lines = [
        f"{row.kind:{widths[0]}}  {printable(row.name):{widths[1]}}  {row.model:{widths[2]}}  {row.file}".rstrip()
        for row in shown
    ]
    left = Counter(row.kind for row in rows[_ROWS_SHOWN:])
    return [*lines, *(f"... and {count} more {kind}" for kind, count in left.items())]
