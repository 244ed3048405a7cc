"""A real Slurm converts: jobs as dask workers, and the array template; cancelled, refused, and without a chance."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fmristream
from fmristream.errors import EngineError, UsageError
from fmristream.ingest import execute
from fmristream.ingest.cluster_options import SlurmJobs, read_slurm_jobs, walltime_s
from fmristream.ingest.execute import Engine
from fmristream.storage import open_store
from tests.ingest import engine_tasks
from tests.ingest.cohorts import contents, convert, write_runs
from tests.ingest.engine_tasks import Item
from tests.ingest.slurm_cluster import jobs, slurm, wait_for_jobs, why_not
from tests.ingest.test_masks import head

ROOT = Path(__file__).parents[2]
RUNS = 8

needs_slurm = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    runs = {f"sub-{n}_bold": head(n, frames=40) for n in range(RUNS)}
    return write_runs(tmp_path_factory.mktemp("source"), runs)


@pytest.fixture
def options_file(tmp_path) -> str:
    """Workers of this checkout and of this environment."""
    lines = [
        'memory = "1GB"',
        'walltime = "00:20:00"',
        f'log_directory = "{tmp_path}/logs"',
        f'shared_temp_directory = "{tmp_path}"',
        f'job_script_prologue = ["export PYTHONPATH={ROOT}"]',
    ]
    path = tmp_path / "jobs.toml"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.full
@needs_slurm
@pytest.mark.parametrize("count", [1, 3])
def test_slurm_jobs_make_the_same_dataset(cluster, source, tmp_path, options_file, count):
    notes = []
    options = fmristream.ingest.options.ConvertOptions(
        split="none", cluster="slurm", workers=count, cluster_options=options_file
    )
    url = str(tmp_path / "out")
    report = fmristream.convert(source, url, options=options, progress=lambda now: notes.append(now.note))
    expected = convert(source, str(tmp_path / "alone"), mask="auto")
    assert report.content_digest == expected.content_digest
    assert contents(url) == contents(str(tmp_path / "alone"))
    assert any(note.startswith(f"{count} Slurm jobs; dashboard: http://") for note in notes)
    wait_for_jobs(30)
    assert not [path for path in tmp_path.iterdir() if "tls" in path.name or path.suffix == ".pem"]


@pytest.mark.full
@needs_slurm
def test_a_cancelled_job_is_submitted_again_and_its_run_done(cluster, tmp_path, options_file, monkeypatch):
    monkeypatch.setattr(execute, "_RESUBMIT_EVERY_S", 3.0)
    import dask
    import distributed  # noqa: F401 its defaults have to be there before one of them is set

    tasks = [Item(name=str(n), value=n, folder=str(tmp_path)) for n in range(4)]

    def cancel() -> None:
        while not list(tmp_path.glob("*-*-*")):
            time.sleep(0.1)
        subprocess.run(["scancel", jobs()[0].split()[0]], check=True)

    thread = threading.Thread(target=cancel)
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "2s"}),
        Engine(1, jobs=read_slurm_jobs(options_file)) as engine,
    ):
        thread.start()
        found = dict(engine.run(engine_tasks.trace_and_sleep_shortly, tasks))
    thread.join()
    assert found == {n: n for n in range(4)}
    assert len(list(tmp_path.glob("*-*-*"))) == 5
    assert len({path.name.split("-")[1] for path in tmp_path.glob("*-*-*")}) == 2


@pytest.mark.full
@needs_slurm
def test_jobs_that_cannot_start_are_reported(cluster, tmp_path, options_file, monkeypatch):
    monkeypatch.setattr(execute, "_RESUBMIT_EVERY_S", 3.0)
    bad = read_slurm_jobs(options_file)
    bad = SlurmJobs(memory=bad.memory, python="/nonexistent/python", log_directory=bad.log_directory)
    with (
        Engine(2, jobs=bad) as engine,
        pytest.raises(EngineError, match="not one of 2 jobs is waiting or running any more"),
    ):
        list(engine.run(engine_tasks.double, [Item(name="a")]))


@pytest.mark.full
@needs_slurm
def test_a_job_that_slurm_refuses_is_reported(cluster, tmp_path, options_file):
    text = Path(options_file).read_text() + '\nqueue = "no-such-partition"\n'
    Path(options_file).write_text(text)
    with (
        pytest.raises(EngineError, match="invalid partition"),
        Engine(1, jobs=read_slurm_jobs(options_file)) as engine,
    ):
        list(engine.run(engine_tasks.double, [Item(name="a")]))


@pytest.mark.full
@needs_slurm
def test_the_array_template_converts_a_collection(cluster, source, tmp_path):
    url = str(tmp_path / "out")
    command = tmp_path / "bin" / "fmristream"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fmristream "$@"\n')
    command.chmod(0o755)
    (tmp_path / "setup").write_text(f"export PYTHONPATH={ROOT} PATH={command.parent}:$PATH\n")
    variables = {"SHARDS": "3", "SETUP": str(tmp_path / "setup"), "LOGS": str(tmp_path / "logs"), "MEMORY": "1G"}
    template = [str(ROOT / "tools" / "slurm" / "convert_array.sh"), source, url, "--split", "none"]
    said = subprocess.run(
        template, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split(":")[0] for line in said.splitlines()] == ["masks", "runs", "commit"]
    wait_for_jobs(400)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    report = convert(source, str(tmp_path / "alone"), mask="auto")
    assert fmristream.open(url).content_digest == report.content_digest, logs
    assert contents(url) == contents(str(tmp_path / "alone"))
    commit = next(text for name, text in logs.items() if "commit" in name)
    assert f"{RUNS} ({RUNS} done before)" in commit
    assert not open_store(url).list("pending")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("04:00:00", 14400), ("1-12", 129600), ("1-0:30", 88200), ("2-01:02:03", 176523)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert walltime_s(text) == seconds
    assert SlurmJobs(walltime=text).lifetime_s < seconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("walltime = ''", "walltime"),
        ("walltime = '0'", "walltime"),
        ("walltime = '1:2:3:4'", "walltime"),
        ("cores = 0", "cores"),
        ("cores = '4'", "expected a whole number"),
        ("cores = true", "expected a whole number"),
        ("queues = 'short'", "unknown field 'queues'; known are queue"),
        ("job_extra_directives = '--qos=low'", "expected a list of strings"),
        ("queue = ", "cannot be read"),
    ],
)
def test_options_of_jobs_that_mean_nothing_are_refused(tmp_path, text, reason):
    path = tmp_path / "jobs.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_slurm_jobs(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_slurm_jobs(str(tmp_path / "nothing.toml"))


def test_the_file_that_ships_says_the_defaults():
    assert read_slurm_jobs(str(ROOT / "tools" / "slurm" / "jobs.toml")) == SlurmJobs()
