"""What data, code and machine a run was made with, noted at every start: what its report says of where numbers are from."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fmristream
from fmristream.errors import CorruptDataError
from fmristream.storage.urls import display_url
from train.files import read_json, write_json

if TYPE_CHECKING:
    from train.data import Part
    from train.state import Run

PROVENANCE_FILE = "provenance.json"

# Starts that are kept; a run that is preempted every hour for a month has fewer.
_MOST_STARTS = 1000
_GIT_TIMEOUT_S = 5.0


def note_start(run: "Run", *, resumed_from: str | None) -> None:
    """Add this start to what a run's folder says, by rank 0; names no subject and no secret of a URL."""
    if not run.world.is_main:
        return
    path = run.out / PROVENANCE_FILE
    try:
        before = read_json(path) or {}
    except CorruptDataError:  # a history of starts is not worth a run
        before = {}
    parts = {"train": run.train, "val": run.val, "test": run.test}
    starts = [
        *before.get("starts", []),
        {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": run.step,
            "resumed_from": resumed_from,
            "world_size": run.world.size,
            **code_facts(),
            **machine_facts(run.world.device),
        },
    ]
    clips = run.train.clips
    document = {
        "data": {
            "url": display_url(run.recipe.data.url),
            "content_digest": clips.content_digest,
            "generation_digest": clips.generation_digest,
            "parts": {name: part_facts(part) for name, part in parts.items() if part is not None},
        },
        "network": {
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "learning": sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad),
        },
        "starts": starts[-_MOST_STARTS:],
    }
    write_json(path, document)


def read_provenance(out: Path) -> Mapping[str, Any]:
    """What a run's folder says; empty where it says nothing."""
    return read_json(out / PROVENANCE_FILE) or {}


def part_facts(part: "Part") -> dict[str, Any]:
    """How much a part holds."""
    clips = part.clips
    return {
        "subjects": len(set(clips.runs.column("subject"))),
        "families": len(set(clips.runs.column("group"))),
        "runs": len(clips.runs),
        "windows": clips.num_windows,
        "selection_digest": clips.selection_digest,
        "left_out": dict(clips.left_out),
    }


def code_facts() -> dict[str, Any]:
    """Versions, and the commit where this is a checkout."""
    commit, is_changed = _commit(Path(__file__).resolve().parent)
    return {
        "fmristream": fmristream.__version__,
        "commit": commit,
        "changed_since_commit": is_changed,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What it runs on, without the machine's name."""
    return {
        "device": str(device.type),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu_count": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """(hex commit, whether tracked files differ from it); None where it is no checkout, or git does not answer."""
    git = shutil.which("git")
    if git is None:
        return None, None
    try:
        found = [
            subprocess.run(
                [git, "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", str(folder)])
        ]
    except (OSError, subprocess.SubprocessError):
        return None, None
    return found[0], bool(found[1])


def _processor() -> str:
    """The processor's name where the system tells it."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
