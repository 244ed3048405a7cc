"""What the models cost: SwiFT beside the published arithmetic, and every model's size, frames a second and memory in one table.

    python tools/bench_models.py                      # both parts: about 6 minutes on 2 cores that nobody else uses
    python tools/bench_models.py swift                # SwiFT at the published size, ours beside the plain way
    python tools/bench_models.py table --models tff3 brainlm
    python tools/bench_models.py --quick              # small sizes, half a minute: does everything run?

SwiFT: the plain way is the oracle of the tests, which cuts explicit windows and adds explicit masks as published, with the
same weights. Both take turns in one process, so that whatever else the machine does meets both; each peak of memory is
taken in a process of its own, where nothing of the other way was ever allocated. On a GPU: batch 8, bfloat16 by autocast
for all ways, ours also compiled, and how much of the device's arithmetic a step uses.

Table: one step (forward and backward of the mean square of the output, no optimiser) per model, each in its own process.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from fmristream.errors import FmriStreamError
from tests.train.models.plain_swift import plain_swift
from train import models
from train.models.brainlm import Brainlm
from train.models.brainlm_config import brainlm_config, vitmae_config
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.cnn_rnn import build_cnn_rnn
from train.models.mae4d import Mae4dPretrain, build_mae4d, build_mae4d_pretrain
from train.models.series_nets import build_lstm, build_mlp
from train.models.swift import Swift
from train.models.swift_config import SwiftConfig
from train.models.tff import build_tff

# What issue and documentation promise: times as fast as the plain way, and share of its memory.
GOALS = {"cpu": {"ours": 2.1, "memory": 0.45}, "cuda": {"ours": 2.5, "compiled": 3.0, "memory": 0.5}}
# Dense bfloat16 without sparsity, from the makers' data sheets, FLOP/s; the first name that is found counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
PUBLISHED: dict[str, Any] = {
    "img_size": (96, 96, 96, 20),
    "patch_size": (6, 6, 6, 1),
    "embed_dim": 36,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
}
QUICK: dict[str, Any] = PUBLISHED | {"img_size": (48, 48, 48, 8), "depths": (2, 2), "num_heads": (3, 6)}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model at one size, and the tensors of one batch of it."""

    about: str
    frames: int
    model: nn.Module
    inputs: tuple[Tensor, ...]


def swift_work(batch: int, quick: bool) -> Work:
    """SwiFT's backbone."""
    config = SwiftConfig(**(QUICK if quick else PUBLISHED))
    x, y, z, t = config.img_size
    return Work(
        about=f"E{config.embed_dim}, {x} x {y} x {z} x {t}",
        frames=batch * t,
        model=Swift(config),
        inputs=(torch.randn(batch, 1, *config.img_size),),
    )


def tff_work(phase: str) -> Callable[[int, bool], Work]:
    """A phase of TFF, all frames at once."""

    def work(batch: int, quick: bool) -> Work:
        size = (27, 31, 29, 4) if quick else (75, 93, 81, 8)
        model = build_tff(phase, {"img_size": size, **({"intermediate_vec": 160} if quick else {})})
        return Work(
            about=" x ".join(map(str, size)),
            frames=batch * size[3],
            model=model,
            inputs=(torch.randn(batch, 2, *size),),
        )

    return work


def brainlm_work(size: str) -> Callable[[int, bool], Work]:
    """BrainLM's token model with the published share of hidden tokens."""

    def work(batch: int, quick: bool) -> Work:
        parcels = 40 if quick else 424
        model = Brainlm(brainlm_config({"size": size}))
        return _series_work(f"{size}, {parcels} parcels x 200", model, batch=batch, parcels=parcels)

    return work


def vitmae_work(size: str) -> Callable[[int, bool], Work]:
    """BrainLM's image model; --quick takes the smallest."""

    def work(batch: int, quick: bool) -> Work:
        name = "13m" if quick else size
        model = BrainlmVitmae(vitmae_config({"size": name}))
        return _series_work(f"{name}, 424 parcels x 200", model, batch=batch, parcels=424)

    return work


def cnn_rnn_work(batch: int, quick: bool) -> Work:
    """The CNN-RNN with its own frames' network, a chunk of frames at a time."""
    size = (24, 24, 24, 8) if quick else (96, 96, 96, 20)
    model = build_cnn_rnn({"img_size": size, "checkpointing": True})
    return _volume_work("own network, in chunks of 8 frames", model, batch=batch, size=size)


class _Pretraining(nn.Module):
    """The masked autoencoder with noise of its own: what it predicted of the hidden patches."""

    def __init__(self, model: Mae4dPretrain) -> None:
        super().__init__()
        self.model = model

    def forward(self, bold: Tensor) -> Tensor:
        noise = torch.rand(len(bold), self.model.noise_size(bold.shape[5]), device=bold.device)
        predicted: Tensor = self.model(bold, noise=noise).predicted
        return predicted


def mae4d_work(size: str, *, is_pretraining: bool) -> Callable[[int, bool], Work]:
    """The masked autoencoder in a brain of a third of the grid's patches, as a template's is."""

    def work(batch: int, quick: bool) -> Work:
        name, grid = ("t", (32, 32, 32, 8)) if quick else (size, (96, 96, 96, 16))
        options = {"img_size": grid, "size": name}
        model = build_mae4d_pretrain(options) if is_pretraining else build_mae4d(options)
        model.set_brain(_ball(grid[:3]))
        about = f"{name}, of the brain's patches" + (" a quarter is shown" if is_pretraining else "")
        return _volume_work(about, _Pretraining(model) if is_pretraining else model, batch=batch, size=grid)

    return work


def _ball(grid: tuple[int, ...]) -> Tensor:
    """(x, y, z) bool: a ball of 27 % of the grid, about what a brain takes of a template's box."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in grid), indexing="ij")
    squares: Tensor = sum(axis.square() for axis in axes)  # type: ignore[assignment]
    return squares <= 0.8**2


def series_net_work(build: Callable[[Mapping[str, Any]], nn.Module]) -> Callable[[int, bool], Work]:
    """A network on the courses of parcels."""

    def work(batch: int, quick: bool) -> Work:
        parcels = 40 if quick else 424
        model = build({"parcels": parcels, "frames": 200})
        inputs = (torch.randn(batch, parcels, 200),)
        return Work(about=f"{parcels} parcels x 200", frames=batch * 200, model=model, inputs=inputs)

    return work


def _volume_work(about: str, model: nn.Module, *, batch: int, size: tuple[int, ...]) -> Work:
    x, y, z, t = size
    inputs = (torch.randn(batch, 1, *size),)
    return Work(about=f"{about}, {x} x {y} x {z} x {t}", frames=batch * t, model=model, inputs=inputs)


def _series_work(about: str, model: nn.Module, *, batch: int, parcels: int) -> Work:
    inputs = (torch.randn(batch, parcels, 200), torch.randn(parcels, 3))
    return Work(about=about, frames=batch * 200, model=model, inputs=inputs)


# A model is one row: its name in the registry, and after a slash a size.
ROWS: Mapping[str, Callable[[int, bool], Work]] = {
    "swift": swift_work,
    "tff1": tff_work("tff1"),
    "tff2": tff_work("tff2"),
    "tff3": tff_work("tff3"),
    "tff-contrast": tff_work("tff-contrast"),
    "brainlm/5m": brainlm_work("5m"),
    "brainlm/13m": brainlm_work("13m"),
    "brainlm-vitmae/111m": vitmae_work("111m"),
    "brainlm-vitmae/650m": vitmae_work("650m"),
    "cnn_rnn": cnn_rnn_work,
    "mae4d/s": mae4d_work("s", is_pretraining=False),
    "mae4d-pretrain/s": mae4d_work("s", is_pretraining=True),
    "mae4d-pretrain/b": mae4d_work("b", is_pretraining=True),
    "mlp": series_net_work(build_mlp),
    "lstm": series_net_work(build_lstm),
}
# 2.6 GB of weights, and as much of gradients: only where asked for.
LARGE = ("brainlm-vitmae/650m",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("part", nargs="?", choices=("all", "swift", "table"), default="all")
    parser.add_argument("--models", nargs="+", choices=ROWS, help="rows of the table; default: all but the largest")
    parser.add_argument("--rounds", type=int, default=5, help="of SwiFT; the table takes half as many")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the CPU; the table takes the last")
    parser.add_argument("--batch", type=int, default=8 if device == "cuda" else 1)
    parser.add_argument("--device", default=device)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=device == "cuda")
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's dense bfloat16 rate, where it is not known here"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="figures alone, for another program")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(run_worker(json.loads(options.worker))))
        return 0
    figures: dict[str, Any] = {"machine": machine(options)}
    if options.part in ("all", "swift"):
        figures["swift"] = swift_figures(options)
    if options.part in ("all", "table"):
        figures["table"] = table_figures(options)
    print(json.dumps(figures, indent=1) if options.json else as_text(figures))
    return 0


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What it ran on, and how."""
    on_gpu = options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "precision": "bfloat16 by autocast" if on_gpu else "float32",
        "batch": options.batch,
        "rounds": options.rounds,
        "size": "quick" if options.quick else "published",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# --- the parent: one process per measurement


def swift_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all ways by number of threads, and their peaks of memory."""
    on_gpu = options.device.startswith("cuda")
    ways = ["plain", "ours", *(["compiled"] if options.compile else [])]
    times = {
        str(threads): in_process(options, kind="time", ways=ways, threads=threads, rounds=options.rounds)
        for threads in ([1] if on_gpu else options.threads)
    }
    memory = {way: in_process(options, kind="memory", ways=[way], threads=1)["bytes"] for way in ways}
    flops = next(iter(times.values()))["flops"]
    found: dict[str, Any] = {"step_flops": flops, "peak_bytes": memory, "threads": {}}
    for threads, measured in times.items():
        found["threads"][threads] = {
            way: _way_figures(rows, measured["rounds"]["plain"], frames=measured["frames"], flops=flops)
            for way, rows in measured["rounds"].items()
        }
    rate = _peak_rate(options) if on_gpu else None
    if rate:
        for ways_found in found["threads"].values():
            for one in ways_found.values():
                one["share_of_peak"] = one["flops_a_second"] / rate
    found["memory_share"] = {way: size / memory["plain"] for way, size in memory.items()}
    return found


def _way_figures(
    rows: Sequence[Sequence[float]], plain: Sequence[Sequence[float]], *, frames: int, flops: float
) -> dict[str, Any]:
    """Medians over the rounds, and how many times as fast as the plain way, of the medians and in the worst and best round."""
    steps, plain_steps = ([sum(row) for row in one] for one in (rows, plain))
    step = statistics.median(steps)
    by_round = [theirs / ours for ours, theirs in zip(steps, plain_steps, strict=True)]
    return {
        "forward_s": statistics.median(row[0] for row in rows),
        "backward_s": statistics.median(row[1] for row in rows),
        "step_s": step,
        "frames_a_second": frames / step,
        "flops_a_second": flops / step,
        "speed": statistics.median(plain_steps) / step,
        "speed_of_rounds": [min(by_round), max(by_round)],
    }


def _peak_rate(options: argparse.Namespace) -> float | None:
    if options.peak_tflops:
        return float(options.peak_tflops) * 1e12
    name = torch.cuda.get_device_name(options.device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)


def table_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Every model's parameters, frames a second and peak, and the registry's models that have no row yet."""
    names = options.models or [name for name in ROWS if name not in LARGE]
    rounds = max(2, options.rounds // 2)
    rows = {
        name: in_process(options, kind="row", name=name, threads=options.threads[-1], rounds=rounds) for name in names
    }
    for row in rows.values():
        row["frames_a_second"] = row["frames"] / statistics.median(row["seconds"])
    with_row = {name.partition("/")[0] for name in ROWS}
    return {"threads": options.threads[-1], "rows": rows, "without_row": sorted(set(models.MODELS) - with_row)}


def in_process(options: argparse.Namespace, **task: Any) -> dict[str, Any]:
    """The figures of a worker."""
    task |= {"batch": options.batch, "device": options.device, "quick": options.quick}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FmriStreamError(f"bench_models: the worker of {task} ended with {done.returncode}; its message is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- the worker


def run_worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement in this process."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    work = {"time": time_swift, "memory": swift_memory, "row": measure_row}[task["kind"]]
    return work(task)


def time_swift(task: Mapping[str, Any]) -> dict[str, Any]:
    """(forward, backward) seconds of every way in every round; the first turn of each is not counted."""
    work = placed(swift_work(task["batch"], task["quick"]), task["device"])
    ways = {way: swift_way(way, work.model) for way in task["ways"]}
    rounds: dict[str, list[list[float]]] = {way: [] for way in ways}
    # A step of a GPU is short: several of them make one measurement.
    repeats = 5 if task["device"].startswith("cuda") else 1
    for turn in range(task["rounds"] + 1):
        for way, forward in ways.items():
            took = [step_seconds(forward, work, task["device"]) for _ in range(repeats)]
            if turn:
                rounds[way].append([statistics.median(part) for part in zip(*took, strict=True)])
    return {"rounds": rounds, "frames": work.frames, "flops": 3 * task["batch"] * forward_flops(work.model)}


def swift_way(way: str, model: Swift) -> Callable[..., Any]:
    """The plain way, ours, or ours compiled, all with the weights of `model`."""
    if way == "ours":
        return model
    if way == "compiled":
        return torch.compile(model, fullgraph=True)
    weights = dict(model.named_parameters())
    config = {name: getattr(model.config, name) for name in SwiftConfig.__slots__}
    return lambda bold: plain_swift(bold, weights, config)


def swift_memory(task: Mapping[str, Any]) -> dict[str, Any]:
    """Peak of one step above weights and input."""
    work = placed(swift_work(task["batch"], task["quick"]), task["device"])
    forward = swift_way(task["ways"][0], work.model)
    if task["ways"] == ["compiled"]:
        step_seconds(forward, work, task["device"])  # what the compiler needs is not the step's
    work.model.zero_grad(set_to_none=True)
    base = start_of_peak(task["device"])
    step_seconds(forward, work, task["device"])
    return {"bytes": peak_bytes(task["device"]) - base}


def measure_row(task: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, seconds of every step but the first, and the peak above what a process with torch has."""
    base = start_of_peak(task["device"])
    work = placed(ROWS[task["name"]](task["batch"], task["quick"]), task["device"])
    steps = [step_seconds(work.model, work, task["device"]) for _ in range(task["rounds"] + 1)]
    return {
        "about": work.about,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "frames": work.frames,
        "seconds": [sum(step) for step in steps[1:]],
        "peak_bytes": peak_bytes(task["device"]) - base,
    }


def placed(work: Work, device: str) -> Work:
    """The work on its device; plans of token orders are made there anew."""
    model = work.model.to(device)
    if isinstance(model, Swift):
        model.plan_clips(model.planned_frames)
    return Work(about=work.about, frames=work.frames, model=model, inputs=tuple(x.to(device) for x in work.inputs))


def step_seconds(forward: Callable[..., Any], work: Work, device: str) -> list[float]:
    """Seconds of forward and of backward, the device's work included."""
    work.model.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    wait()
    start = time.perf_counter()
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        out = forward(*work.inputs)
        loss = (out if isinstance(out, Tensor) else out.series).float().square().mean()
    wait()
    middle = time.perf_counter()
    loss.backward()
    wait()
    return [middle - start, time.perf_counter() - middle]


def _nothing() -> None:
    """A CPU has done its work when the call returns."""


def forward_flops(model: Swift) -> float:
    """Of one clip, multiplications and additions counted separately; norms, GELU and softmax are not counted."""
    config = model.config
    total = 0.0
    for number, stage in enumerate(model.layers):
        channels, frames = config.stage_channels(number), model.planned_frames
        grid = config.stage_grid(number)
        tokens = grid[0] * grid[1] * grid[2] * frames
        if number == 0:
            total += 2 * tokens * model.patch_embed.fc.in_features * channels
        for block in range(len(stage.blocks)):
            scores = sum(pieces * length**2 for pieces, length in stage.groups[block % 2])
            total += 24 * tokens * channels**2 + 4 * scores * channels
        if stage.downsample is not None:
            total += 2 * tokens / 8 * stage.downsample.reduction.weight.numel()
    return total


def start_of_peak(device: str) -> int:
    """Bytes held now, from which on the peak counts."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak is what is held now
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes held since `start_of_peak`: of tensors on a GPU, of the process on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# --- tables for people


def as_text(figures: Mapping[str, Any]) -> str:
    """Everything that was measured, with the goals."""
    about = figures["machine"]
    device = about["cpu"] if about["device"] == "cpu" else f"{about['device']} ({about['cpu']})"
    lines = [
        f"{device}, {about['cores']} cores, {about['instructions']}, torch {about['torch']}, {about['precision']}, "
        f"batch {about['batch']}, {about['size']} sizes, load {about['load']} at the start",
    ]
    # Small sizes only show that everything runs.
    goals = {} if about["size"] == "quick" else GOALS["cpu" if about["device"] == "cpu" else "cuda"]
    if "swift" in figures:
        lines += ["", *_swift_lines(figures["swift"], goals)]
    if "table" in figures:
        lines += ["", *_table_lines(figures["table"])]
    return "\n".join(lines)


def _swift_lines(found: Mapping[str, Any], goals: Mapping[str, float]) -> list[str]:
    lines = [
        f"SwiFT{'threads':>9} {'way':10}{'forward s':>10}{'backward s':>11}{'step s':>8}{'frames/s':>10}{'speed':>19}"
    ]
    for threads, ways in found["threads"].items():
        for way, one in ways.items():
            low, high = one["speed_of_rounds"]
            speed = f"{one['speed']:.2f} ({low:.2f}-{high:.2f})"
            share = f"  {one['share_of_peak']:.1%} of peak" if "share_of_peak" in one else ""
            lines.append(
                f"{threads:>14} {way:10}{one['forward_s']:10.3f}{one['backward_s']:11.3f}{one['step_s']:8.3f}"
                f"{one['frames_a_second']:10.1f}{speed:>19}{share}{_goal(one['speed'], goals.get(way), at_least=True)}"
            )
    for way, share in found["memory_share"].items():
        goal = None if way == "plain" else goals.get("memory")
        lines.append(
            f"  peak memory {way:10} {found['peak_bytes'][way] / 2**20:8.0f} MiB{share:6.2f} of plain"
            f"{_goal(share, goal, at_least=False)}"
        )
    return lines


def _goal(value: float, goal: float | None, *, at_least: bool) -> str:
    if goal is None:
        return ""
    is_met = value >= goal if at_least else value <= goal
    return f"  goal {'>=' if at_least else '<='} {goal}: {'met' if is_met else 'MISSED'}"


def _table_lines(found: Mapping[str, Any]) -> list[str]:
    head = f"{'model':22}{'size':28}{'parameters':>13}{'frames/s':>10}{'step s':>8}{'peak MiB':>10}"
    lines = [
        f"forward and backward, {found['threads']} threads; peak with weights and gradients, without optimiser",
        head,
    ]
    for name, row in found["rows"].items():
        lines.append(
            f"{name:22}{row['about']:28}{row['parameters']:13,}{row['frames_a_second']:10.1f}"
            f"{statistics.median(row['seconds']):8.2f}{row['peak_bytes'] / 2**20:10.0f}"
        )
    if found["without_row"]:
        lines.append(f"without a row here: {', '.join(found['without_row'])}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
