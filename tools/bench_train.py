"""What a training step waits for: the trainer with its data near, far, kept in memory, and read in other ways.

    python -m tools.bench_train OUT [--sizes tiny middle] [--rounds 5] [--json RESULT.json] [--report docs/measured.md]
    python -m tools.bench_train OUT --device cuda [--batches 1 2 4 8 16 32]      # SwiFT at the published size

All cases of a size train the same network by the trainer's own loop in one process, and have their turn in every round, so
that what else the machine does meets all of them. Step times and waiting are those of `log.jsonl`; of each turn the first two
steps are not counted, before which a loader had time to fill up. Cases:

    in memory     the same batch again and again: what the network could do at most ("loader off")
    local         our loader, files on this machine, page cache warm
    50 ms away    our loader, through a server of our own (tools/shaping_server.py) that waits so long before each answer
    unaided       our reader, each batch read when it is asked for, nothing ahead
    .pt files     as SwiFT publishes it: one float16 file a frame, torch's DataLoader with one worker process

Medians over rounds, with the least and the largest; the ratio is taken within rounds. `--report` writes the table into a
document, between two lines `<!-- bench_train NAME -->` and `<!-- /bench_train -->`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fmristream import StreamingDataset, convert
from fmristream.ingest.options import ConvertOptions
from fmristream.stream.batch import Batch
from tools.bench_convert import machine
from tools.shaping_server import in_process
from train import loop
from train.config import Recipe, recipe_from
from train.data import Part
from train.launch import StopRequest, World
from train.state import Run

LATENCY_MS, MEGABYTES_PER_S = 50.0, 80.0
UNCOUNTED = 2  # first steps of each turn
CASES = ("in memory", "local", "50 ms away", "unaided", ".pt files")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, the data that it takes, and how many steps make a turn."""

    edge: int  # voxels of the cube
    frames: int  # of a run
    window: int
    batch: int
    steps: int
    model: Mapping[str, Any]
    normalize: str = "voxel-zscore"


_LAYERS: dict[str, Any] = {
    "name": "swift",
    "patch_size": [6, 6, 6, 1],
    "window_size": [4, 4, 4, 4],
    "first_window_size": [4, 4, 4, 4],
}
SIZES = {
    # recipes/swift_tiny_cpu.toml
    "tiny": Size(
        edge=24,
        frames=160,
        window=16,
        batch=8,
        steps=12,
        model=_LAYERS | {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6]},
    ),
    "middle": Size(
        edge=48,
        frames=100,
        window=20,
        batch=2,
        steps=7,
        model=_LAYERS | {"embed_dim": 36, "depths": [2, 2, 2], "num_heads": [3, 6, 12]},
    ),
    # recipes/swift_sex.toml
    "published": Size(
        edge=96,
        frames=60,
        window=20,
        batch=8,
        steps=22,
        normalize="global-zscore",
        model=_LAYERS
        | {"embed_dim": 36, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "last_layer_full_MSA": True},
    ),
}


@dataclass(kw_only=True)
class Case:
    """One way to have data, and what was seen of it in each round."""

    name: str
    run: Run
    steps: list[Mapping[str, Any]] = field(default_factory=list)  # of the turn under way
    frames_per_s: list[float] = field(default_factory=list)
    wait_percent: list[float] = field(default_factory=list)
    wait_ms: list[float] = field(default_factory=list)
    peak_gib: float | None = None

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """As a watcher of the log."""

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        """As a watcher of the log."""
        self.steps.append(dict(facts))

    def close(self) -> None:
        """As a watcher of the log."""


class Fed:
    """Batches that come otherwise, in the place of our loader; its state is that of the one it replaces."""

    counts = None
    epoch = 0

    def __init__(self, batches: Iterator[Batch], own: Any) -> None:
        self._batches, self._own = batches, own

    def __iter__(self) -> Iterator[Batch]:
        while True:  # not handed over: whoever stops iterating would close them
            yield next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Where the replaced loader stands."""
        return self._own.state_dict()


class Frames(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows from one file a frame: (1, t, x, y, z) float32."""

    def __init__(self, folder: Path, *, windows: int, length: int) -> None:
        self.folder, self.windows, self.length = folder, windows, length

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        names = [self.folder / f"{number}-{frame}.pt" for frame in range(self.length)]
        bold = torch.stack([torch.load(name, weights_only=True) for name in names])
        return {"bold": bold[None].float(), "window": torch.tensor(number)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and tell."""
    chosen = _parser().parse_args(arguments)
    out = chosen.out.resolve()
    device = torch.device(chosen.device)
    sizes = {
        name: SIZES[name] for name in chosen.sizes or (["published"] if chosen.device == "cuda" else ["tiny", "middle"])
    }
    rows: list[dict[str, Any]] = []
    for name, size in sizes.items():
        data = made(out / "data" / name, size)
        if device.type == "cuda":
            rows += sweep(name, size, data, out=out, device=device, batches=chosen.batches, rounds=chosen.rounds)
        else:
            rows += measured(name, size, data, out=out, device=device, cases=chosen.cases, rounds=chosen.rounds)
    about = {**machine(out), "device": device_name(device), "threads": torch.get_num_threads(), "rounds": chosen.rounds}
    text = "\n".join([sentence(about), "", *table(rows)])
    print(text)
    if chosen.json:
        chosen.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    if chosen.report:
        put(chosen.report, chosen.device, text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder on the disk to be measured; data that are made are kept there")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32], help="sweep on a GPU")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--report", type=Path, metavar="DOCUMENT")
    return parser


def sentence(about: Mapping[str, Any]) -> str:
    """On what it was measured."""
    device = "" if about["device"] == "CPU" else f"{about['device']}; "
    return (
        f"{device}{about['cpus']} CPUs of {about['cpu']}, {about['memory_gb']} GB, {about['system']}, {about['disk']}; Python "
        f"{about['python']}, torch {about['packages']['torch']}, {about['threads']} threads; {about['rounds']} rounds; load "
        f"{about['load'][0]:.1f} when it was read."
    )


def device_name(device: torch.device) -> str:
    """What computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def made(folder: Path, size: Size) -> Path:
    """The data of a size, converted once."""
    if not folder.exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        shape = "x".join([str(size.edge)] * 3)
        convert(
            f"synth://?subjects=12&shape={shape}&frames={size.frames}",
            str(folder),
            options=ConvertOptions(split="exact", split_ratios=(0.7, 0.1, 0.2)),
        )
    return folder


def recipe_of(size: Size, url: str, *, batch: int) -> Recipe:
    """As a recipe has it; nothing is scored and no checkpoint falls into a turn."""
    data = {"url": url, "window": size.window, "grid": [size.edge] * 3, "normalize": size.normalize}
    data |= {"val_split": "", "test_split": ""}
    train = {"steps": 10**6, "batch_size": batch, "checkpoint_every": 10**6, "keep_last": 1}
    return recipe_from({"data": data, "model": dict(size.model), "train": train})


def measured(
    name: str, size: Size, data: Path, *, out: Path, device: torch.device, cases: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Every case of a size in turns; a row for each."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))
        url = stack.enter_context(in_process(data.parent, latency_ms=LATENCY_MS, megabytes_per_s=MEGABYTES_PER_S))
        opened = [
            opened_case(case, size, f"{url}/{data.name}" if case == "50 ms away" else str(data), out, device, stack)
            for case in cases
        ]
        take_turns(opened, rounds=rounds, steps=size.steps)
    base = next((case for case in opened if case.name == "in memory"), opened[0])
    weights = sum(parameter.numel() for parameter in base.run.model.parameters())
    about = f"{name}: {size.edge}³ × {size.window}, {weights / 1e6:.2g} M weights, batch {size.batch}"
    return [row_of(case, base, about=about) for case in opened]


def opened_case(
    name: str, size: Size, url: str, out: Path, device: torch.device, stack: ExitStack, *, batch: int | None = None
) -> Case:
    """A run of the trainer that has its data so."""
    recipe = recipe_of(size, url, batch=batch or size.batch)
    folder = out / "runs" / f"{name.replace(' ', '-')}-{size.edge}-{recipe.train.batch_size}"
    forget(folder)
    run = loop.start(recipe, out=folder, world=World(device=device), stack=stack)
    if name in ("in memory", "unaided", ".pt files"):
        kept = next(iter(run.train.loader))
        kept = replace(kept, packed=None if kept.packed is None else kept.packed.clone())
        fed = Fed(feed(name, run.train.clips, kept, out), run.train.loader)
        run.train = Part(clips=run.train.clips, loader=fed)  # type: ignore[arg-type]
    case = Case(name=name, run=run)
    run.log.join(case)
    return case


def forget(folder: Path) -> None:
    """Remove an earlier measurement's run: a new one would go on from it."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def feed(name: str, clips: StreamingDataset, kept: Batch, out: Path) -> Iterator[Batch]:
    """Batches for ever, like one that our loader made."""
    if name == "in memory":
        while True:
            yield kept
    elif name == "unaided":
        yield from unaided(clips, kept)
    else:
        yield from from_files(clips, kept, out)


def unaided(clips: StreamingDataset, kept: Batch) -> Iterator[Batch]:
    """The same windows as in memory, read and normalised by the thread that trains."""
    from fmristream.stream.window_reader import Scratch

    scratch, place = Scratch(), 0
    while True:
        assert kept.packed is not None
        packed = torch.empty_like(kept.packed)
        for row in range(len(kept)):
            clips.read_packed(place % clips.num_windows, packed[row].numpy(), scratch)
            place += 1
        yield replace(kept, packed=packed)


def from_files(clips: StreamingDataset, kept: Batch, out: Path) -> Iterator[Batch]:
    """From one file a frame, by torch's own loader."""
    folder = out / "frames" / f"{clips.grid[0]}-{clips.window}"
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        unfinished.mkdir(parents=True, exist_ok=True)
        for number in range(clips.num_windows):
            bold = torch.from_numpy(clips.item(number)["bold"])[0]
            for frame in range(clips.window):
                torch.save(bold[..., frame].half().clone(), unfinished / f"{number}-{frame}.pt")
        unfinished.rename(folder)
    files = Frames(folder, windows=clips.num_windows, length=clips.window)
    loader = torch.utils.data.DataLoader(
        files,
        batch_size=len(kept),
        shuffle=True,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    while True:
        for found in loader:
            yield replace(kept, packed=None, placed=found["bold"])


def take_turns(cases: Sequence[Case], *, rounds: int, steps: int) -> None:
    """One round more than is counted: the first one allocates, and starts what there is to start."""
    for number in range(rounds + 1):
        for case in cases:
            case.steps.clear()
            run = case.run
            run.recipe = replace(run.recipe, train=replace(run.recipe.train, steps=run.step + UNCOUNTED + steps))
            print(f"round {number} of {rounds}: {case.name}", file=sys.stderr, flush=True)
            loop.fit(run, StopRequest())
            counted = case.steps[UNCOUNTED:]
            seconds = sum(step["seconds"] for step in counted)
            waited = sum(step["wait_s"] for step in counted)
            if number:
                case.frames_per_s.append(sum(step["frames"] for step in counted) / seconds)
                case.wait_percent.append(100 * waited / seconds)
                case.wait_ms.append(1000 * waited / len(counted))


def sweep(
    name: str, size: Size, data: Path, *, out: Path, device: torch.device, batches: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Local data and the same batch in memory for each batch size, until one does not fit into the GPU."""
    rows: list[dict[str, Any]] = []
    for batch in batches:
        about = f"{name}: {size.edge}³ × {size.window}, batch {batch}, bf16"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with ExitStack() as stack:
                stack.enter_context(redirect_stdout(StringIO()))
                cases = [
                    opened_case(case, size, str(data), out, device, stack, batch=batch)
                    for case in ("in memory", "local")
                ]
                take_turns(cases, rounds=rounds, steps=size.steps)
        except torch.OutOfMemoryError:
            rows.append({"about": about, "case": "does not fit into the GPU's memory"})
            break
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows += [row_of(case, cases[0], about=about) | {"peak_gib": peak} for case in cases]
        del cases
    return rows


def row_of(case: Case, base: Case, *, about: str) -> dict[str, Any]:
    """Medians over rounds, least and largest; the ratio to the base within rounds."""
    ratios = [own / its for own, its in zip(case.frames_per_s, base.frames_per_s, strict=True)]
    return {
        "about": about,
        "case": case.name,
        "wait_percent": spread(case.wait_percent),
        "wait_ms": spread(case.wait_ms),
        "frames_per_s": spread(case.frames_per_s),
        "of_base": spread(ratios),
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, largest)."""
    return statistics.median(values), min(values), max(values)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """As Markdown; a GPU's has its peak of memory, which two networks and the batches of both cases share."""
    has_memory = any("peak_gib" in row for row in rows)
    heads = ["network", "data", "device waits, % of a step", "ms of a step", "frames/s", "of the same batch in memory"]
    heads += ["GPU peak, both cases' networks"] if has_memory else []
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        if "frames_per_s" not in row:
            lines.append(f"| {row['about']} | {row['case']} |" + " |" * (len(heads) - 2))
            continue
        cells = [row["about"], row["case"]]
        for key, form in (("wait_percent", ".2f"), ("wait_ms", ".2f"), ("frames_per_s", ",.0f"), ("of_base", ".3f")):
            middle, least, largest = (format(value, form) for value in row[key])
            cells.append(f"{middle} ({least}–{largest})")
        cells += [f"{row['peak_gib']:.1f} GiB"] if "peak_gib" in row else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands between the document's two marks."""
    begin, end = f"<!-- bench_train {name} -->", "<!-- /bench_train -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{document}: has no lines {begin} and {end} to write between")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
