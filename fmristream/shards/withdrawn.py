"""Subjects that were withdrawn, remembered without their labels: so that an update does not take them in again.

A generation holds a random salt and, for each withdrawn subject, HMAC-SHA256(salt, label). Who holds the dataset can
test whether a label that he guesses is among them, and learns nothing else.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from fmristream.shards.generation import Generation

_SALT_BYTES = 16
_WORD = re.compile(r"[A-Za-z0-9]+")

Record = dict[str, Any]


def is_withdrawn(generation: Generation, subject: str) -> bool:
    """Whether a subject was withdrawn from the dataset."""
    record = generation.document.get("withdrawn")
    return record is not None and _mark(record["salt"], subject) in record["subjects"]


def names_withdrawn(generation: Generation, text: str) -> bool:
    """Whether a word of a text, the name of a file perhaps, is the label of a withdrawn subject."""
    return "withdrawn" in generation.document and any(is_withdrawn(generation, word) for word in _WORD.findall(text))


def without_withdrawn(generation: Generation, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the participants table whose cells of text name nobody who was withdrawn: such cells are empty."""
    return {
        name: None if name != "subject" and isinstance(value, str) and names_withdrawn(generation, value) else value
        for name, value in row.items()
    }


def last_withdrawal(generation: Generation) -> int:
    """Number of the version that the last subject was withdrawn by; 0 if nobody was."""
    record = generation.document.get("withdrawn")
    return 0 if record is None else int(record["generation"])


def with_withdrawn(generation: Generation, subjects: Iterable[str]) -> Record:
    """What the next generation says of withdrawn subjects."""
    record = generation.document.get("withdrawn") or {"salt": secrets.token_hex(_SALT_BYTES), "subjects": []}
    marks = {_mark(record["salt"], subject) for subject in subjects}
    return {
        "generation": generation.number + 1,
        "salt": record["salt"],
        "subjects": sorted(marks.union(record["subjects"])),
    }


def _mark(salt: str, subject: str) -> str:
    return hmac.new(bytes.fromhex(salt), subject.encode(), hashlib.sha256).hexdigest()
