"""Environments of their own for loaders whose requirements do not fit ours, or each other's."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What is installed in each; torch is the one that this process has.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "indexed_gzip": ("indexed_gzip", "nibabel"),
    "litdata": ("torch", "litdata"),
    "mosaic": ("torch", "mosaicml-streaming"),
    "zarrs": ("zarr", "zarrs"),
}
_PROBE = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A Python to run a peer with, or why there is none."""

    python: str = ""
    versions: dict[str, str]
    missing: str = ""


def prepare(name: str, folder: Path) -> Environment:
    """Make the environment once; a failed installation is told, and tried again the next time."""
    if not name:
        return Environment(python=sys.executable, versions={})
    home = folder / name
    python = home / "bin" / "python"
    wanted = [_pinned(requirement) for requirement in REQUIREMENTS[name]]
    try:
        if not (home / "installed").exists():
            _run([sys.executable, "-m", "venv", "--clear", str(home)])
            _run([str(python), "-m", "pip", "install", "--quiet", *wanted])
            (home / "installed").touch()
        versions = json.loads(_run([str(python), "-c", _PROBE, *REQUIREMENTS[name]]))
    except subprocess.CalledProcessError as error:
        lines = [line for line in str(error.stderr).splitlines() if line.strip()] or [str(error)]
        return Environment(versions={}, missing=f"not installed: {lines[-1].strip()}")
    return Environment(python=str(python), versions=versions)


def _pinned(requirement: str) -> str:
    if requirement != "torch":
        return requirement
    return f"torch=={importlib.metadata.version('torch').partition('+')[0]}"


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
