"""How fast a run is converted, beside programs that only decompress it and beside what others do to prepare it.

    python tools/bench_convert.py OUT [FILE.nii.gz ...] [--frames 240] [--rounds 5] [--json RESULT.json]

Makes an int16 and a float32 run of 91 x 109 x 91 voxels (BOLD-like noise of 1.6 % temporal SD in a quarter of the volume,
zeros outside, gzip -6), or takes the files named. Every round does each case once, one after the other, so that what
else the machine does meets all of them; ratios are medians of per-round ratios. `--frames 1200` is the size of an HCP run.

Ours is the whole task of one run: fingerprint, header, every frame, statistics, digests, writing with fsync, the record
of the finished run. Not timed: start of Python, compilation, finding the mask. Nobody's page cache is cold, and what one
case left to be written is on the disk before the next one starts.

The others' copies of a run take 20 times its frames' memory and up to eight times its bytes on disk: leave them out
(`--cases`) where runs are long.
"""

import argparse
import contextlib
import cProfile
import gzip
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (91, 109, 91)
TEMPORAL_SD = 0.016
DTYPES = {"int16": 4, "float32": 16}  # NIfTI's codes
BASE = "igzip -dc"
CORE = max(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A file to be measured with."""

    path: str
    mask: str  # .npy, (x, y, z) bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Decompressed."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(kw_only=True)
class Case:
    """One way to go through a run, and what it took in each round."""

    name: str
    pinned: bool  # to one CPU
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)  # over the warmed-up process; not known of commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder on the disk to be measured; runs made are kept there")
    parser.add_argument("files", nargs="*", type=Path, help=".nii.gz runs to use instead of made ones")
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--shape", default="x".join(map(str, SHAPE)), help="of made runs")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=None, metavar="NAME", help="only these, beside igzip")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--profile", action="store_true", help="only: where our time goes with one thread, per frame")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # name of a case, run as JSON
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        return work(chosen.worker[0], Run(**json.loads(chosen.worker[1])), chosen.out)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if chosen.files:
        runs = [existing_run(path.resolve(), out) for path in chosen.files]
    else:
        shape = tuple(int(size) for size in chosen.shape.split("x"))
        runs = [made_run(out, dtype, shape, chosen.frames) for dtype in chosen.dtypes]
    if chosen.profile:
        for run in runs:
            profile(run, out)
        return 0
    result: dict[str, Any] = {"machine": machine(out), "rounds": chosen.rounds, "runs": []}
    for run in runs:
        measured = measure(run, out, rounds=chosen.rounds, wanted=chosen.cases)
        result["runs"].append(report(run, measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1))
    return 0


# What is measured


def made_run(out: Path, dtype: str, shape: tuple[int, ...], frames: int) -> Run:
    """A run of noise about a smooth image in an ellipsoid of a quarter of the volume."""
    stem = out / f"sub-01_task-{dtype}x{'x'.join(map(str, shape))}x{frames}_bold"
    path, mask_path = stem.with_suffix(".nii.gz"), stem.with_suffix(".mask.npy")
    if not path.exists():
        rng = np.random.default_rng(0)
        axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
        mask = sum((axis / 0.79) ** 2 for axis in axes) < 1
        waves = sum(np.sin(7 * axis + number) for number, axis in enumerate(axes))
        anatomy = (10_000 + 1000 * waves) * mask
        np.save(mask_path, mask)
        scratch = path.with_suffix(".part")
        with gzip_writer(scratch) as file:
            file.write(nifti_header((*shape, frames), dtype))
            for _ in range(frames):
                frame = anatomy * (1 + TEMPORAL_SD * rng.normal(size=shape))
                file.write(
                    (np.rint(frame) if dtype == "int16" else frame).astype(f"<{np.dtype(dtype).str[1:]}").tobytes("F")
                )
        scratch.rename(path)
    return Run(path=str(path), mask=str(mask_path), shape=(*shape, frames), dtype=dtype)


def existing_run(path: Path, out: Path) -> Run:
    """A file of the user's, with the mask that `convert` would compute."""
    from fmristream.ingest.options import Quarantined
    from fmristream.ingest.tasks import MaskTask, find_run_mask
    from fmristream.signal.grid import is_believable

    surveyed = survey_of(str(path))
    shape = surveyed.header.shape
    packed = find_run_mask(MaskTask(run=surveyed, frames=0))
    if isinstance(packed, Quarantined):
        raise SystemExit(packed.reason)
    mask = np.unpackbits(packed, count=int(np.prod(shape))).astype(bool).reshape(shape)
    mask_path = out / f"{path.name}.mask.npy"
    np.save(mask_path, mask if is_believable(mask) else np.ones(shape, dtype=bool))
    dtype = surveyed.header.dtype.name
    return Run(path=str(path), mask=str(mask_path), shape=(*shape, surveyed.header.frames), dtype=dtype)


@contextlib.contextmanager
def gzip_writer(path: Path) -> Iterator[IO[bytes]]:
    """As `gzip -6` writes it: what most pipelines leave behind."""
    if shutil.which("gzip") is None:
        with gzip.open(path, "wb", compresslevel=6) as file:
            yield file
        return
    with open(path, "wb") as target, subprocess.Popen(["gzip", "-6"], stdin=subprocess.PIPE, stdout=target) as process:
        assert process.stdin is not None
        yield process.stdin
        process.stdin.close()
        if process.wait():
            raise SystemExit("gzip failed")


def nifti_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """348 bytes of NIfTI-1 and 4 of no extension: 2 mm, MNI."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 4, *shape, 1, 1, 1)
    struct.pack_into("<2h", header, 70, DTYPES[dtype], 8 * np.dtype(dtype).itemsize)
    struct.pack_into("<8f", header, 76, 1, 2, 2, 2, 0.72, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    header[123] = 2 | 8  # mm, s
    struct.pack_into("<2h", header, 252, 0, 4)
    struct.pack_into("<12f", header, 280, 2, 0, 0, -90, 0, 2, 0, -126, 0, 0, 2, -72)
    header[344:348] = b"n+1\0"
    return bytes(header)


def survey_of(path: str) -> Any:
    """The run as `convert` plans it."""
    from fmristream.ingest.options import ConvertOptions
    from fmristream.ingest.plan import survey
    from fmristream.ingest.sources import find_runs

    found = survey(find_runs(path), ConvertOptions())
    if not found.runs:
        raise SystemExit(f"{path}: {found.quarantined[0].reason}")
    return found.runs[0]


# The ways through it; each prepares an empty folder and returns a function that does it, which can be called once


def ours(run: Run, out: Path, *, threads: int) -> Callable[[], None]:
    """`convert_run`, as a worker does it."""
    from fmristream.ingest.pending import FinishedRun
    from fmristream.ingest.side import SideTask
    from fmristream.ingest.tasks import RunTask, convert_run
    from fmristream.shards.hashing import NEW_BULK_DIGEST
    from fmristream.shards.spaces import Space, space_document, write_space
    from fmristream.signal.grid import Grid
    from fmristream.storage import open_store

    surveyed = survey_of(run.path)
    space = Space(grid=Grid(shape=surveyed.header.shape, affine=surveyed.affine), mask=np.load(run.mask))
    store = open_store(str(out / "dataset"))
    write_space(store, space)  # once a dataset, not once a run
    task = RunTask(
        run=surveyed,
        store=store,
        space_digest=space.digest,
        space_document=space_document(space),
        bulk_digest=NEW_BULK_DIGEST,
        threads=threads,
        side=SideTask(sketch=True),  # as `convert` does
    )

    def once() -> None:
        result = convert_run(task)
        if not isinstance(result, FinishedRun):
            raise SystemExit(f"{run.path}: {result}")

    return once


def isal(run: Run, out: Path) -> Callable[[], None]:
    """python-isal, where there is no igzip."""
    from isal import igzip

    def once() -> None:
        buffer = memoryview(bytearray(2**20))
        with igzip.open(run.path) as file:
            while file.readinto(buffer):
                pass

    return once


def nibabel_numpy(run: Run, out: Path) -> Callable[[], None]:
    """Load, mask, mean and SD per voxel; nothing is written."""
    import nibabel

    mask = np.load(run.mask)

    def once() -> None:
        image: Any = nibabel.load(run.path)
        values = np.asanyarray(image.dataobj)[mask]
        values.mean(axis=1)
        values.std(axis=1)

    return once


def swift_style(run: Run, out: Path) -> Callable[[], None]:
    """As SwiFT's preprocessing: whole run, z over the foreground, background = its minimum, fp16, a .pt per frame."""
    import nibabel
    import torch

    torch.set_num_threads(1)

    def once() -> None:
        image: Any = nibabel.load(run.path)
        data = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
        background = data == 0
        mean, sd = data[~background].mean(), data[~background].std()
        data = (data - mean) / sd
        data[background] = data[~background].min()
        data = data.to(torch.float16)
        for number, frame in enumerate(torch.split(data, 1, dim=3)):
            torch.save(frame.clone(), out / f"frame_{number}.pt")

    return once


def tff_style(run: Run, out: Path) -> Callable[[], None]:
    """As TFF's preprocessing: crop, two fp32 copies (global z, z per voxel), a .pt per frame of each."""
    import nibabel
    import torch

    torch.set_num_threads(1)

    def once() -> None:
        image: Any = nibabel.load(run.path)
        data = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
        if run.shape[:3] == SHAPE:
            data = data[8:-8, 8:-8, :-10, 10:]
        background = data == 0
        foreground = data[~background]
        whole = (data - foreground.mean()) / foreground.std()
        whole[background] = whole.min()
        voxelwise = torch.nan_to_num((data - data.mean(dim=3, keepdim=True)) / data.std(dim=3, keepdim=True))
        for name, values in {"global_normalize": whole, "per_voxel_normalize": voxelwise}.items():
            (out / name).mkdir()
            for number, frame in enumerate(torch.split(values, 1, dim=3)):
                torch.save(frame.clone(), out / name / f"TR_{number}.pt")

    return once


WORKERS: dict[str, Callable[[Run, Path], Callable[[], None]]] = {
    "fmristream, 1 thread": lambda run, out: ours(run, out, threads=1),
    "fmristream, 2 threads": lambda run, out: ours(run, out, threads=2),
    "python-isal": isal,
    "nibabel + numpy": nibabel_numpy,
    "SwiFT-style": swift_style,
    "TFF-style": tff_style,
}
COMMANDS = {"igzip -dc": ["igzip", "-dc"], "gzip -dc": ["gzip", "-dc"]}


# Measuring


def measure(run: Run, out: Path, *, rounds: int, wanted: list[str] | None) -> list[Case]:
    """Every case, round after round; decompressors come first, so that the file is in the page cache."""
    names = [name for name, command in COMMANDS.items() if shutil.which(command[0])]
    if BASE not in names:
        names.insert(0, "python-isal")
    names += [name for name in WORKERS if name != "python-isal"]
    if wanted is not None:
        names = [name for name in names if name in wanted or name == names[0]]
    cases = [Case(name=name, pinned=name != "fmristream, 2 threads") for name in names]
    scratch = out / f"scratch-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        workers = {c.name: stack.enter_context(worker(c, run, scratch)) for c in cases if c.name in WORKERS}
        for _ in range(rounds):
            for case in cases:
                os.sync()
                took = ask(workers[case.name]) if case.name in workers else decompress(COMMANDS[case.name], run.path)
                case.seconds.append(took["seconds"])
                case.cpu_s.append(took["cpu_s"])
                case.rss_mb += [took["rss_mb"]] if "rss_mb" in took else []
    return cases


def decompress(command: list[str], path: str) -> dict[str, float]:
    """Run a decompressor into /dev/null, on one CPU."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, path], stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, {CORE})
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} {path} failed")
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}


@contextlib.contextmanager
def worker(case: Case, run: Run, scratch: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process of its own for a case, warmed up, that does it once for each line it is sent."""
    command = [sys.executable, "-m", "tools.bench_convert", "--worker", case.name, json.dumps(asdict(run))]
    folder = scratch / case.name.replace(" ", "-").replace(",", "")
    pin = (lambda: os.sched_setaffinity(0, {CORE})) if case.pinned else None
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*command, "--", str(folder)], **pipes, preexec_fn=pin) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Have it done once."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker failed; what it said stands above")
    return dict(json.loads(line))


def work(name: str, run: Run, out: Path) -> int:
    """What a worker process does: warm up with a small run, then once for each line."""
    warm = (
        made_run(fresh(out.with_name(out.name + "-warm")), run.dtype, (16, 16, 10), 20) if run.dtype in DTYPES else run
    )
    WORKERS[name](warm, fresh(out))()
    for _ in sys.stdin:
        once = WORKERS[name](run, fresh(out))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory starts again here
        start_mb = memory_mb("VmRSS")
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        once()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "rss_mb": memory_mb("VmHWM") - start_mb}), flush=True)
    return 0


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def memory_mb(name: str) -> float:
    """A figure of this process's memory, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def profile(run: Run, out: Path) -> None:
    """Print the functions that take the most time of a conversion with one thread, on one CPU."""
    os.sched_setaffinity(0, {CORE})
    scratch = out / f"scratch-{os.getpid()}"
    try:
        ours(run, fresh(scratch), threads=1)()
        once = ours(run, fresh(scratch), threads=1)
        watch = cProfile.Profile()
        watch.runcall(once)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    frames = run.shape[3]
    rows = sorted(((entry.inlinetime, entry.code) for entry in watch.getstats()), key=lambda row: -row[0])
    print(f"{Path(run.path).name}: {sum(row[0] for row in rows) / frames * 1e3:.2f} ms a frame, of which")
    for seconds, code in rows[:12]:
        name = code if isinstance(code, str) else f"{Path(code.co_filename).name}: {code.co_name}"
        print(f"{seconds / frames * 1e3:8.3f}  {name}")
    print(flush=True)


# Telling


def report(run: Run, cases: list[Case]) -> dict[str, Any]:
    """Print a table; the same as a document."""
    base = cases[0]
    print(f"{Path(run.path).name}: {'x'.join(map(str, run.shape))} {run.dtype}, {run.bytes / 1e6:.0f} MB decompressed,")
    print(f"{os.path.getsize(run.path) / 1e6:.0f} MB stored; {int(np.load(run.mask).sum()):,} voxels in mask")
    print(f"{'':24}{'MB/s':>8}{'x ' + base.name:>14}{'same, CPU':>12}{'CPU s':>8}{'RSS +MiB':>10}  pinned to")
    rows = {}
    for case in cases:
        row = {
            **asdict(case),
            "mb_s": run.bytes / 1e6 / statistics.median(case.seconds),
            "ratio": statistics.median(b / s for b, s in zip(base.seconds, case.seconds, strict=True)),
            "cpu_ratio": statistics.median(b / s for b, s in zip(base.cpu_s, case.cpu_s, strict=True)),
        }
        rows[case.name] = row
        cpu, rss = statistics.median(case.cpu_s), f"{max(case.rss_mb):.0f}" if case.rss_mb else "-"
        where = f"CPU {CORE}" if case.pinned else "-"
        print(
            f"{case.name:24}{row['mb_s']:8.0f}{row['ratio']:14.2f}{row['cpu_ratio']:12.2f}{cpu:8.2f}{rss:>10}  {where}"
        )
    print(flush=True)
    return {"file": Path(run.path).name, "shape": list(run.shape), "dtype": run.dtype, "base": base.name, "cases": rows}


def machine(out: Path) -> dict[str, Any]:
    """What it ran on, with which programs, and how busy that was."""
    cpu = cpu_facts()
    facts = {
        "cpu": f"{cpu.get('model name', platform.processor())}, family {cpu.get('cpu family')}, model {cpu.get('model')}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "disk": file_system(out),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("numpy", "numba", "numcodecs", "zlib-ng", "nibabel", "torch")},
        "igzip": igzip_version(),
    }
    print(f"{facts['cpus']} CPUs of {facts['cpu']}; {facts['memory_gb']} GB; {facts['system']}; {facts['disk']}")
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    print(f"Python {facts['python']}, {packages}, igzip {facts['igzip']}; load {os.getloadavg()[0]:.1f} at the start\n")
    return facts


def cpu_facts() -> dict[str, str]:
    """Of the first processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on."""
    if shutil.which("stat") is None:
        return "unknown"
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def igzip_version() -> str:
    """As it says it."""
    if shutil.which("igzip") is None:
        return "missing"
    said = subprocess.run(["igzip", "--version"], capture_output=True, text=True, check=False).stdout
    return said.split()[-1] if said.split() else "unknown"


if __name__ == "__main__":
    sys.exit(main())
