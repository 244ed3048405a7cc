"""Processes find each other, also after one of them died, and any number of them takes the same step."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from train import launch
from train.launch import LaunchError, join_world, local_device_count, source_address, stop_on_sigterm
from train.main import main

RANKS = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).parents[2]
GROUP_DUTIES = ("exchange", "gradient", "contrast", "several_targets", "norm")
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"}


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start_ranks(size, arguments, *, port=None, absent=(), **environment):
    """Processes with the variables that torchrun sets, but no torchrun."""
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, str(RANKS), *arguments],
            env=os.environ | QUIET | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
        if rank not in absent
    ]


def finish(processes, *, timeout=90):
    """(exit status, what it said) of each."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def results(folder, duty, size):
    return [json.loads((folder / f"{duty}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What worlds of 1, 2 and 3 ranks found."""
    found = {}
    for size in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"world{size}")
        assert [code for code, _ in finish(start_ranks(size, [",".join(GROUP_DUTIES), str(out)]))] == [0] * size
        found[size] = {duty: results(out, duty, size) for duty in GROUP_DUTIES}
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_batch_normalisation_is_that_of_one_process_whatever_the_share(groups, size):
    generator = torch.Generator().manual_seed(4)
    rows, weights = 5 + torch.randn(7, 3, generator=generator), torch.randn(7, 3, generator=generator)
    oracle = torch.nn.BatchNorm1d(3)
    rows.requires_grad_()
    loss = (oracle(rows).sigmoid() * weights).sum(1).mean()
    loss.backward()
    for found in [*groups[1]["norm"], *groups[size]["norm"]]:
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for ours, theirs in zip(found["gradient"], (oracle.weight.grad, oracle.bias.grad), strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(found["of_rows"]), rows.grad, rtol=1e-4, atol=1e-6)
        mean, variance, count = found["running"]
        torch.testing.assert_close(torch.tensor(mean), oracle.running_mean)
        torch.testing.assert_close(torch.tensor(variance), oracle.running_var)
        assert count == 1


def test_without_torchruns_variables_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_world(timeout_s=1) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        rows = torch.arange(6).reshape(3, 2)
        assert torch.equal(world.gather(rows), rows)
        assert torch.equal(world.stack(rows), rows[None])
        assert world.from_main(5) == 5
        world.wait_for_all()
    assert not torch.distributed.is_initialized()
    assert local_device_count() == (torch.cuda.device_count() or 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_learns_the_rows_of_all_in_rank_order(groups, size):
    for found in groups[size]["exchange"]:
        assert found["gather"] == [[10 * r + 2 * i, 10 * r + 2 * i + 1] for r in range(size) for i in range(r)]
        assert found["gather_none"] == [0, 3]
        assert found["stack"] == [[r, -r] for r in range(size)]
        assert found["from_main"] == 7
        assert found["heed_stop"] == [False, True]


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_shares_give_the_gradient_and_loss_of_one_process(groups, size):
    (alone,) = groups[1]["gradient"]
    for found in groups[size]["gradient"]:
        for step, expected in zip(found, alone, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert step["gradient"] == pytest.approx(expected["gradient"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("size", [2, 3])
def test_windows_are_told_from_those_of_all_ranks_as_if_one_process_held_them(groups, size):
    (alone,) = groups[1]["contrast"]
    for found in groups[size]["contrast"]:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert found["gradient"] == pytest.approx(alone["gradient"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("size", [2, 3])
def test_several_targets_give_the_loss_and_gradient_of_one_process_whoever_has_the_labels(groups, size):
    (alone,) = groups[1]["several_targets"]
    for found in groups[size]["several_targets"]:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        torch.testing.assert_close(
            torch.tensor(found["gradient"]), torch.tensor(alone["gradient"]), rtol=1e-5, atol=1e-7
        )


def test_all_ranks_get_the_same_gradient_to_the_bit(groups):
    assert groups[3]["gradient"][0] == groups[3]["gradient"][1] == groups[3]["gradient"][2]


@pytest.mark.parametrize("size", [2, 3])
def test_a_gradient_is_the_same_to_the_bit_whether_or_not_steps_came_before(groups, size):
    # What makes a resumed run the uninterrupted one: DDP sums in the same order in its first step and later.
    assert all(found["resumed_is_same"] for found in groups[size]["gradient"][0])


def test_a_rank_that_never_comes_is_told_by_the_others_in_time(tmp_path):
    ended = finish(start_ranks(3, ["exchange", str(tmp_path)], absent=[1], TEST_ASSEMBLE_S="3", TEST_TIMEOUT_S="3"))
    assert all(code != 0 for code, _ in ended)
    assert any("the other ranks did not come" in said for _, said in ended)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),  # as torch 2.13 says it in the backward pass
        (dist.DistNetworkError("recv failed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("/gloo/"), False),
    ],
)
def test_the_loss_of_another_rank_is_told_from_faults_of_our_own(error, is_loss):
    assert launch._is_loss(error) is is_loss


def test_a_hung_rank_makes_the_others_fail_within_the_timeout(tmp_path):
    waiting, hung = start_ranks(2, ["hang", str(tmp_path)], TEST_TIMEOUT_S="4")
    try:
        code, said = finish([waiting], timeout=60)[0]
        assert code != 0
        assert "rank 1 died or hangs (" in said
    finally:
        hung.send_signal(signal.SIGKILL)
        hung.communicate()


def test_after_a_death_torchrun_restarts_and_the_ranks_find_each_other_on_the_same_port(tmp_path):
    # torchrun hands every attempt the same key-value server, in which the dead attempt's addresses still stand.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "3", str(RANKS), "die_once", str(tmp_path)],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {found["attempt"] for found in results(tmp_path, "die_once", 3)} == {"1"}
    assert len({path.read_text() for path in tmp_path.glob("port-*")}) == 1


def dealt(cohort, out, *, size):
    """What `size` ranks under torchrun get of each stream, put together again: batches of rows, first views first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    out.mkdir()
    environment = os.environ | QUIET | {"DATASET": str(cohort)}
    subprocess.run([*torchrun, str(RANKS), "deal", str(out)], env=environment, check=True, timeout=180)
    ranks = results(out, "deal", size)
    whole = {}
    for name in ranks[0]:
        batches = []
        for shares in zip(*(rank[name] for rank in ranks), strict=True):
            views = shares[0][0]
            parts = [list(zip(*share[1:], strict=True)) for share in shares]
            rows = [
                row
                for view in range(views)
                for part in parts
                for row in part[view * len(part) // views : (view + 1) * len(part) // views]
            ]
            batches.append(rows)
        whole[name] = batches
    return whole


def test_real_ranks_get_the_same_global_batches_with_filters_weights_views_and_mixtures(cohort, tmp_path):
    alone, three = (dealt(cohort, tmp_path / str(size), size=size) for size in (1, 3))
    assert three == alone
    assert {name: len(batches) for name, batches in alone.items()} == {"balanced": 6, "views": 6, "mixed": 6}
    assert {len(batch) for batch in alone["views"]} == {14}


def test_a_rank_that_was_not_started_by_torchrun_never_starts_others_and_check_needs_no_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main(["swift_tiny_cpu", "--check", "--set", "optim.lr=1e-4", "--nproc", "7"]) == 0
    assert "lr = 0.0001" in capsys.readouterr().out


def test_nproc_starts_the_processes_and_gives_back_their_exit_status(cohort, tmp_path):
    train = [sys.executable, "-m", "train", "swift_tiny_cpu", "--nproc", "2", "--out", str(tmp_path)]
    wrong = ["--set", f"data.url={cohort}", "--set", "data.target=shoe size"]
    done = subprocess.run(
        [*train, *wrong], env=os.environ | QUIET, cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2
    assert "train [rank " in done.stderr
    assert "no column 'shoe size'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ended with status 2; the run ends" in done.stderr  # it would be wrong again


def test_ctrl_c_asks_for_a_checkpoint_and_a_second_one_ends_at_once(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with restored_signals(), stop_on_sigterm() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked
        assert "a checkpoint, then the end" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_heeded_though_nobody_reads_what_is_said_and_later_signals_are_the_callers_again(tmp_path):
    script = """
import os, signal
from train.launch import stop_on_sigterm
read, write = os.pipe()
os.dup2(write, 2), os.close(read), os.close(write)
with stop_on_sigterm() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.is_asked
os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {name: value for name, value in (os.environ | QUIET).items() if name != "WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=90)
    assert done.returncode == -signal.SIGTERM


def test_ctrl_c_reaches_several_ranks_as_often_as_their_agent_hands_it_on(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with restored_signals(), stop_on_sigterm() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked


@contextmanager
def restored_signals():
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("was_asked", [True, False])
def test_who_is_ending_after_a_signal_is_not_killed_by_another(was_asked, number):
    before = {known: signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with stop_on_sigterm() as stop:
            if was_asked:
                os.kill(os.getpid(), number)
            assert stop.is_asked is stop.is_signalled is was_asked
        if was_asked:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            assert {known: signal.getsignal(known) for known in before} == before
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


@pytest.mark.parametrize(("agents", "comes"), [(2, True), (2, False), (1, False)])
def test_ranks_that_follow_those_of_another_machine_wait_for_their_own_signal(monkeypatch, agents, comes):
    monkeypatch.setattr(launch, "_OWN_SIGNAL_S", 60.0 if comes else 0.05)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(agents))
    before = {known: signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)}
    follows = pytest.raises(LaunchError, match="asked to end") if agents == 2 and not comes else nullcontext()
    comrade = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with follows, join_world(timeout_s=1) as world, stop_on_sigterm(world.stop) as stop:
            stop.is_asked = True  # as the exchange of a step tells
            if comes:
                comrade.start()
    finally:
        comrade.cancel()
        for known, handler in before.items():
            signal.signal(known, handler)


def test_the_interface_is_the_one_that_leads_to_the_others():
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert launch._interface_of("127.0.0.1") == "lo"
    assert launch._interface_of("192.0.2.254") is None


@pytest.mark.parametrize(("size", "said"), [(1, "said\nteardown\n"), (2, "said\n")])
def test_a_rank_of_several_ends_with_its_status_and_its_words_but_without_teardown(size, said):
    code = (
        "import atexit; from train.__main__ import leave; atexit.register(print, 'teardown'); print('said'); leave(3)"
    )
    environment = os.environ | QUIET | {"WORLD_SIZE": str(size)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (3, said)
