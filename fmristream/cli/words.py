"""Numbers and texts as people read them; nothing secret, nothing that moves a terminal's cursor."""

import json
import math
from typing import Any

from fmristream.storage.urls import display_url

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def shown_url(url: str) -> str:
    """A URL or path as it may be printed; the query of a synthetic cohort is no secret, it is all there is."""
    return url if url.startswith("synth://") else display_url(url)


def on_one_line(text: str) -> str:
    """The text without line breaks and other control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def size(count: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    step = min(max(int(math.log10(count)) // 3, 0), len(_UNITS) - 1) if count >= 1 else 0
    return f"{count:.0f} B" if step == 0 else f"{count / 1000**step:.3g} {_UNITS[step]}"


def number(count: int) -> str:
    """With thousands separated: 12,345."""
    return f"{count:,}"


def duration(seconds: float) -> str:
    """3 h 20 min, 4 min 10 s, 12 s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    if not minutes:
        return f"{left} s"
    return f"{minutes} min {left} s" if left else f"{minutes} min"


def plural(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number(count)} {noun}" if count == 1 else f"{number(count)} {noun}s"


def as_json(value: Any) -> str:
    """Indented JSON; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
