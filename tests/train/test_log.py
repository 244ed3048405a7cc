"""The log tells what led to where a run stands, however often it was killed."""

import json

import pytest

from fmristream.errors import CorruptDataError
from train.log import last_logged_step, newest_attempt, open_log, read_history


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def start(step):
    return {"event": "start", "step": step}


def step(number, loss=1.0):
    return {"event": "step", "step": number, "loss": loss}


def test_steps_that_a_resume_undid_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    looked = {"event": "eval", "step": 2, "auroc": 0.5}
    write(
        path,
        start(0),
        step(1),
        step(2),
        looked,
        step(3),
        start(1),
        step(2, 7.0),
        {"event": "damaged"},
        start(2),
        step(3, 8.0),
    )
    history = read_history(path)
    assert [(entry["step"], entry["loss"]) for entry in history.steps] == [(1, 1.0), (2, 7.0), (3, 8.0)]
    assert history.evals == []


def test_a_line_that_a_kill_cut_is_closed_and_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, start(0), step(1))
    with open(path, "a") as file:
        file.write('{"event": "step", "st')
    assert [entry["step"] for entry in read_history(path).steps] == [1]
    with open_log(path, enabled=True) as log:
        log.event("start", {"step": 1})
        log.step(step(2, float("nan")), total=9, show_every=3)
    history = read_history(path)
    assert [(entry["step"], entry["loss"]) for entry in history.steps] == [(1, 1.0), (2, None)]


def test_what_a_power_cut_left_of_a_line_need_be_no_text(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [b'{"event": "start", "attempt": "1-a", "step": 0}', b'{"event": "step", "step": 1}']
    path.write_bytes(b"\n".join([*lines, b'{"event": "st\x00\xff\xc3']))
    with open_log(path, enabled=True) as log:
        log.event("start", {"step": 1})
    assert [entry["step"] for entry in read_history(path).steps] == [1]
    assert (last_logged_step(path), newest_attempt(path)) == (1, "1-a")


def test_a_line_damaged_in_any_other_way_is_not_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, start(0), step(1), step(2))
    path.write_text(path.read_text().replace('"step": 1', '"step": '))
    with pytest.raises(CorruptDataError, match="line 2 is not the JSON that was written"):
        read_history(path)


def test_a_rank_that_keeps_no_log_writes_and_shows_nothing(tmp_path, capsys):
    with open_log(tmp_path / "log.jsonl", enabled=False) as log:
        log.event("start", {"step": 1})
        log.step(step(2), total=2, show_every=1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.jsonl").exists()


def test_the_screen_shows_every_so_many_steps_and_the_last(tmp_path, capsys):
    with open_log(tmp_path / "log.jsonl", enabled=True) as log:
        for number in range(1, 8):
            log.step({**step(number), "lr": 0.1}, total=7, show_every=3)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["step 3/7", "step 6/7", "step 7/7"]
    assert "s left" in shown[1]
