"""Two machines with addresses of their own train from a bucket on a third, and find what one process finds."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from fmristream.errors import UsageError
from tests.conftest import BUCKET
from tests.train.agents import torchrun
from tests.train.namespaces import machines, why_not
from train.config import as_toml
from train.elastic import Agent, meeting_point
from train.launching import Nodes, parse_nodes
from train.report import read_history

ROOT = Path(__file__).parents[2]
PORT = 29400


@pytest.fixture(scope="module")
def lan():
    """Three machines; the test says why where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as made:
        yield made


@pytest.fixture(scope="module")
def environment(lan, tmp_path_factory):
    """What leads to the bucket on the third machine."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "AWS_ACCESS_KEY_ID": "test-key-id",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = lan[2].command([sys.executable, "-m", "tests.train.s3_machine", lan[2].address])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=shared, cwd=ROOT, text=True, **pipes) as server:
        try:
            yield {**shared, "AWS_ENDPOINT_URL": server.stdout.readline().strip()}
        finally:
            server.stdin.close()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def bucket(lan, environment):
    """A cohort, converted into the bucket by the first machine."""
    url = f"s3://{BUCKET}/cohort"
    source = "synth://?subjects=20&shape=12x12x12&frames=36&effect=coupling&strength=1.6"
    options = ["--split", "exact", "--split-ratios", "0.5,0.2,0.3"]
    command = [sys.executable, "-m", "fmristream", "convert", source, url, *options]
    subprocess.run(lan[0].command(command), env=environment, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return url


@pytest.fixture
def recipe(small_recipe, bucket, tmp_path):
    made = small_recipe(optim={"lr": 1e-4}, train={"steps": 20, "batch_size": 6, "checkpoint_every": 8})
    path = tmp_path / "small.toml"
    path.write_text(as_toml(replace(made, data=replace(made.data, url=bucket))))
    return path


def agents(kind, recipe, out, lan):
    """The command of each of the two machines."""
    here = ["--out", str(out)]
    if kind == "ours":
        meet = ["--nodes", "2", "--rendezvous", f"{lan[0].address}:{PORT}"]
        return [[sys.executable, "-m", "train", str(recipe), *here, *meet]] * 2
    endpoint = f"{lan[0].address}:{PORT}"
    return [
        [*torchrun(nodes="2", endpoint=endpoint, is_host=n == 0, own=lan[n].address), str(recipe), *here]
        for n in (0, 1)
    ]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["torchrun", "ours"])
def test_two_machines_train_from_a_bucket_on_a_third_as_one_process_does(kind, lan, environment, recipe, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    single = [sys.executable, "-m", "train", str(recipe), "--out", str(alone)]
    subprocess.run(lan[1].command(single), env=environment, cwd=ROOT, check=True, capture_output=True, timeout=200)
    started = [
        subprocess.Popen(
            machine.command(command),
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine, command in zip(lan[:2], agents(kind, recipe, both, lan), strict=True)
    ]
    try:
        said = [agent.communicate(timeout=240)[0] for agent in started]
    finally:
        for agent in started:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)  # which ends its rank as well
                agent.communicate()
    assert [agent.returncode for agent in started] == [0, 0], "\n".join(said)
    ours, theirs = (read_history(out / "log.jsonl").steps for out in (both, alone))
    assert [entry["windows"] for entry in ours] == [entry["windows"] for entry in theirs]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-6)
    assert_same_report(*(json.loads((out / "report.json").read_text()) for out in (both, alone)))
    starts = [json.loads(line) for line in (both / "log.jsonl").read_text().splitlines() if '"start"' in line]
    assert [start["world_size"] for start in starts] == [2]


def assert_same_report(ours, theirs):
    """The same subjects, and numbers that differ by the rounding of twenty steps at most."""
    assert ours.keys() == theirs.keys()
    for split in ("val", "test"):
        assert [s["subject"] for s in ours[split]["subjects"]] == [s["subject"] for s in theirs[split]["subjects"]]
        assert [s["truth"] for s in ours[split]["subjects"]] == [s["truth"] for s in theirs[split]["subjects"]]
        scores = [[s["score"] for s in report[split]["subjects"]] for report in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert ours[split]["metrics"] == pytest.approx(theirs[split]["metrics"], abs=1e-5)


@pytest.mark.parametrize(
    ("nodes", "rendezvous", "expected"),
    [
        (None, None, Nodes()),
        ("8", "login1", Nodes(minimum=8, maximum=8, host="login1", port=29400)),
        ("2:64", "10.0.0.1:5000", Nodes(minimum=2, maximum=64, host="10.0.0.1", port=5000)),
        ("2", "[fe80::1]:5000", Nodes(minimum=2, maximum=2, host="fe80::1", port=5000)),
    ],
)
def test_nodes_and_rendezvous_are_read(nodes, rendezvous, expected):
    assert parse_nodes(nodes, rendezvous) == expected


@pytest.mark.parametrize(
    ("nodes", "rendezvous", "told"),
    [
        ("2", None, "go together"),
        (None, "host", "go together"),
        ("0", "host", "expected N or MIN:MAX of at least 1, got '0'"),
        ("4:2", "host", "expected N or MIN:MAX of at least 1, got '4:2'"),
        ("two", "host", "expected N or MIN:MAX of at least 1, got 'two'"),
        ("2", "host:port", "expected HOST or HOST:PORT, got 'host:port'"),
    ],
)
def test_nodes_and_rendezvous_that_make_no_sense_are_refused(nodes, rendezvous, told):
    with pytest.raises(UsageError, match=told):
        parse_nodes(nodes, rendezvous)


def test_of_two_agents_at_one_address_the_first_keeps_the_meeting_point_and_the_second_finds_it():
    import torch.distributed as dist

    with meeting_point(Nodes(maximum=2)) as (host, port, own):
        assert (host, own) == ("127.0.0.1", "127.0.0.1")
        with meeting_point(Nodes(maximum=2, port=port)) as (_, again, _):
            assert again == port
            dist.TCPStore(host, port, is_master=False, wait_for_workers=False).set("met", "here")
        assert dist.TCPStore(host, port, is_master=False, wait_for_workers=False).get("met") == b"here"


@pytest.mark.parametrize(
    ("exitcode", "lasted_s", "left", "told"),
    [
        (-9, 10, 1, "rank 5 on {host} was ended by SIGKILL; all start again from the last checkpoint (restart 3 of 3)"),
        (1, 1000, 3, "rank 5 on {host} ended with status 1; all start again from the last checkpoint (restart 1 of 3)"),
        (2, 1000, 0, "rank 5 on {host} ended with status 2; the run ends"),
    ],
)
def test_an_agent_says_who_was_lost_and_counts_only_restarts_soon_after_each_other(
    monkeypatch, capsys, exitcode, lasted_s, left, told
):
    failures = {5: SimpleNamespace(exitcode=exitcode), 6: SimpleNamespace(exitcode=-signal.SIGTERM)}
    result = RunResult(state=WorkerState.FAILED, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda agent, group: result)
    agent = Agent.__new__(Agent)
    agent._worker_group = WorkerGroup(SimpleNamespace(max_restarts=3, local_world_size=2))
    agent._remaining_restarts, agent._began = 1, time.monotonic() - lasted_s
    assert agent._monitor_workers(agent._worker_group) is result
    assert agent._remaining_restarts == left
    assert capsys.readouterr().err == f"train: {told.format(host=socket.gethostname())}\n"
