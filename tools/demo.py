"""The whole path once, on this machine: NIfTI, shards, stream, a trained SwiFT, a pre-trained network, and how far to
believe them.

    python tools/demo.py              everything, a few minutes on two cores
    python tools/demo.py --quick      the same with few steps: shows that it runs, learns nothing

Every command that it runs is printed first, so that you can run it yourself.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `tools` is not installed

import fmristream  # noqa: E402
from tools.controls import controls, stack_features, subject_features, table  # noqa: E402
from train.baselines_paired import paired_differences, sentence  # noqa: E402
from train.log import read_history  # noqa: E402
from train.report_view import read_report, targets_of  # noqa: E402

# 160 subjects, 48 of them held out: fewer held-out subjects give intervals too wide to say anything.
SUBJECTS = 160
SPLIT_RATIOS = "0.6,0.1,0.3"
# Networks' coupling 1.0 against -.6: visible neither in a mean nor in an SD image, and learnt within 800 steps.
EFFECT = ("--effect", "coupling", "--strength", "1.6")
BLOCK = 4  # voxels along a parcel of the connectivity control
LABELLED = 12  # subjects whose labels the fine-tuned network learns from

# The options of swift_tiny_cpu, for the recipes of pre-training and fine-tuning.
TINY = {
    "data.window": 16,
    "data.normalize": "voxel-zscore",
    "data.grid": "[24,24,24]",
    "data.threads": 1,
    "data.prefetch_batches": 2,
    "model.embed_dim": 24,
    "model.depths": "[2,2]",
    "model.num_heads": "[3,6]",
    "model.last_layer_full_MSA": "false",
    "train.checkpoint_every": 100,
}
# Every subject has one run: a pair is two windows of it.
PAIRS = {"data.views": "same-run", "data.augment": "none", "train.batch_size": 16, "optim.lr": 3e-3}
# Labels are few, which is what pre-training is for; with all 96 this network learns the effect in any case.
FEW = {"data.train_groups": LABELLED, "optim.lr": 1e-3, "eval.baselines": "false"}

# Where the three runs lie.
BEFORE, TUNED, SCRATCH = "swift-pretrained", "swift-finetuned", "swift-from-scratch"

# A restart needs the last checkpoint to lie behind it; the kill comes between two of them.
KILL_AFTER = 0.45  # of all steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the demo measured on held-out subjects."""

    auroc: float
    interval: tuple[float, float]
    steps: int
    killed_at: int
    resumed_from: int
    verdict: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if every step of it succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo-out", help="where everything is written (emptied first)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few subjects and steps: shows that it runs, learns nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cohort and of the training")
    chosen = parser.parse_args(arguments)
    start = time.monotonic()
    shutil.rmtree(chosen.out, ignore_errors=True)
    chosen.out.mkdir(parents=True)
    real_run(chosen.out)
    train_and_report(chosen.out, seed=chosen.seed, quick=chosen.quick)
    pre_train_and_fine_tune(chosen.out, seed=chosen.seed, quick=chosen.quick)
    show_files(chosen.out)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Everything lies in {chosen.out}.")
    return 0


def real_run(out: Path) -> None:
    """Convert the real BOLD run that ships inside nibabel, check every voxel against nibabel, draw it."""
    heading("A real BOLD run (17 x 21 x 3 voxels, 20 frames), from inside the nibabel package")
    source = Path(nibabel.__file__).parent / "tests" / "data" / "functional.nii"
    dataset = out / "real"
    run("fmristream", "convert", source, dataset, "--mask", "none", "--split", "none")
    run("fmristream", "verify", dataset, "--deep", "--against", source)
    run("fmristream", "preview", dataset, "--out", out / "pictures-real")


def train_and_report(out: Path, *, seed: int, quick: bool) -> Outcome:
    """A synthetic cohort: converted, verified, drawn, trained on with a kill in the middle, scored beside controls."""
    subjects, steps, every = (24, 24, 4) if quick else (SUBJECTS, 800, 50)
    heading(f"A synthetic cohort of {subjects} subjects as fMRIPrep derivatives; sex is in how two networks couple")
    dataset, folder = out / "cohort", out / "derivatives"
    run(
        sys.executable, ROOT / "tools" / "synth.py", folder, "--derivatives", "--subjects", subjects,
        "--shape", "24x24x24", "--frames", 64, *EFFECT, "--seed", seed,
    )  # fmt: skip
    run("fmristream", "convert", folder, dataset, "--split", "exact", "--split-ratios", SPLIT_RATIOS, "--quiet")
    run("fmristream", "info", dataset)
    run("fmristream", "verify", dataset, "--deep", "--against", folder, "--quiet")
    run("fmristream", "preview", dataset, "--limit", 2, "--out", out / "pictures-cohort")
    heading(f"SwiFT on two processes, {steps} steps; killed on the way, then started again with the same command")
    command = training_command(dataset, out / "swift", steps=steps, checkpoint_every=every, seed=seed)
    killed_at = run_and_kill(command, out / "swift" / "log.jsonl", after_step=max(every + 1, round(KILL_AFTER * steps)))
    run(*command)
    outcome = read_outcome(out / "swift", steps=steps, killed_at=killed_at)
    report(dataset, outcome, seed=seed, quick=quick)
    return outcome


def pre_train_and_fine_tune(out: Path, *, seed: int, quick: bool) -> None:
    """SwiFT learns which windows are of one run, without labels; then sex from a few, beside the same from scratch."""
    before, after = (4, 4) if quick else (100, 60)
    common = TINY | {"data.url": out / "cohort", "train.seed": seed, "optim.warmup_steps": 1 if quick else 20}
    heading(f"Pre-training: SwiFT, {before} steps, learns which two windows are of one run; it sees no label")
    run(
        *two_processes(
            "swift_contrastive", common | PAIRS | {"train.steps": before, "train.eval_every": 0}, out / BEFORE
        )
    )
    for folder, begins in ((TUNED, out / BEFORE), (SCRATCH, "")):
        what = "with the weights of the pre-training" if begins else "the same from scratch"
        heading(f"Sex from the labels of {LABELLED} subjects, {after} steps: {what}")
        tuning = common | FEW | {"start.from": begins, "train.steps": after, "train.eval_every": 0}
        run(*two_processes("swift_finetune", tuning, out / folder))
    report_pair(out, quick=quick)


def two_processes(recipe: str, settings: Mapping[str, object], out: Path) -> list[str]:
    """A training by our own launcher on two processes of this machine."""
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "train", recipe, "--nproc", "2", *changes, "--out", str(out)]


def training_command(dataset: Path, out: Path, *, steps: int, checkpoint_every: int, seed: int) -> list[str]:
    """Two processes of this machine, started by torchrun."""
    settings = {
        "data.url": dataset,
        "train.steps": steps,
        "train.checkpoint_every": checkpoint_every,
        "train.eval_every": max(1, steps // 4),
        "train.seed": seed,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [*launcher, "swift_tiny_cpu", *changes, "--out", str(out)]


def run_and_kill(command: Sequence[str], log: Path, *, after_step: int) -> int:
    """Start a training and kill all of its processes (SIGKILL) once it has done `after_step` steps; returns the step."""
    show(command)
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread_each(), start_new_session=True)
    step = 0
    while step < after_step:
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            step = last_step(log)
        else:
            raise SystemExit(f"the training ended with status {code} after step {last_step(log)}, before it was killed")
    # torchrun's workers have sessions of their own: killing the agent alone would leave them training.
    agent = psutil.Process(process.pid)
    killed = [*agent.children(recursive=True), agent]
    for one in killed:
        one.kill()
    psutil.wait_procs(killed, timeout=30)
    process.wait()
    step = last_step(log)
    print(f"--- killed after step {step} ---", flush=True)
    return step


def last_step(log: Path) -> int:
    """The last step that a training log holds."""
    if not log.exists():
        return 0
    steps = [
        line for line in log.read_text().splitlines() if line.startswith('{"event": "step"') and line.endswith("}")
    ]
    return int(json.loads(steps[-1])["step"]) if steps else 0


def read_outcome(out: Path, *, steps: int, killed_at: int) -> Outcome:
    """Numbers of a finished training."""
    document = json.loads((out / "report.json").read_text())
    scores, beside = document["test"], document["beside"]
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"event": "start"' in line]
    low, high = scores["intervals"]["auroc"]
    return Outcome(
        auroc=scores["metrics"]["auroc"],
        interval=(low, high),
        steps=steps,
        killed_at=killed_at,
        resumed_from=events[-1]["step"],
        verdict=tuple(beside["targets"]["sex"]["verdict"]) if beside["status"] == "done" else (beside["why"],),
    )


def report(dataset: Path, outcome: Outcome, *, seed: int, quick: bool) -> None:
    """The net beside what simple readers make of the same training and test subjects."""
    heading("Held-out subjects: can sex be told?")
    opened = fmristream.open(str(dataset))
    sexes = {str(row["subject"]): str(row["sex"]) for row in opened.participants}
    runs = [run for run in opened.runs if run.split in ("train", "test")]
    features = stack_features(subject_features(opened.read(one), opened.space(one).mask, BLOCK) for one in runs)
    train = np.array([one.split == "train" for one in runs])
    rows = controls(features, [sexes[one.subject] for one in runs], train, seed)
    print(table(rows))
    low, high = outcome.interval
    print(f"{'SwiFT':<26}{outcome.auroc:>7.3f}  {low:.3f} to {high:.3f}")
    print(
        f"\n{outcome.steps} steps, killed after {outcome.killed_at}, resumed from {outcome.resumed_from}; "
        f"{train.sum()} training and {(~train).sum()} test subjects."
    )
    print("What the run's own page says of it, beside readers of the same windows:")
    for said in outcome.verdict:
        print(f"  {said}")
    if quick:
        print("A quick run: far too few steps to learn anything; it shows that every part works.")
    print(
        "Functional connectivity wins, as it must: the coupling of two networks is what this cohort differs in, and\n"
        "connectivity is its sufficient statistic. A net that reads raw frames comes near; the mean and SD image cannot.\n"
        "Intervals are over test subjects, for this one trained net; another seed gives another net."
    )


def report_pair(out: Path, *, quick: bool) -> None:
    """What pre-training was good for: both networks on the same test subjects, and their difference."""
    heading("What pre-training was good for")
    losses = [float(step["loss"]) for step in read_history(out / BEFORE / "log.jsonl").steps]
    part = max(1, len(losses) // 10)
    first, last = np.mean(losses[:part]), np.mean(losses[-part:])
    print(f"Pre-training: loss {first:.2f} over the first {part} steps, {last:.2f} over the last {part}.")
    tested = {}
    for folder in (TUNED, SCRATCH):
        (target,) = targets_of(read_report(out / folder))
        tested[folder] = target.parts["test"]
        low, high = tested[folder].intervals["auroc"]
        print(f"{folder:<26}{tested[folder].metrics['auroc']:>7.3f}  {low:.3f} to {high:.3f}")
    tuned, scratch = (part.subjects for part in tested.values())
    assert tuned is not None, "a target was scored"
    assert scratch is not None, "a target was scored"
    found = paired_differences(tuned, scratch, kind="classification")
    (difference,) = [one for one in found if one.metric == "auroc"]
    print(sentence(difference, target="sex", baseline="the same from scratch", subjects=len(tuned.label)))
    if quick:
        print("A quick run: far too few steps to learn anything; it shows that weights are handed over.")
    print(
        "Both learnt from the same few labels in the same steps and were scored on the same subjects, whom neither had seen;\n"
        "they differ in what they began with. This is one seed and one small network on a synthetic cohort whose subjects\n"
        "differ in little else than what is asked: it shows how weights are handed over, not that pre-training helps on\n"
        "real data, and a few more labels or steps may close the difference. Other seeds: --seed."
    )


def show_files(out: Path) -> None:
    """Where everything lies."""
    heading("What was written")
    for path in sorted(out.rglob("*.png")):
        print(f"picture    {path}")
    for name in ("real", "cohort"):
        print(f"dataset    {out / name}")
    for name in ("swift", BEFORE, TUNED, SCRATCH):
        print(f"training   {out / name}: report.html, report.json, log.jsonl, checkpoints/")
    print(f"\nThe page to begin with: {out / 'swift' / 'report.html'}")


def run(*command: object) -> None:
    """Run a command of this checkout; a failure ends the demo with its status."""
    words = [str(word) for word in command]
    show(words)
    if words[0] == "fmristream":
        words[:1] = [sys.executable, "-m", "fmristream"]
    status = subprocess.run(words, cwd=ROOT, env=one_thread_each()).returncode
    if status:
        raise SystemExit(f"demo: `{shlex.join(words)}` ended with status {status}")


def one_thread_each() -> dict[str, str]:
    """The environment with one compute thread a process: two processes share this machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def show(words: Sequence[str]) -> None:
    """Print a command as one would type it."""
    text = shlex.join(words).replace(sys.executable, "python").replace("python -m torch.distributed.run", "torchrun")
    print(f"\n$ {text}", flush=True)


def heading(text: str) -> None:
    """Say what comes next."""
    print(f"\n=== {text} ===", flush=True)


if __name__ == "__main__":
    sys.exit(main())
