"""synth:// URLs: a cohort that needs no disk, named by its parameters, as in synth://?subjects=8&shape=24x24x24."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from fmristream.errors import UsageError

TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def read_url(url: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the URL says, each value of the type of its default."""
    parts = urlsplit(url)
    if parts.scheme != "synth" or parts.netloc or parts.path or parts.fragment:
        raise UsageError(f"{url}: not the URL of a synthetic cohort, expected synth://?name=value&name=value")
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as problem:
        raise UsageError(f"{url}: what follows the question mark is not name=value&name=value: {problem}") from None
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name in values:
            raise UsageError(f"{url}: {name} is given twice; give it once")
        values[name] = _value(url, name, text, defaults)
    return values


def write_url(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The shortest URL that says these values, in the order of the defaults."""
    told = {name: _text(values[name]) for name in defaults if values[name] != defaults[name]}
    return f"synth://?{urlencode(told)}" if told else "synth://"


def _value(url: str, name: str, text: str, defaults: Mapping[str, Any]) -> Any:
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(defaults)}"
        raise UsageError(f"{url}: a synthetic cohort has no {name!r}; {hint}")
    read, expected = _READERS[type(defaults[name])]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise UsageError(f"{url}: {name} is {text!r}, expected {expected}") from None


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 3:
        raise ValueError(text)
    return sizes


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(str(size) for size in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: TRUTHS[text.lower()], "true or false"),
    tuple: (_shape, "three sizes, as in 24x24x24"),
}
