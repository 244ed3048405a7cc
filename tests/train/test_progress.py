"""What is shown of a run says its rates right, in lines for files and in a bar for terminals."""

import os
import pty
import re
import select
import subprocess
import sys
import textwrap

import pytest

from train.progress import Lines, Pace, time_words


def step(number, **facts):
    return {"step": number, "loss": 0.5, "lr": 1e-3, **facts}


def test_rates_are_those_of_the_steps_since_the_last_line(capsys):
    lines = Lines()
    for number in range(1, 5):
        late = number > 2
        lines.step(
            step(number, seconds=2.0 if late else 1.0, wait_s=0.5 if late else 0.1, frames=100), total=9, show_every=2
        )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 2/9: loss 0.5000, lr 1.00e-03, 100 frames/s, wait 10.0 %")
    assert second.startswith("step 4/9: loss 0.5000, lr 1.00e-03, 50 frames/s, wait 25.0 %")
    assert re.search(r"25.0 %, 0.5 steps/s, \d+ s left$", second)


def test_frames_that_are_not_known_are_not_guessed(capsys):
    lines = Lines()
    lines.step(step(1, seconds=1.0, wait_s=0.0, frames=None), total=9, show_every=1)
    assert "frames/s" not in capsys.readouterr().out


def test_a_pace_without_steps_claims_nothing():
    pace = Pace()
    assert (pace.frames_per_s, pace.wait_percent, pace.seconds_a_step) == (None, None, None)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (216_000, "2.5 d")]
)
def test_durations_come_in_the_unit_that_suits_them(seconds, words):
    assert time_words(seconds) == words


_RUN = """
    import sys
    from pathlib import Path
    from train.log import open_log
    with open_log(Path(sys.argv[1]), enabled=True) as log:
        log.event("start", {"step": 0})
        for number in range(1, 4):
            facts = {"step": number, "loss": 0.25, "lr": 0.001, "seconds": 0.5, "wait_s": 0.05, "frames": 64}
            log.step(facts, total=3, show_every=1)
"""


def run_on_a_terminal(path, *, stdout=None):
    """What a program that logs three steps draws on a terminal, without the terminal's own control sequences."""
    here, there = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "110"}
    command = [sys.executable, "-c", textwrap.dedent(_RUN), str(path)]
    process = subprocess.Popen(command, stdout=stdout or there, stderr=there, env=environment)
    os.close(there)
    drawn = b""
    while select.select([here], [], [], 60)[0]:
        try:
            piece = os.read(here, 4096)
        except OSError:  # Linux's end of a terminal that nobody holds
            break
        if not piece:
            break
        drawn += piece
    os.close(here)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())


def test_on_a_terminal_a_bar_tells_the_steps_and_events_stand_above_it(tmp_path):
    drawn = run_on_a_terminal(tmp_path / "log.jsonl")
    assert "start: step 0" in drawn
    assert re.search(r"step 3/3 \S+ loss 0\.2500, lr 1\.00e-03, 128 frames/s, wait 10\.0 %, 0 s left, peak", drawn)
    assert "step 3/3:" not in drawn
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_lines_go_to_a_pipe_while_the_bar_stays_on_the_terminal(tmp_path):
    with open(tmp_path / "out.txt", "wb") as file:
        drawn = run_on_a_terminal(tmp_path / "log.jsonl", stdout=file)
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["start", "step 1/3", "step 2/3", "step 3/3"]
    assert "\x1b" not in "".join(lines)
    assert "step 3/3 " in drawn
