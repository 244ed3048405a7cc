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

# A 4-D masked autoencoder for two cores: 64 places of 6 voxels' edge, 4 frames each, an encoder of two layers.
TINY = {
    "data.grid": "[24,24,24]",
    "data.threads": 1,
    "model.embed_dim": 64,
    "model.depth": 2,
    "model.num_heads": 4,
    "model.patch_size": "[6,6,6,4]",
    "train.batch_size": 16,
}
DECODER = {
    "model.decoder_dim": 48,
    "model.decoder_depth": 1,
    "model.decoder_heads": 4,
    "model.mask_ratio": 0.75,
    "optim.lr": 2e-3,
}
TUNING = {"optim.lr": 1e-3, "eval.baselines": "false"}  # baselines stand beside SwiFT, on the same subjects

# Where the three runs lie.
BEFORE, TUNED, SCRATCH = "mae4d-pretrained", "mae4d-finetuned", "mae4d-from-scratch"

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
    """A 4-D masked autoencoder learns without labels; its weights begin a network for sex, beside the same from scratch."""
    before, after = (4, 4) if quick else (300, 200)
    common = TINY | {"data.url": out / "cohort", "train.seed": seed, "optim.warmup_steps": 1 if quick else 20}
    heading(f"Pre-training: a 4-D masked autoencoder completes hidden patches, {before} steps; it sees no label")
    changes = common | DECODER | {"train.steps": before, "train.eval_every": max(1, before // 3)}
    run(*two_processes("mae4d_pretrain", changes, out / BEFORE))
    for folder, begins in ((TUNED, out / BEFORE), (SCRATCH, "")):
        heading(f"Sex, {after} steps: {'with the weights of the pre-training' if begins else 'the same from scratch'}")
        changes = common | TUNING | {"start.from": begins, "train.steps": after, "train.eval_every": 0}
        run(*two_processes("mae4d_finetune", changes, out / folder))
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
    looks = read_history(out / BEFORE / "log.jsonl").evals
    errors = ", ".join(f"{look['loss']:.3f} (step {look['step']})" for look in looks)
    print(f"Squared error of hidden patches of validation subjects; predicting zero costs about 1: {errors}\n")
    print(f"{'network':<26}{'AUROC':>7}  95 % interval")
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
        return
    print(
        "Where the first line falls, something was learnt without a label that holds for subjects not trained on: part of\n"
        "a hidden patch can be told from what is seen. The two networks have the same labels, steps and test subjects, and\n"
        "differ in what they began with: their difference is what pre-training brought here. It does not show that it helps\n"
        "on real data, or that it does not: this is one seed, a small network, a few hundred steps, and no more scans to\n"
        "pre-train on than there are labels."
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
