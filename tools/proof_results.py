"""What finished cells gave: one JSON line each, appended by one process, enough to tell what code and recipe made it."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tools.proof_cells import MODELS, Cell, Settings, described, digest_of
from tools.proof_cohorts import Scores
from train.metrics import auroc

ROOT = Path(__file__).resolve().parents[1]
DRAWS = 2_000
QUANTILES = (0.025, 0.975)
_CODE = ("fmristream", "train", "tools/proof*.py", "tools/controls.py")

Line = Mapping[str, Any]


def line_of(cell: Cell, settings: Settings, scores: Scores, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished cell."""
    what = described(cell, settings)
    numbers: dict[str, Any] = {}
    for name, values in (("auroc", scores.score), ("shuffled_auroc", scores.shuffled)):
        numbers[name] = auroc(scores.truth, values)
        numbers[f"{name}_interval"] = np.quantile(auroc_draws(scores.truth, values), QUANTILES).tolist()
    return {
        "effect": cell.effect,
        "model": cell.model,
        "input": cell.input,
        "seed": cell.seed,
        "digest": digest_of(what),
        **numbers,
        **facts,
        "num_test": len(scores.subject),
        "described": what,
        "subject": list(scores.subject),
        "truth": scores.truth.tolist(),
        "score": scores.score.tolist(),
        "shuffled": scores.shuffled.tolist(),
        "code": code(),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def append(path: Path, line: Line) -> None:
    """Add one line, on the disk when this returns; one that a kill cut short is closed first."""
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_short else "") + json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Line]:
    """All whole lines; what a kill cut short is not one."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def key_of(line: Line) -> str:
    """The cell's key."""
    return Cell(**{name: line[name] for name in ("effect", "model", "input", "seed")}).key


def remaining(wanted: Sequence[Cell], lines: Iterable[Line], settings: Settings) -> list[Cell]:
    """Cells without a line that was made by the same description; other code or versions do not make it another one."""
    done = {line["digest"] for line in lines}
    return [cell for cell in wanted if digest_of(described(cell, settings)) not in done]


def expected_s(cell: Cell, lines: Iterable[Line], settings: Settings) -> float:
    """Seconds of one core that a cell will take: the median of those of its model and input so far, else what was measured once.

    Only lines of as many steps count.
    """
    known = [
        line["core_s"]
        for line in lines
        if (line["model"], line["input"]) == (cell.model, cell.input) and _steps(line) in (None, settings.steps)
    ]
    if known:
        return float(median(known))
    model = MODELS[cell.model]
    return model.expected_s if model.takes == "features" else model.expected_s * settings.steps / Settings().steps


def in_hours(seconds: float) -> str:
    """Core-hours, or minutes where it is less than one."""
    return f"{seconds / 3600:.1f} core-hours" if seconds >= 3600 else f"{seconds / 60:.0f} core-minutes"


@cache
def code() -> dict[str, str]:
    """The commit, where there is one, and a digest of the files that may decide a number."""
    state = hashlib.sha256()
    for pattern in _CODE:
        paths = [ROOT / pattern] if (ROOT / pattern).is_dir() else sorted(ROOT.glob(pattern))
        files = [path for top in paths for path in ([top] if top.is_file() else sorted(top.rglob("*.py")))]
        for path in files:
            state.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = told.stdout.strip()
    except OSError:
        commit = ""
    return {"commit": commit, "digest": state.hexdigest()[:16]}


@cache
def versions() -> dict[str, str]:
    """Of what computes."""
    from importlib.metadata import version

    import fmristream

    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {"fmristream": fmristream.__version__, "python": platform.python_version(), **packages}


def auroc_draws(truth: Sequence[float], scores: Sequence[float], *, draws: int = DRAWS) -> np.ndarray:
    """AUROC of resampled subjects of each class, (draws,); the same subjects are drawn for the same truth."""
    positive = np.asarray(truth) == 1
    values = np.asarray(scores, dtype=np.float64)
    wins = (np.sign(values[positive][:, None] - values[~positive][None, :]) + 1) / 2
    rng = np.random.default_rng(0)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in wins.shape)
    return ((rows @ wins) * columns).sum(axis=1) / wins.size


def _steps(line: Line) -> int | None:
    recipe = line["described"].get("recipe")
    return recipe["train"]["steps"] if recipe else None
