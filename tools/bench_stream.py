"""How fast random windows come out of our datasets, beside the published layouts and other loaders, on the same data.

    python -m tools.bench_stream OUT [--cases WORD ...] [--rounds 5] [--remote] [--json RESULT.json] [--plot PLOT.png]

Makes int16 runs of 91 x 109 x 91 voxels (noise of 1.6 % about a smooth image, 235,000 voxels in an ellipsoid, zeros
outside), and every layout of them, once, in OUT (about 7 GB). A task is a random window of 20 frames, delivered as z-scores
in float16: `masked` (20, voxels) or `placed` (20, 91, 109, 91). Every round each case has its turn, in a process of its own
that stays open, pinned to as many CPUs as it has threads, so that what else the machine does meets all of them. "ours x" is
the median over rounds of ours / it, with the same output and one thread (remote: with as many windows in flight, or 16);
"in CPU" is the same of CPU time per window, which says more where others use the machine.

Loaders that work ahead are timed in the middle of their work. The page cache is warm. Peers whose requirements conflict
run in environments that are made under OUT/envs; one that cannot be installed is told of, not left out.

`--remote` reads the same through a server of our own (`tools/shaping_server.py`) that waits 50 ms before each answer and
sends 80 MB/s on each connection; it runs beside the reader on the same CPUs. Bytes and requests are of one window, those
that were under way at the end included. Ours is held to so many windows in flight by its bound on bytes.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench_convert import SHAPE, machine
from tools.shaping_server import in_process
from tools.stream_peers import telling
from tools.stream_peers.cases import LOCAL, REMOTE, Case
from tools.stream_peers.data import Facts, make
from tools.stream_peers.environments import Environment, prepare
from tools.stream_peers.layouts import MAKERS, convert_ours
from tools.stream_peers.measure import make_layout, measure

PACKAGES = ("torch", "numpy", "zarr", "tensorstore", "webdataset", "nibabel", "fsspec", "aiohttp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and tell."""
    chosen = _parser().parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(out), "packages": {name: _version(name) for name in PACKAGES}}
    cases = wanted_cases(REMOTE if chosen.remote else LOCAL, chosen.cases)
    shape = tuple(int(size) for size in chosen.shape.split("x"))
    facts = prepared(out, shape=shape, frames=chosen.frames, runs=chosen.runs, window=chosen.window)
    environments = {name: prepare(name, out / "envs") for name in sorted({case.environment for case in cases})}
    told = make_layouts(cases, facts, environments)
    with _server(facts, chosen) as url:
        found = measure(
            [case for case in cases if case.name not in told],
            replace(facts, url=url),
            environments,
            rounds=chosen.rounds,
            round_s=chosen.seconds,
            most_windows=chosen.most_windows,
        )
    found += [telling.Measured(case=case, missing=told[case.name]) for case in cases if case.name in told]
    made = telling.rows(found, facts)
    title = f"{facts.window} frames of {facts.runs} runs x {facts.frames}, {int(facts.mask.sum()):,} voxels in mask"
    title += f", {chosen.latency_ms:g} ms, {chosen.megabytes_per_s:g} MB/s a connection" if chosen.remote else ", local"
    telling.print_rows(title, made)
    about["peers"] = {name: one.versions for name, one in environments.items() if name}
    print("\n" + "; ".join(f"{name} {number}" for name, number in _all_versions(about).items()))
    if chosen.json:
        chosen.json.write_text(json.dumps({**about, "title": title, "rounds": chosen.rounds, "cases": made}, indent=1))
    if chosen.plot:
        telling.draw(sections(made), chosen.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder on the disk to be measured; what is made is kept there")
    parser.add_argument("--cases", nargs="*", default=[], metavar="WORD", help="only those with a WORD in their name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case in each round, about")
    parser.add_argument("--most-windows", type=int, default=2000, help="of each case in each round")
    parser.add_argument("--remote", action="store_true", help="through a server that is far away")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--megabytes-per-s", type=float, default=80.0, help="of each connection")
    parser.add_argument("--shape", default="x".join(map(str, SHAPE)))
    parser.add_argument("--frames", type=int, default=120, help="of each run")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--window", type=int, default=20, help="frames")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    return parser


def wanted_cases(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Those with one of the words in their names, and ours that they are compared with; all where there are no words."""
    if not words:
        return list(cases)
    chosen = [case for case in cases if any(word in case.name for word in words)]
    if not chosen:
        raise SystemExit(f"no case has {' or '.join(words)} in its name; there are: {', '.join(c.name for c in cases)}")
    named = {case.name for case in cases}
    bases = {next((name for name in telling.bases_for(case) if name in named), "") for case in chosen}
    return [case for case in cases if case in chosen or case.name in bases]


def prepared(out: Path, *, shape: tuple[int, ...], frames: int, runs: int, window: int) -> Facts:
    """The data of this size, made once."""
    assert len(shape) == 3
    folder = out / f"{'x'.join(map(str, shape))}x{frames}-{runs}-{window}"
    if not (folder / "facts.json").exists():
        print(f"making runs and our datasets in {folder}", file=sys.stderr, flush=True)
        facts = convert_ours(make(folder, shape=shape, frames=frames, runs=runs, window=window))
        (folder / "facts.json").write_text(facts.text)
    return replace(Facts.load(folder), folder=str(folder))


def make_layouts(cases: Sequence[Case], facts: Facts, environments: dict[str, Environment]) -> dict[str, str]:
    """Whatever the cases read; case -> why its layout could not be made."""
    told = {}
    for case in cases:
        # Ours and NIfTI are there; others' own layouts are made where they are read.
        if case.layout not in MAKERS or environments[case.environment].missing or (facts.path / case.layout).exists():
            continue
        print(f"making layout {case.layout}", file=sys.stderr, flush=True)
        is_theirs = case.layout in ("mosaic", "litdata")
        python = environments[case.environment].python if is_theirs else sys.executable
        if reason := make_layout(case.layout, facts, python):
            told[case.name] = reason
    return told


@contextlib.contextmanager
def _server(facts: Facts, chosen: argparse.Namespace) -> Iterator[str]:
    """URL of the folder on a server, or nothing where it is read directly."""
    if not chosen.remote:
        yield ""
        return
    with in_process(facts.path, latency_ms=chosen.latency_ms, megabytes_per_s=chosen.megabytes_per_s) as url:
        yield url


def sections(made: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By output."""
    titles = {"masked": "in-mask values (20, v) float16", "placed": "whole grid (20, x, y, z) float16", "TFF": ""}
    titles["TFF"] = titles["placed"]  # cropped, and two channels
    found: dict[str, list[dict[str, Any]]] = {}
    for row in made:
        found.setdefault(titles[row["case"]["output"]], []).append(row)
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _all_versions(about: dict[str, Any]) -> dict[str, str]:
    return {**about["packages"], **{k: v for one in about["peers"].values() for k, v in one.items()}}


if __name__ == "__main__":
    sys.exit(main())
