"""Numbers and texts for people."""

import io
import json
import sys

import pytest

from fmristream.cli.progress import meter
from fmristream.cli.words import as_json, duration, on_one_line, plural, shown_url, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (5e8, "500 MB"), (2.1e12, "2.1 TB"), (9e18, "9e+03 PB")],
)  # fmt: skip
def test_sizes_are_in_decimal_units(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (75, "1 min 15 s"), (7200, "2 h 0 min"), (1e7, "2,777 h 46 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plurals():
    assert [plural(count, "run") for count in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]


def test_json_has_null_where_numbers_are_not_finite():
    assert json.loads(as_json({"a": float("nan"), "b": (1.5, float("inf")), 3: {"c": None}})) == {
        "a": None, "b": [1.5, None], "3": {"c": None},
    }  # fmt: skip


def test_texts_keep_their_letters_and_lose_control_characters():
    assert on_one_line("é 名 [bold]\n\x1b[31m\x00") == "é 名 [bold]  [31m "


def test_urls_lose_what_may_be_secret_and_cohorts_keep_their_parameters():
    assert shown_url("s3://u:p@b/x?t=1#f") == "s3://b/x"
    assert shown_url("synth://?subjects=3") == "synth://?subjects=3"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_stage_rate_and_detail(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with meter(quiet=False) as shown:
        shown.update("nothing to do", done=0, total=0, unit="frames")
        for done in range(0, 101, 10):
            shown.update("converting", done=done, total=100, unit="frames", detail="run 1 of 2")
        shown.update("checking objects", done=5_000_000, total=5_000_000, unit="bytes")
    text = terminal.getvalue()
    assert "converting" in text
    assert "100%" in text
    assert "frames/s" in text
    assert "run 1 of 2" in text
    assert "checking objects" in text
    assert "nothing to do" not in text
