"""What lies in a run's folder, read once for its page; what is missing there is missing on the page, and nothing fails."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmristream.errors import CorruptDataError
from fmristream.storage.urls import redacted
from train.leaks import read_audit
from train.log import History, lines_of, read_history
from train.provenance import read_provenance
from train.report_view import TargetView, read_report, targets_of

# Events of a log that tell how a run went on; steps and looks at validation are drawn.
_TOLD = ("start", "begin", "damaged", "changed", "stop", "skipped")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunFacts:
    """A finished run, as its folder tells it.

    Attributes:
        report: report.json.
        views: of its targets, or one without a target.
        history: of surviving steps; None where the log is missing or damaged.
        events: of the log, in order.
        recipe: its tables; empty where recipe.toml is missing.
        recipe_text: of recipe.toml, without what could name a subject or a secret.
        provenance: of data, code and machine.
        audit: of leaks; None where none was made.
    """

    report: Mapping[str, Any]
    views: Sequence[TargetView]
    history: History | None
    events: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Mapping[str, Any]]
    recipe_text: str
    provenance: Mapping[str, Any]
    audit: Mapping[str, Any] | None

    @property
    def beside(self) -> Mapping[str, Any]:
        """Baselines; empty before they were fitted."""
        return self.report.get("beside") or {}

    @property
    def objective_kind(self) -> str:
        """As the recipe has it."""
        return str(self.recipe.get("objective", {}).get("kind") or self.views[0].kind)

    @property
    def network_name(self) -> str:
        """As the recipe has it."""
        return str(self.recipe.get("model", {}).get("name") or "network")

    @property
    def target_names(self) -> list[str]:
        """Of all targets."""
        return [view.target for view in self.views if view.target is not None]

    @property
    def in_words(self) -> str:
        """The recipe in a sentence or two."""
        data, train, optim = (self.recipe.get(name, {}) for name in ("data", "train", "optim"))
        if not data or not train or not optim:
            return "The recipe of this run is not in its folder."
        weights = self.provenance.get("network", {}).get("parameters")
        size = f" of {weights:,} weights" if weights else ""
        learns = f"learnt {' and '.join(self.target_names)}" if self.target_names else "learnt without a target"
        window = f"windows of {data['window']} frames" if data.get("window") else "whole runs"
        grid = f" on a grid of {' × '.join(map(str, data['grid']))}" if data.get("grid") else ""
        began = self.recipe.get("start", {}).get("from")
        return (
            f"{self.network_name}{size} {learns} ({self.objective_kind}) from {window}{grid}, normalised by {data['normalize']}. "
            f"{self.report.get('step', train['steps'])} steps of {train['batch_size']}, AdamW at {optim['lr']:g}, schedule "
            f"{optim['schedule']}, seed {train['seed']}"
            + (f", begun with the weights of {redacted(began)}." if began else ".")
        )


def gather(out: Path) -> RunFacts:
    """Read a run's folder.

    Raises:
        UsageError: there is no report.json.
        CorruptDataError: it, or another document of the folder, is not what was written.
    """
    report = read_report(out)
    recipe, recipe_text = _recipe(out / "recipe.toml")
    return RunFacts(
        report=report,
        views=targets_of(report),
        history=_history(out / "log.jsonl"),
        events=_events(out / "log.jsonl"),
        recipe=recipe,
        recipe_text=recipe_text,
        provenance=read_provenance(out),
        audit=read_audit(out),
    )


def without_names(recipe_text: str) -> str:
    """A recipe as TOML without secrets of URLs, and without the words of a condition that may name subjects."""

    def masked(match: re.Match[str]) -> str:
        condition = match.group(2)
        if not re.search(r"\b(subject|participant_id|name|session|group|family\w*)\b", condition):
            return match.group(0)
        return match.group(1) + re.sub(r"""'[^']*'|\\"(?:[^"\\]|\\[^"])*\\\"""", "'...'", condition)

    return redacted(re.sub(r"(?m)^(where = )(.*)$", masked, recipe_text))


def _recipe(path: Path) -> tuple[Mapping[str, Mapping[str, Any]], str]:
    try:
        told = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, ""
    try:
        return tomllib.loads(told), without_names(told)
    except tomllib.TOMLDecodeError as error:
        raise CorruptDataError(
            f"{path}: is not the TOML that was written: {error}; restore it from the recipe"
        ) from error


def _history(path: Path) -> History | None:
    try:
        found = read_history(path)
    except (FileNotFoundError, CorruptDataError):
        return None
    return found if found.steps else None


def _events(path: Path) -> list[Mapping[str, Any]]:
    """What was told now and then; a line that a kill cut short is passed over."""
    try:
        lines = lines_of(path)
    except FileNotFoundError:
        return []
    found: list[Mapping[str, Any]] = []
    for line in lines:
        if '"event": "step"' in line[:20]:
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and entry.get("event") in _TOLD:
            found.append(entry)
    return found
