"""Pseudonyms in place of subject labels: keyed hashes, so that only who has the key can tell who is who.

The pseudonym of a label is `p` and the first 16 hex digits of HMAC-SHA256(key, label). It takes the label's place in a
listing before anything is written, so that all that follows (names, splits, records, tables) never sees the label. Where
files lie and what they are called stays with the tasks that read them; it enters no table, and what errors say of it is
taken out of the reasons that are stored.
"""

import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from fmristream.catalog.tables import Participant
from fmristream.errors import SplitError, UsageError
from fmristream.ingest.options import ConvertOptions, Quarantined
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.ingest.sources.collection import known_collections
from fmristream.ingest.sources.listing import Skipped, label_of, without_suffix
from fmristream.ingest.splitting import read_split_file
from fmristream.storage.urls import display_url, local_path, scheme_of

KEY_BYTES = 32
_MAX_KEY_BYTES = 64 * 2**10
# Fewer different bytes than any 32 random ones have (probability below 1e-12): a password, or zeros.
_LEAST_DIFFERENT = 16

# 64 bits: among a million subjects two share a pseudonym with a probability of 3e-8, and that is an error.
_DIGITS = 16
_PSEUDONYM = re.compile(rf"p[0-9a-f]{{{_DIGITS}}}")
# No label begins with a zero byte, so that none of these is the pseudonym of one.
_VERIFIER = b"\0fmristream-pseudonyms-v1"
_FILE = b"\0file\0"
_KIND = "hmac-sha256"

_ENTITIES = ("session", "task", "acq", "run", "echo", "space", "res", "desc")
_PREFIXES = {"session": "ses"}
_PAIRS = re.compile(r"(?:[A-Za-z0-9]+-[A-Za-z0-9+.]+_)*(?:[A-Za-z0-9]+-)?[A-Za-z0-9+.]+")
_WORD = re.compile(r"[^\W_]+")
_BIDS_SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")
_FILE_LIKE = re.compile(
    r"\S*(?:[/\\]|sub-|\.(?:nii|hdr|img|mgz|mgh|gz|zip|tar|tgz|json|tsv|csv|parquet)\b)\S*", re.IGNORECASE
)
# BIDS gives these names, and a sentence about one that is missing says nothing without it.
_METADATA = re.compile(r"(?:participants\.tsv|dataset_description\.json)[:;,.]?")
_THE_FILE = "(file)"
# What columns of families and sites are called, besides what descriptions of collections say.
_OF_GROUPS = frozenset((
    "center", "centre", "family", "family_id", "familyid", "father_id", "hospital", "household", "household_id", "institution",
    "mother_id", "scanner", "site", "site_id", "siteid", "study_site",
))  # fmt: skip
_NOT_SAID = (
    "left out; the reason names a person and is not stored "
    "(convert --dry-run without --pseudonyms shows what headers tell)"
)
# Stand for a run's own key and name while everything else that looks like one is taken out.
_KEY, _NAME = "\0", "\1"


class Pseudonyms:
    """A key, and the pseudonyms that it gives. It is never printed and never sent to another process.

    Attributes:
        notes: what to know about the key file.
    """

    def __init__(self, key: bytes, *, notes: Sequence[str] = ()) -> None:
        self._key = key
        self.notes = tuple(notes)

    def __repr__(self) -> str:
        return "Pseudonyms(key not shown)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key of pseudonyms stays in the process that read it")

    def of(self, label: str) -> str:
        """The pseudonym of a label."""
        return f"p{self._hash(label.encode('utf-8', 'surrogateescape'))[:_DIGITS]}"

    @property
    def record(self) -> dict[str, str]:
        """What a generation says of the key: nothing that anybody could find it by."""
        return {"kind": _KIND, "verifier": self._hash(_VERIFIER)}

    def of_file(self, path: str) -> str:
        """A name for a file that has no labels, 16 hex digits."""
        return self._hash(_FILE + path.encode("utf-8", "surrogateescape"))[:_DIGITS]

    def _hash(self, message: bytes) -> str:
        return hmac.new(self._key, message, "sha256").hexdigest()


def read_key(path: str, *, target: str = "") -> Pseudonyms:
    """The key in a file: 32 random bytes or more, or as many in hex.

    Args:
        path: of a local file.
        target: the dataset, whose folder is no place for the key.

    Raises:
        UsageError: it is no such file.
    """
    if "://" in path and scheme_of(path) != "file":
        raise UsageError(f"--pseudonyms {display_url(path)}: a key is read from a local file only")
    path = local_path(path)
    if target and scheme_of(target) == "file" and f"{path}/".startswith(f"{local_path(target)}/"):
        raise UsageError(f"--pseudonyms {path}: the key lies in the dataset, where it undoes itself; move it elsewhere")
    try:
        with open(path, "rb") as file:
            data, mode = file.read(_MAX_KEY_BYTES + 1), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UsageError(f"--pseudonyms {path}: cannot be read: {error.strerror}") from error
    key = _as_bytes(data)
    if not KEY_BYTES <= len(key) <= _MAX_KEY_BYTES or len(set(key)) < _LEAST_DIFFERENT:
        raise UsageError(
            f"--pseudonyms {path}: expected {KEY_BYTES} random bytes or more, or as many in hex; make them with "
            f"`(umask 077; openssl rand -hex {KEY_BYTES} > {path})`"
        )
    is_open = stat.S_ISREG(mode) and bool(stat.S_IMODE(mode) & 0o077)
    note = f"{path}: others than its owner can read or change the key of the pseudonyms; chmod 600 it"
    return Pseudonyms(key, notes=[note] if is_open else [])


def _as_bytes(data: bytes) -> bytes:
    text = data.strip()
    if re.fullmatch(rb"(?:[0-9A-Fa-f]{2})+", text):
        return bytes.fromhex(text.decode("ascii"))
    return data


def require_same_key(document: Mapping[str, Any], pseudonyms: Pseudonyms | None, where: str) -> None:
    """Raise UsageError unless a generation's labels were made with this key, or without any.

    Args:
        document: of the generation.
        pseudonyms: of whoever wants to go on with it.
        where: the dataset, for the message.
    """
    recorded = document.get("pseudonyms")
    if recorded == (None if pseudonyms is None else pseudonyms.record):
        return
    if pseudonyms is None:
        raise UsageError(
            f"{where}: its subjects have pseudonyms; give --pseudonyms with the key that they were made with"
        )
    if recorded is None:
        raise UsageError(f"{where}: its subjects have their own labels; leave --pseudonyms out, or take a new folder")
    raise UsageError(f"{where}: its pseudonyms were made with another key; give --pseudonyms with that one")


def pseudonymised(listing: Listing, pseudonyms: Pseudonyms) -> Listing:
    """The listing without a label: in runs, their names and keys, participants, groups, and what was skipped.

    Raises:
        UsageError: two labels have one pseudonym, or another label of a run names its subject.
    """
    runs, rows = listing.runs, listing.participants
    labels = _labels(listing)
    names = {label: pseudonyms.of(label) for label in labels}
    require_different(names)
    _require_impersonal(runs, names)
    telling = frozenset(label for label in labels if _is_telling(label))
    own = [_of_run(run, pseudonyms, names, telling) for run in runs]
    known = _Known(telling=telling, names=names)
    skipped = [_of_skipped(file, pseudonyms, known) for file in listing.skipped]
    participants, left_out = _of_participants(rows, runs, names, telling)
    notes = [*listing.notes, *pseudonyms.notes]
    if left_out:
        notes.append(f"participants columns that hold labels of subjects are left out: {', '.join(left_out)}")
    if staying := _labels_that_stay(participants, {run.group for run in own}):
        notes.append(
            f"participants columns {', '.join(staying)} keep the labels of families or sites as they are: --group-by gives "
            "those of one column pseudonyms; leave the others out of the table, if they tell who somebody is"
        )
    return replace(
        listing,
        runs=tuple(sorted(own, key=lambda run: run.key)),
        participants=participants,
        skipped=tuple(sorted(skipped, key=lambda file: file.key)),
        notes=tuple(note for note in map(known.cleaned, notes) if note != _NOT_SAID),
    )


def _labels(listing: Listing) -> set[str]:
    """Everybody who is named, and every group."""
    of_runs = {label for run in listing.runs for label in (run.subject, run.group) if label}
    return of_runs | {str(row["subject"]) for row in listing.participants}


def is_pseudonym(text: str) -> bool:
    """Whether a text has the form of a pseudonym."""
    return _PSEUDONYM.fullmatch(text) is not None


def require_different(names: Mapping[str, str]) -> None:
    """Raise UsageError where two labels have one pseudonym."""
    if len(set(names.values())) != len(names):
        raise UsageError(
            "two labels have the same pseudonym under this key; make another key and convert into a new folder"
        )


def with_split(listing: Listing, listed: Mapping[str, str], pseudonyms: Pseudonyms) -> Listing:
    """A pseudonymised listing whose runs say the part that a split file gives them, by label or by pseudonym.

    Raises:
        SplitError: the file names not all of the subjects, one of them twice, or a part that nobody is in.
    """
    parts: dict[str, str] = {}
    subjects = {run.subject for run in listing.runs}
    for label, part in listed.items():
        name = label if label in subjects and is_pseudonym(label) else pseudonyms.of(label)
        if parts.setdefault(name, part) != part:
            raise SplitError("the split file names a subject by label and by pseudonym, in two parts; keep one line")
    missing = sorted(subject for subject in subjects if not parts.get(subject))
    if missing:
        shown = ", ".join(missing[:5])
        raise SplitError(f"the split file does not name {len(missing)} of the subjects ({shown}); add a line for each")
    empty = set(parts.values()) - {parts[subject] for subject in subjects}
    if empty:
        raise SplitError(f"the split file has the part {min(empty)}, and nobody with a run is in it; add somebody")
    return replace(listing, runs=tuple(replace(run, split=parts[run.subject]) for run in listing.runs))


class Labels:
    """How a conversion calls its subjects: by pseudonyms, or (without any) by their own labels.

    Args:
        pseudonyms: the key, None for own labels.
        found: the listing with their own labels.
        listing: the same under pseudonyms.
    """

    def __init__(self, pseudonyms: Pseudonyms | None, found: Listing, listing: Listing) -> None:
        labels = _labels(found)
        self._known = _Known(telling=frozenset(label for label in labels if _is_telling(label)), names={})
        self._runs = {run.name: run for run in listing.runs}
        self._pseudonyms = pseudonyms

    @property
    def record(self) -> dict[str, str] | None:
        """What a generation says of the key."""
        return None if self._pseudonyms is None else self._pseudonyms.record

    def require_same(self, document: Mapping[str, Any], where: str) -> None:
        """Raise UsageError where a generation calls subjects otherwise."""
        require_same_key(document, self._pseudonyms, where)

    def clean(self, quarantined: Iterable[Quarantined]) -> list[Quarantined]:
        """The same inputs, with reasons that can be stored."""
        return [one if self._pseudonyms is None else self._cleaned(one) for one in quarantined]

    def _cleaned(self, one: Quarantined) -> Quarantined:
        run = self._runs.get(one.name)
        if run is None:  # of the listing: clean already
            return one
        # Readers call the file by its key, which has no label any more.
        said = one.reason.replace(run.key, _KEY).replace(run.name, _NAME)
        said = self._known.cleaned(said, (run.url, run.mask_url or "", *run.sidecar_urls))
        return replace(one, reason=said.replace(_KEY, run.key).replace(_NAME, run.name))


def labelled(listing: Listing, options: ConvertOptions, *, target: str) -> tuple[Listing, ConvertOptions, Labels]:
    """What a conversion goes on with: under pseudonyms, and then with the parts of a split file in the listing.

    Raises:
        UsageError: the key file is none, or the listing cannot be told without labels.
        SplitError: the split file does not fit.
    """
    if options.pseudonyms is None:
        return listing, options, Labels(None, listing, listing)
    pseudonyms = read_key(options.pseudonyms, target=target)
    disguised = pseudonymised(listing, pseudonyms)
    labels = Labels(pseudonyms, listing, disguised)
    if options.split not in ("auto", "hash", "exact", "none"):
        disguised = with_split(disguised, read_split_file(options.split), pseudonyms)
        options = replace(options, split="auto")
    return disguised, options, labels


class _Known:
    """What must not be said."""

    def __init__(self, *, telling: frozenset[str], names: Mapping[str, str]) -> None:
        self._telling = frozenset(label.casefold() for label in telling)
        # Labels of several words cannot be looked up word by word.
        self._phrases = tuple(label for label in self._telling if not _WORD.fullmatch(label))
        self.names = names

    def named_in(self, text: str) -> bool:
        """Whether a text holds a label."""
        folded = text.casefold()
        if any(phrase in folded for phrase in self._phrases):
            return True
        return any(word in self._telling for word in _words(folded))

    def cleaned(self, text: str, paths: Sequence[str] = ()) -> str:
        """The text without these paths, their parts and anything that looks like a path; nothing of it if a label is left."""
        parts = {part for path in paths for part in (path, *re.split(r"[/!]+", path)) if len(part) >= 3 and "." in part}
        for part in sorted(parts | {without_suffix(part) for part in parts}, key=len, reverse=True):
            if len(part) >= 3:
                text = text.replace(part, _THE_FILE)
        text = _FILE_LIKE.sub(lambda found: found[0] if _METADATA.fullmatch(found[0]) else _THE_FILE, text)
        return _NOT_SAID if self.named_in(text) else text


def _words(text: str) -> set[str]:
    """Words of a text, and what a letter before or behind a number may hide: `s0132` is `s0132` and `0132`."""
    words = set(_WORD.findall(text))
    return words | {part for word in words for part in re.findall(r"\d+|\D+", word)}


def _is_telling(label: str) -> bool:
    """Whether a word that equals the label is likely to mean the subject: not 1, 01, 012, a, bc."""
    return len(label) >= (4 if label.isdecimal() else 3)


def _require_impersonal(runs: Sequence[SourceRun], names: Mapping[str, str]) -> None:
    """No session, task, ... that only one subject has may hold that subject's label: these labels stay."""
    owners: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for entity in _ENTITIES:
            owners.setdefault((entity, getattr(run, entity)), set()).add(run.subject)
    for (entity, value), subjects in owners.items():
        subject = next(iter(subjects))
        if len(subjects) == 1 and _is_telling(subject) and subject.casefold() in value.casefold():
            raise UsageError(
                f"--pseudonyms: a {entity} label of subject {names[subject]} holds the subject's own label, and {entity} labels "
                "are stored as they are; rename it, or give a table of runs"
            )


def _of_run(run: SourceRun, pseudonyms: Pseudonyms, names: Mapping[str, str], telling: frozenset[str]) -> SourceRun:
    group = names[run.group] if run.group else ""
    renamed = replace(run, subject=names[run.subject], group=group, called_by="pseudonyms")
    prefix, rest = f"sub-{run.subject}_", run.name.removeprefix(f"sub-{run.subject}_")
    if run.name.startswith(prefix) and _PAIRS.fullmatch(rest) and not _names_somebody(rest, run, telling):
        name = f"sub-{renamed.subject}_{rest}"
    else:  # a path, or a word of a path, may be anybody's name
        name = f"{label_of(renamed)}_file-{pseudonyms.of_file(run.name)}"
    return replace(renamed, name=name, key=name + run.key[len(without_suffix(run.key)) :])


def _names_somebody(rest: str, run: SourceRun, telling: frozenset[str]) -> bool:
    """Whether a BIDS name holds a label beside those of the subject and of what is stored as it is."""
    stored = {f"{_PREFIXES.get(entity, entity)}-{getattr(run, entity)}" for entity in _ENTITIES}
    left = "_".join(pair for pair in rest.split("_") if pair not in stored)
    is_own = _is_telling(run.subject) and run.subject.casefold() in left.casefold()
    return is_own or bool(telling & _words(left))


def _of_skipped(file: Skipped, pseudonyms: Pseudonyms, known: _Known) -> Skipped:
    """A file that is not a run, under a name that tells whose it is where that is known."""
    match = _BIDS_SUBJECT.search(file.key)
    words = sorted(set(_WORD.findall(file.key)))
    label = (
        match.group(1) if match else next((word for word in words if word in known.names and _is_telling(word)), None)
    )
    whose = f"sub-{pseudonyms.of(label)}_" if label is not None else ""
    suffix = file.key[len(without_suffix(file.key)) :]
    reason = file.reason
    if reason.startswith("its name says subject"):
        reason = "its name says another subject than its folder"
    return replace(
        file, key=f"{whose}file-{pseudonyms.of_file(file.key)}{suffix}", reason=known.cleaned(reason, (file.key,))
    )


def _of_participants(
    rows: Sequence[Participant], runs: Sequence[SourceRun], names: Mapping[str, str], telling: frozenset[str]
) -> tuple[tuple[Participant, ...], list[str]]:
    """Rows in the order of pseudonyms, and the columns that are left out: they hold labels. That of groups has pseudonyms."""
    groups = {run.subject: run.group for run in runs if run.group}
    columns = sorted({name for row in rows for name in row} - {"subject"})
    of_groups = {name for name in columns if _is_of_groups(rows, name, groups)}
    folded = frozenset(label.casefold() for label in telling)
    left_out = [name for name in columns if name not in of_groups and _names_subjects(rows, name, folded)]
    cleaned = [
        {
            "subject": names[str(row["subject"])],
            **{
                name: _group_name(value, names) if name in of_groups else value
                for name, value in row.items()
                if name != "subject" and name not in left_out
            },
        }
        for row in rows
    ]
    return tuple(sorted(cleaned, key=lambda row: str(row["subject"]))), left_out


def _labels_that_stay(participants: Sequence[Participant], groups: set[str]) -> list[str]:
    """Columns that are called as those of families and sites are, and hold no pseudonyms."""
    known = known_collections().values()
    named = {name for one in known for name in (*one.group_columns, *one.site_columns)}
    names = {name.casefold() for name in named} | _OF_GROUPS
    values = {
        column: {row.get(column) for row in participants} - {None}
        for column in sorted({name for row in participants for name in row})
        if column.casefold() in names
    }
    return [column for column, held in values.items() if held and not held <= groups]


def _is_of_groups(rows: Sequence[Participant], column: str, groups: Mapping[str, str]) -> bool:
    """Whether it is the column that the groups came from."""
    found = [(row.get(column), groups[str(row["subject"])]) for row in rows if str(row["subject"]) in groups]
    return bool(found) and all(_as_label(value) == group for value, group in found)


def _group_name(value: str | float | None, names: Mapping[str, str]) -> str | None:
    # A group of somebody who has no run: nobody needs it.
    return None if value is None else names.get(_as_label(value))


def _names_subjects(rows: Sequence[Participant], column: str, telling: frozenset[str]) -> bool:
    values = [(str(row["subject"]), _as_label(row[column])) for row in rows if row.get(column) is not None]
    if len(values) > 1 and all(_same(value, subject) for subject, value in values):
        return True
    return any(
        bool(telling & {value.casefold(), *_words(value.casefold())})
        or (_is_telling(subject) and subject.casefold() in value.casefold())
        for subject, value in values
    )


def _same(value: str, subject: str) -> bool:
    return value.removeprefix("sub-").lstrip("0") == subject.lstrip("0")


def _as_label(value: str | float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
