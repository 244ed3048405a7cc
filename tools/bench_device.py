"""Where windows are placed, and what a model eats: packed batches placed on the device beside volumes placed on the CPU.

    python tools/bench_device.py                      # 96^3 x 20 frames where there is a GPU, 48^3 x 8 on a CPU
    python tools/bench_device.py --grid 96 --frames 20 --batch 4 --json

Two questions. What does a batch cost from the loader's memory to a placed tensor on the device, in time and in bytes over the
bus, when it travels packed (int16, float16, float32) or placed by the CPU (float16, float32)? And how many frames a second
does the loader give, beside those that one SwiFT of the published size takes forward and backward? Ways of a question are
timed in turns, so that another's load on the machine meets all of them. Without a GPU the same code runs on the CPU, where
nothing crosses a bus, and the output says so.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.signal.orientation import Turn, placed_positions
from fmristream.stream.augment import SWIFT, Compose
from fmristream.stream.batch import Batch
from fmristream.stream.device import DeviceLoader
from train.models.swift import Swift
from train.models.swift_config import SwiftConfig

# SwiFT's crop of HCP's 2 mm grid, and the share of it that is brain: 230,000 of 565,000 voxels.
NATIVE, BRAIN = (75 / 96, 93 / 96, 81 / 96), 0.41
NO_GPU = "no GPU here: these are figures of a CPU standing in for the device; no GPU figure has been taken"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--grid", type=int, default=96 if has_gpu else 48, help="voxels along each axis")
    parser.add_argument("--frames", type=int, default=20 if has_gpu else 8, help="of a window")
    parser.add_argument("--batch", type=int, default=4 if has_gpu else 2, help="windows of a batch")
    parser.add_argument("--repeats", type=int, default=10, help="of each way")
    parser.add_argument("--threads", type=int, default=2, help="of the loader")
    parser.add_argument("--json", action="store_true", help="figures alone, for another program")
    options = parser.parse_args(arguments)
    figures = {"machine": machine(options), "place": place_figures(options), "appetite": appetite_figures(options)}
    print(json.dumps(figures, indent=1) if options.json else as_text(figures))
    return 0


def machine(options: argparse.Namespace) -> dict:
    """What it ran on."""
    device = torch.device(options.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        **{name: getattr(options, name) for name in ("grid", "frames", "batch", "repeats", "threads")},
        "note": "" if device.type == "cuda" else NO_GPU,
    }


def batches(options: argparse.Namespace) -> dict[str, tuple[Batch, int]]:
    """(batch, bytes that cross the bus) of each way to travel, in pinned memory where there is a GPU."""
    rng = np.random.default_rng(0)
    grid = (options.grid,) * 3
    native = tuple(round(share * options.grid) for share in NATIVE)
    mask = rng.random(native) < BRAIN
    voxels = int(mask.sum())
    count, shape = options.batch, (options.batch, 1, options.frames, voxels)
    common = {
        "positions": torch.from_numpy(placed_positions(mask, grid, Turn())),
        "grid": grid,
        "fill": torch.zeros(count, 1),
        "valid": torch.ones(count, dtype=torch.bool),
        "window": torch.arange(count),
        "start": torch.zeros(count, dtype=torch.int64),
        "subject": [""] * count,
        "run": [""] * count,
        "targets": {},
        "global_size": count,
        "position": 0,
    }
    stored = torch.from_numpy(rng.integers(-400, 400, shape, dtype=np.int16))
    of_runs = {
        "scale": torch.rand(count, voxels),
        "offset": torch.rand(count, voxels),
        "scale_row": torch.arange(count),
    }
    found = {"packed int16": Batch(packed=stored, **common, **of_runs)}
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        found[f"packed {name}"] = Batch(packed=(stored / 100).to(dtype), **common)
    pin = torch.cuda.is_available() and torch.device(options.device).type == "cuda"
    return {name: (batch.pin_memory() if pin else batch, bus_bytes(batch)) for name, batch in found.items()}


def bus_bytes(batch: Batch) -> int:
    """Of a batch's signal and what it needs to be read; positions cross once per dataset and are not counted."""
    tensors = (batch.packed, batch.scale, batch.offset)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def place_figures(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds (median) and bytes of each way to a placed tensor on the device."""
    device = torch.device(options.device)
    made = batches(options)
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    for name, (batch, size) in made.items():
        ways[f"{name}, placed on the device"] = (lambda batch=batch: batch.to(device), size)
    for name in ("float16", "float32"):
        batch = made[f"packed {name}"][0]
        size = options.batch * options.frames * options.grid**3 * batch.packed.element_size()
        ways[f"{name}, placed on the CPU"] = (lambda batch=batch: placed_on_host(batch, device), size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        for name, (way, _) in ways.items():
            took = timed(way, device)
            if turn:  # the first one allocates
                seconds[name].append(took)
    frames = options.batch * options.frames
    return {
        name: {
            "ms": 1e3 * statistics.median(seconds[name]),
            "frames_a_second": frames / statistics.median(seconds[name]),
            "bus_mb": size / 1e6,
        }
        for name, (_, size) in ways.items()
    }


def placed_on_host(batch: Batch, device: torch.device) -> torch.Tensor:
    """What loaders do that hand out volumes: scatter, pin, copy."""
    placed = batch.to("cpu").placed
    assert placed is not None
    return placed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else placed


def appetite_figures(options: argparse.Namespace) -> dict[str, float]:
    """Frames a second that the loader gives (alone, with augmentation) and that SwiFT takes, forward and backward."""
    frames = options.batch * options.frames
    with tempfile.TemporaryDirectory() as folder:
        shape = "x".join(str(round(share * options.grid)) for share in NATIVE)
        length = 6 * options.frames
        source = f"synth://?subjects=4&runs=1&shape={shape}&frames={length}&seed=1"
        fmristream.convert(source, f"{folder}/dataset", options=ConvertOptions(split="none"))
        found = {}
        for name, augment in (("loader", None), ("loader_augmented", Compose(SWIFT))):
            clips = fmristream.StreamingDataset(
                f"{folder}/dataset", window=options.frames, seed=1, normalize="global-zscore", grid=(options.grid,) * 3
            )
            loader = fmristream.StreamingLoader(clips, batch_size=options.batch, threads=options.threads)
            with DeviceLoader(loader, options.device, augment=augment) as ours:
                found[f"{name}_frames_a_second"] = frames / a_batch_of(ours, options)
    step = a_step(options)
    found["swift_frames_a_second"] = frames / step
    found["loader_over_swift"] = found["loader_frames_a_second"] / found["swift_frames_a_second"]
    return found


def a_batch_of(loader: DeviceLoader, options: argparse.Namespace) -> float:
    """Median seconds from one batch to the next, when nobody works on them."""
    seconds: list[float] = []
    device = torch.device(options.device)
    while len(seconds) <= options.repeats:
        source = iter(loader)
        for _ in range(len(loader)):
            seconds.append(timed(lambda source=source: next(source), device))
    return statistics.median(seconds[1:])


def a_step(options: argparse.Namespace) -> float:
    """Median seconds of SwiFT's forward and backward; bfloat16 on a GPU, float32 on a CPU."""
    device = torch.device(options.device)
    config = SwiftConfig(
        img_size=(*(options.grid,) * 3, options.frames),
        patch_size=(6, 6, 6, 1),
        embed_dim=36,
        depths=(2, 2, 6, 2) if options.grid >= 96 else (2, 2),
        num_heads=(3, 6, 12, 24) if options.grid >= 96 else (3, 6),
    )
    model = Swift(config).to(device)
    batch = torch.randn(options.batch, 1, *(options.grid,) * 3, options.frames, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model(batch).float().mean().backward()

    seconds = [timed(step, device) for _ in range(min(options.repeats, 5) + 1)]
    return statistics.median(seconds[1:])


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def as_text(figures: dict) -> str:
    """Tables for people."""
    about, place, appetite = figures["machine"], figures["place"], figures["appetite"]
    lines = [
        f"{about['device']}, torch {about['torch']} ({about['torch_threads']} threads), windows of {about['grid']}^3 x "
        f"{about['frames']}, batches of {about['batch']}",
        *([about["note"]] if about["note"] else []),
        "",
        f"{'way to a placed batch':38}{'ms':>9}{'frames/s':>10}{'MB to device':>14}",
    ]
    lines += [
        f"{way:38}{one['ms']:9.2f}{one['frames_a_second']:10.0f}{one['bus_mb']:14.1f}" for way, one in place.items()
    ]
    lines += ["", *(f"{name.replace('_', ' '):38}{value:9.1f}" for name, value in appetite.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
