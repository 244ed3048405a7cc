"""The job templates do what they say: what AWS Batch would run converts, and scripts called wrongly say how to call them."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import fmristream
from tests.ingest.cohorts import contents, convert, write_runs
from tests.ingest.slurm_cluster import jobs, slurm, why_not
from tests.ingest.test_masks import head
from train.config import as_toml, recipe_from
from train.report import read_history

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = [TOOLS / "slurm" / "convert_array.sh", TOOLS / "batch" / "submit.sh", TOOLS / "slurm" / "train.sh"]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The command `fmristream` of this checkout."""
    command = tmp_path / "bin" / "fmristream"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fmristream "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PYTHONPATH": str(TOOLS.parent), "PATH": f"{command.parent}:{os.environ['PATH']}"}


def batch_command(**parameters: str) -> list[str]:
    """The container's command as AWS Batch fills it in."""
    definition = json.loads((TOOLS / "batch" / "job_definition.json").read_text())
    values = {f"Ref::{name}": value for name, value in {**definition["parameters"], **parameters}.items()}
    return [values.get(word, word) for word in definition["containerProperties"]["command"]]


@pytest.mark.full
def test_what_aws_batch_would_run_converts_a_collection(tmp_path, environment):
    runs = {f"sub-{n}_bold": head(n) for n in range(5)}
    source, url = write_runs(tmp_path / "in", runs), str(tmp_path / "out")
    (tmp_path / "in" / "sub-bad_bold.nii.gz").write_bytes(b"")
    command = batch_command(source=source, target=url, options="--split none --mask auto")
    for _ in ("masks", "runs"):
        for index in range(2):
            task = {"AWS_BATCH_JOB_ARRAY_INDEX": str(index), "AWS_BATCH_JOB_ARRAY_SIZE": "2"}
            subprocess.run(command, env={**environment, **task}, check=True, capture_output=True)
    last = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert last.returncode == 3  # the empty file
    assert "5 (5 done before)" in last.stdout
    report = convert(source, str(tmp_path / "alone"), mask="auto")
    assert fmristream.open(url).content_digest == report.content_digest
    assert contents(url) == contents(str(tmp_path / "alone"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_is_called_without_its_arguments_says_how_to_call_it(script):
    called = subprocess.run(
        [str(script), "only-one"], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert called.returncode == 2
    assert f"{script.name}" in called.stderr
    assert ("NODES=8" if script.name == "train.sh" else "SHARDS") in called.stderr
    assert "set -eu" not in called.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_shell(script):
    subprocess.run(["shellcheck", str(script)], check=True)


@pytest.fixture
def submitted(tmp_path):
    """Submit tools/slurm/train.sh to a Slurm of two nodes, with a short recipe; its job's number and folder."""

    @contextmanager
    def submit(**variables):
        url, out = str(tmp_path / "dataset"), tmp_path / "run"
        source = "synth://?subjects=20&shape=12x12x12&frames=36&effect=coupling&strength=1.6"
        fmristream.convert(
            source, url, options=fmristream.ingest.options.ConvertOptions(split="exact", split_ratios=(0.5, 0.2, 0.3))
        )
        (tmp_path / "small.toml").write_text(as_toml(small_swift(url)))
        defaults = {"NODES": "2", "CPUS": "1", "MEMORY": "100", "TIME": "00:30:00", "LOGS": str(tmp_path / "logs")}
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        command = [str(TOOLS / "slurm" / "train.sh"), str(tmp_path / "small.toml"), str(out)]
        with slurm(tmp_path / "slurm"):
            environment = {**os.environ, **path, **defaults, **variables}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            yield done.stdout.split()[-1], out

    return submit


def small_swift(url):
    model = {"patch_size": [3, 3, 3, 1], "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2]}
    windows = {"window_size": [2, 2, 2, 4], "first_window_size": [2, 2, 2, 4]}
    train = {"steps": 150, "batch_size": 4, "checkpoint_every": 100, "log_every": 50}
    return recipe_from(
        {
            "data": {"url": url, "window": 8, "stride": 7},
            "model": {**model, **windows},
            "train": train,
            "eval": {"bootstrap_draws": 50},
        }
    )


def wait_until(is_so, timeout_s=150):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, jobs()
        time.sleep(0.2)


def steps_taken(out):
    log = out / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.exists() else 0


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")
def test_a_training_job_that_is_warned_and_then_preempted_goes_on_where_it_was(submitted):
    with submitted() as (job, out):
        # What `--signal=B:USR1@120` does before the time is up, and what preemption with a grace time does.
        for told in (["--signal=USR1", "--batch"], ["--signal=TERM"]):
            before = steps_taken(out)
            wait_until(lambda before=before: steps_taken(out) >= before + 10)
            subprocess.run(["scancel", *told, job], check=True)
            wait_until(lambda: [state for _, state in map(str.split, jobs())] == ["PENDING"])
            # A job that was queued again waits for two minutes, the first seconds of which it needs.
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"], check=True)
        wait_until(lambda: not jobs())
    assert (out / "report.json").exists()
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    starts = [event for event in events if event["event"] == "start"]
    stops = [event["step"] for event in events if event["event"] == "stop"]
    assert [start["world_size"] for start in starts] == [2, 2, 2]
    assert [start["step"] for start in starts] == [0, *stops]
    taken = [event["step"] for event in events if event["event"] == "step"]
    assert taken == list(range(1, 151))  # none was lost, none done twice
    assert [entry["step"] for entry in read_history(out / "log.jsonl").steps] == taken


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")
def test_a_training_job_that_its_user_cancels_is_not_queued_again(submitted):
    with submitted() as (job, out):
        wait_until(lambda: steps_taken(out) >= 5)
        subprocess.run(["scancel", job], check=True)
        wait_until(lambda: not jobs())
    assert not (out / "report.json").exists()
