"""Collections with a layout of their own, described as data: one small TOML file says where runs lie and what paths mean.

The files of `collections/` describe those that are known; `--kind path/to/my.toml` brings another one. A description has:

    title, space                   what people read; the space of the runs
    layout                         "paths" (the patterns below) or "bids" (then only `recognise` and the columns count)
    [[runs]] path, labels, masks   a regular expression over paths, whose groups are subject, session, task, acq, run, echo,
                                   space, den, desc, site or free; labels where the path has none; masks, the first that exists,
                                   as templates of the groups and `{folder}`, where the run lies
             confounds             likewise a table of numbers, a row a frame; confounds_columns names them, where the
                                   table has no header line
    contains                       a piece of text that every path of a run has: what lacks it is passed over quickly
    subject                        a template of the groups, where no group is the subject
    prefer                         of several forms of a run (`desc`), the one that is taken unless --desc says another
    archives                       regular expressions: which archives are looked into
    [[left_out]] path, reason      files that are no runs of their own
    participants                   regular expressions: tables in the tree (`site` may be a group)
    subject_columns, group_columns, site_columns, subject_rewrite      of tables of participants
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from fmristream.errors import UsageError
from fmristream.storage.sources import read_source_range
from fmristream.storage.urls import display_url

_FOLDER = "collections"
_MAX_BYTES = 2**20
_LABELS = frozenset({"subject", "session", "task", "acq", "run", "echo", "space", "den", "desc", "site"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPattern:
    """Where one kind of run lies."""

    path: re.Pattern[str]
    labels: Mapping[str, str] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    confounds: tuple[str, ...] = ()
    confounds_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """A description, checked."""

    kind: str
    title: str
    layout: str = "paths"
    space: str = ""
    contains: str = ""
    runs: tuple[RunPattern, ...] = ()
    subject: str = "{subject}"
    prefer: tuple[str, ...] = ()
    archives: tuple[re.Pattern[str], ...] = ()
    left_out: tuple[tuple[re.Pattern[str], str], ...] = ()
    participants: tuple[re.Pattern[str], ...] = ()
    recognise: re.Pattern[str] | None = None
    subject_columns: tuple[str, ...] = ()
    group_columns: tuple[str, ...] = ()
    site_columns: tuple[str, ...] = ()
    subject_rewrite: tuple[str, str] | None = None

    def match(self, path: str) -> tuple[RunPattern, dict[str, str]] | None:
        """The pattern that a path fits, and its groups; None where it is no run."""
        if self.contains not in path:
            return None
        for pattern in self.runs:
            if found := pattern.path.search(path):
                groups = {name: text for name, text in found.groupdict().items() if text is not None}
                return pattern, {**pattern.labels, **groups}
        return None

    def looks_into(self, path: str) -> bool:
        """Whether an archive may hold runs of this collection."""
        return any(pattern.search(path) for pattern in self.archives)


@cache
def known_collections() -> Mapping[str, Collection]:
    """The collections that come with the package, by kind."""
    folder = resources.files(__package__).joinpath(_FOLDER)
    texts = {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in folder.iterdir()}
    return {kind: parse_collection(texts[kind], kind) for kind in sorted(texts)}


def read_collection(kind: str) -> Collection:
    """A known collection by its name, or one that the user describes in a TOML file.

    Raises:
        UsageError: there is none of that name, or the file is no description.
        StorageError: the file cannot be read.
    """
    known = known_collections()
    if kind in known:
        return known[kind]
    if not kind.lower().endswith(".toml"):
        names = ", ".join(("bids", "folder", *known))
        raise UsageError(f"--kind {kind}: known are {names}; or give the path of a .toml file that describes it")
    raw = read_source_range(kind, 0, _MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"{display_url(kind)}: larger than {_MAX_BYTES} bytes, which no description is")
    name = display_url(kind).rpartition("/")[2]
    return parse_collection(raw.decode("utf-8", "replace"), name[: -len(".toml")])


def parse_collection(text: str, kind: str) -> Collection:
    """A description from TOML.

    Raises:
        UsageError: it has other fields, or fields of other types.
    """
    try:
        return _collection(tomllib.loads(text), kind)
    except (tomllib.TOMLDecodeError, re.error, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"{kind}: not a description of a collection: {error}") from error


def _collection(raw: dict[str, Any], kind: str) -> Collection:
    patterns = tuple(
        RunPattern(
            path=re.compile(run.pop("path")),
            labels=_texts_by_name(run.pop("labels", {})),
            masks=_texts(run.pop("masks", ())),
            confounds=_texts(run.pop("confounds", ())),
            confounds_columns=_texts(run.pop("confounds_columns", ())),
        )
        for run in (dict(run) for run in raw.pop("runs", ()))
    )
    left_out = tuple((re.compile(one["path"]), str(one["reason"])) for one in raw.pop("left_out", ()))
    compiled: dict[str, Any] = {
        name: tuple(map(re.compile, _texts(raw.pop(name, ())))) for name in ("archives", "participants")
    }
    recognise = raw.pop("recognise", None)
    rewrite = _texts(raw.pop("subject_rewrite", ()))
    if rewrite:
        re.compile(rewrite[0])
    lists: dict[str, Any] = {
        name: _texts(raw.pop(name, ())) for name in ("prefer", "subject_columns", "group_columns", "site_columns")
    }
    texts: dict[str, Any] = {name: _text(value) for name, value in raw.items()}
    found = Collection(
        kind=kind,
        runs=patterns,
        left_out=left_out,
        recognise=None if recognise is None else re.compile(recognise),
        subject_rewrite=(rewrite[0], rewrite[1]) if rewrite else None,
        **compiled,
        **lists,
        **texts,
    )
    _check(found)
    return found


def _check(found: Collection) -> None:
    if found.layout not in ("paths", "bids"):
        raise ValueError(f"layout is {found.layout!r}, expected paths or bids")
    if found.layout == "paths" and not found.runs:
        raise ValueError("it has no [[runs]]")
    for pattern in found.runs:
        groups = set(pattern.path.groupindex) | set(pattern.labels)
        if unknown := set(pattern.labels) - _LABELS:
            raise ValueError(f"labels has {', '.join(sorted(unknown))}; known are {', '.join(sorted(_LABELS))}")
        for template in (found.subject, *pattern.masks, *pattern.confounds):
            try:
                template.format_map(dict.fromkeys((*groups, "folder"), ""))
            except (KeyError, IndexError) as error:
                raise ValueError(f"{template!r} uses {error}, which is no group of {pattern.path.pattern!r}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text is expected")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{values!r} where a list of texts is expected")
    return tuple(_text(value) for value in values)


def _texts_by_name(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def recognised(keys: Sequence[str], *, layout: str, as_path: Callable[[str], str] = str) -> list[Collection]:
    """The known collections of this layout that images form.

    At least half of the folders at the top must hold a run of it: a folder of this and that, one part of which is laid out
    like a collection, is none, and taking it for one would leave out the rest.

    Args:
        keys: relative paths of the images.
        layout: of the collections to think of.
        as_path: from a key to the path that patterns are matched with.
    """
    folders = {key.partition("/")[0] for key in keys}
    found = []
    for collection in known_collections().values():
        if collection.layout == layout:
            within = {key.partition("/")[0] for key in keys if _belongs(collection, as_path(key))}
            if within and 2 * len(within) >= len(folders):
                found.append(collection)
    return found


def _belongs(collection: Collection, path: str) -> bool:
    if collection.recognise is not None:
        return collection.recognise.search(path) is not None
    return collection.match(path) is not None
