"""Trackers hold what the log holds, once, and nothing that names a person, a place or a secret."""

import importlib.util
import json
import os
import re
import shutil
import threading

import pytest

from fmristream import StreamingDataset
from fmristream.errors import UsageError
from tests.train.test_event_files import float32, read
from train import loop
from train.checkpoint import checkpoint_steps
from train.config import recipe_from
from train.launch import World
from train.log import last_logged_step, open_log, read_history
from train.main import main
from train.trackers import Tracking, require_trackers, told_numbers, told_settings

SECRETS = ("sub-", "SECRET-PLACE", "SECRET-COLUMN")


def is_installed(name):
    return importlib.util.find_spec(name) is not None


def packages():
    return [
        pytest.param(name, marks=pytest.mark.skipif(not is_installed(name), reason=f"{name} is not installed here"))
        for name in ("wandb", "mlflow")
    ]


@pytest.fixture
def no_network(monkeypatch):
    """Both write to the run's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def trained(recipe, out):
    assert loop.train(recipe, out=out, world=World()) is not None
    return read_history(out / "log.jsonl")


def go_back(out, *, to):
    for step in checkpoint_steps(out / "checkpoints"):
        if step > to:
            shutil.rmtree(out / "checkpoints" / f"step-{step}")


def test_tensorboard_has_the_logs_numbers_also_after_a_resume(small_recipe, tmp_path):
    recipe = small_recipe(train={"steps": 12, "eval_every": 6})
    trained(recipe, tmp_path)
    go_back(tmp_path, to=5)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "step", "st')  # as a kill leaves it
    history = trained(recipe, tmp_path)
    found = read(tmp_path / "tensorboard")
    for key in ("loss", "lr", "gradient_norm", "seconds", "wait_s", "frames", "epoch"):
        told = [(step, value) for step, value, _ in found[f"train/{key}"]]
        assert told == [(entry["step"], float32(entry[key])) for entry in history.steps], key
    assert [(step, value) for step, value, _ in found["val/auroc"]] == [
        (entry["step"], float32(entry["auroc"])) for entry in history.evals
    ]
    assert [step for step, _, _ in found["train/frames_per_s"]] == list(range(1, 13))
    assert last_logged_step(tmp_path / "log.jsonl") == 12


@pytest.mark.parametrize("name", packages())
def test_a_resumed_run_goes_on_under_its_key_and_sends_no_step_twice(small_recipe, tmp_path, name, no_network):
    named = {"watch": {"trackers": [name]}, "optim": {"schedule": "constant"}}  # more steps change no step's rate
    trained(small_recipe(train={"steps": 12}, **named), tmp_path)
    key = json.loads((tmp_path / "trackers.json").read_text())[name]
    go_back(tmp_path, to=5)
    trained(small_recipe(train={"steps": 14}, **named), tmp_path)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {name: key}
    losses = {entry["step"]: entry["loss"] for entry in read_history(tmp_path / "log.jsonl").steps}
    assert sent_losses(name, tmp_path, key) == [(step, losses[step]) for step in range(1, 15)]


def sent_losses(name, out, key):
    """(step, loss) as the package's own reader has them, in the order of sending."""
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
        return [(metric.step, metric.value) for metric in client.get_metric_history(key, "train/loss")]
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((out / "wandb").glob(f"offline-run-*-{key}/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in row:
                found.append((int(json.loads(row["_step"])), json.loads(row["train/loss"])))
    return found


def leveldb_records(data):
    """Records of a W&B file: LevelDB's log format after a head of 7 bytes that counts in its first block of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield whole
            whole = b""


@pytest.mark.parametrize("name", ["tensorboard", *packages()])
def test_nothing_that_is_written_names_a_subject_a_place_or_a_user(
    cohort, small_recipe, tmp_path, monkeypatch, name, no_network
):
    place = tmp_path / "SECRET-PLACE"
    shutil.copytree(cohort, place)
    monkeypatch.setenv("USER", "SECRET-COLUMN")
    monkeypatch.setenv("LOGNAME", "SECRET-COLUMN")
    recipe = small_recipe(
        data={"url": str(place), "where": "subject != 'sub-0001'"},
        train={"steps": 3, "eval_every": 3},
        watch={"trackers": [name]},
    )
    out = tmp_path / "run"
    trained(recipe, out)
    clips = StreamingDataset(str(place), window=8)
    labels = {run.subject for run in clips.runs}
    assert "0001" in labels
    named = re.compile(rf"(?<![0-9A-Za-z.])({'|'.join(labels)})(?![0-9A-Za-z])".encode())
    searched = []
    for path in out.rglob("*"):
        # What the trackers wrote, beside the run's own files; `.wandb` and databases hold their texts plainly.
        if path.is_file() and path.relative_to(out).parts[0] in ("tensorboard", "wandb", "mlruns", "mlflow.db"):
            searched.append(path)
            data = path.read_bytes()
            text = data.replace(str(tmp_path).encode(), b"")  # the folder itself, where a local store says where it is
            assert not named.search(text), (path, named.search(text))
            for secret in (*SECRETS, "train/windows"):
                assert secret.encode() not in text, (path, secret)
            assert str(place).encode() not in data
    assert searched


def test_of_a_recipe_only_numbers_choices_and_a_few_names_are_told():
    told = told_settings(
        recipe_from(
            {
                "data": {
                    "url": "s3://SECRET-PLACE/x",
                    "where": "subject == 'sub-0001'",
                    "target": "age",
                    "columns": ["SECRET-COLUMN"],
                    "atlases": {"sub-7": "/home/SECRET-PLACE/a.nii"},
                    "grid": [8, 8, 8],
                },
                "model": {"name": "swift", "head": "v1", "embed_dim": 6, "note": "sub-0001"},
                "objective": {"kind": "regression"},
                "start": {"from": "/home/SECRET-PLACE/run"},
            }
        )
    )
    assert told["data.target"] == "age"
    assert (told["model.embed_dim"], told["objective.kind"], told["data.grid"]) == (6, "regression", [8, 8, 8])
    assert told["optim.lr"] == 1e-3
    for hidden in ("data.url", "data.where", "data.columns", "data.atlases", "start.from", "model.note"):
        assert hidden not in told
    assert not any(secret in str(told) for secret in SECRETS)


def test_text_lists_and_what_is_no_number_are_not_sent():
    facts = {"step": 3, "loss": 0.5, "bad": float("nan"), "windows": [1, 2], "who": "sub-1", "ok": True, "r (n)": 2}
    assert told_numbers(facts, prefix="train") == {"train/loss": 0.5, "train/r__n_": 2.0}


def test_a_missing_package_is_named_before_the_first_step(small_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = small_recipe(watch={"trackers": ["wandb"]})
    with pytest.raises(UsageError, match=r"pip install 'fmristream\[wandb\]'"):
        require_trackers(recipe)
    with pytest.raises(UsageError, match="needs the package wandb"):
        loop.train(recipe, out=tmp_path / "run", world=World())
    assert not (tmp_path / "run").exists()
    assert main(["swift_tiny_cpu", "--set", "watch.trackers=['tensorbord']", "--check"]) == 2
    assert "did you mean tensorboard?" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_under_a_tracker_is_said_once_and_training_goes_on(small_recipe, tmp_path, capsys):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    # The next name, of which every write fails as on a full disk.
    (folder / "events.out.tfevents.0000000000").touch()
    opened = loop.start

    def start(*arguments, **named):
        run = opened(*arguments, **named)
        (tracking,) = [watcher for watcher in run.log.watchers if isinstance(watcher, Tracking)]
        file = tracking._tracker._file
        file._file.close()
        file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "start", start)
        history = trained(small_recipe(train={"steps": 6}), tmp_path)
    assert [entry["step"] for entry in history.steps] == list(range(1, 7))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert (warning["tracker"], warning["so"]) == ("tensorboard", "training goes on without it")
    assert "No space left" in warning["reason"]
    assert capsys.readouterr().out.count("No space left") == 1


class Stubborn:
    """A tracker of a server that answers when it is let, and then fails."""

    key = "k"

    def __init__(self):
        self.go_on = threading.Event()
        self.rows = []

    def send(self, rows):
        self.go_on.wait(60)
        self.rows += rows
        if len(self.rows) > 2:
            raise ConnectionError("https://name:word@host/path?token=1 is gone")

    def close(self):
        raise AssertionError("not after a failure")


def test_a_server_that_hangs_holds_no_step_up_and_what_it_says_at_last_shows_no_secret(tmp_path):
    server = Stubborn()
    with open_log(tmp_path / "log.jsonl", enabled=True) as log:
        log.join(Tracking("far", lambda: server, after=1, log=log))
        for number in range(1, 9):  # returns while the server waits
            log.step({"step": number, "loss": 1.0, "lr": 0.1}, total=9, show_every=9)
        server.go_on.set()
    assert [row.step for row in server.rows] == list(range(2, 9))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert warning["reason"].startswith("ConnectionError: https://host/path")
    assert "word" not in str(warning)
    assert "token" not in str(warning)


def test_a_tracker_that_cannot_be_opened_is_said_and_the_log_goes_on(tmp_path):
    def refuse():
        raise PermissionError("no key")

    with open_log(tmp_path / "log.jsonl", enabled=True) as log:
        log.join(Tracking("far", refuse, after=0, log=log))
        log.step({"step": 1, "loss": 1.0, "lr": 0.1}, total=1, show_every=1)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["warning", "step"]
