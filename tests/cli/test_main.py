"""The command as a whole: what it loads, what it prints where, how it ends."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fmristream._version import __version__
from fmristream.cli.main import COMMANDS, main
from tests.report.datasets import brain_like, converted, two_runs, write_runs


def run(*words: str, **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "fmristream", *words], capture_output=True, text=True, **options)


def test_help_names_every_command_and_loads_nothing_heavy():
    probe = (
        "import sys; from fmristream.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'blake3', 'numpy', 'rich', 'fsspec', 'nibabel', 'zarr', 'numba', 'pyarrow', 'torch', 'dask', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip()) == (0, "[]")
        assert "usage: fmristream" in done.stdout
    listed = run("--help").stdout
    assert all(f"\n    {name} " in listed for name in COMMANDS)


def test_the_probe_for_heavy_packages_can_fail():
    probe = "import sys, numpy; print(sorted({'numpy'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stderr.strip() == "['numpy']"


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fmristream {__version__}"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["convert"],
        ["convert", "a", "b", "--workers", "many"],
        ["convert", "a", "b", "--split-ratios", "most,some"],
        ["convert", "a", "b", "--split-rat", "0.5,0.25,0.25"],  # options are not abbreviated
        ["verify"],
        ["preview", "a", "--limit", "0"],
    ],
)
def test_words_that_make_no_sense_are_wrong_usage(words, capsys):
    assert main(words) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "error: " in caught.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--workers", "0"], "--workers 0: expected 1 or more"),
        (["--threads", "0"], "--threads 0: expected 1 or 2"),
        (["--mask", "first:0"], "expected first:K"),
        (["--split-ratios", "0.5,0.2"], "three shares"),
        (["--split-ratios", "nan,0,1"], "three shares"),
        (["--tr", "-1"], "--tr -1.0: expected seconds above 0"),
    ],
)
def test_values_that_make_no_sense_are_wrong_usage_in_one_line(options, text, capsys, tmp_path):
    assert main(["convert", "synth://", str(tmp_path / "d"), *options]) == 2
    caught = capsys.readouterr()
    assert text in caught.err
    assert caught.err.startswith("error: ")
    assert caught.err.count("\n") == 1


def test_a_failure_is_one_line_without_traceback_unless_asked_for(capsys, tmp_path):
    assert main(["info", str(tmp_path / "nothing")]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("error: ")
    assert "no dataset here" in caught.err
    assert caught.err.count("\n") == 1
    assert main(["info", str(tmp_path / "nothing"), "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_secrets_in_urls_are_not_repeated(capsys, tmp_path):
    for url in ("s3://key:sEcReT@bucket/data", "https://host/data?token=sEcReT", "weird://user:sEcReT@host/x"):
        for words in (["info", url, "--debug"], ["verify", url], ["convert", "synth://?subjects=3", url, "--debug"]):
            assert main(words) in (1, 2)
            caught = capsys.readouterr()
            assert "sEcReT" not in caught.out + caught.err, words
    assert main(["info", "a", "s3://key:sEcReT@bucket/data"]) == 2
    assert "sEcReT" not in capsys.readouterr().err


def test_a_message_cannot_move_the_cursor(capsys, tmp_path):
    assert main(["info", str(tmp_path / "a\x1b[2Jb")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_the_installed_command_converts_describes_verifies_and_draws(tmp_path):
    source, out = "synth://?subjects=4&shape=8x9x7&frames=6", str(tmp_path / "d")
    done = run("convert", source, out, "--split", "exact")
    assert done.returncode == 0, done.stderr
    assert "converted" in done.stdout
    assert "converting: 24 frames" in done.stderr
    described = json.loads(run("info", out, "--json").stdout)
    assert (described["runs"], described["frames"]) == (4, 24)
    assert run("verify", out, "--deep", "--against", source, "--quiet").stderr == ""
    drawn = run("preview", out, "--out", str(tmp_path / "pictures"), "--limit", "1")
    assert drawn.stdout.split() == [str(tmp_path / "pictures" / "sub-0001_run-1.png")]
    assert Path(drawn.stdout.strip()).stat().st_size > 10_000


def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    source = write_runs(tmp_path / "source", {f"sub-{n}_bold.nii": brain_like((3, 3, 3, 2)) for n in range(30)})
    converted(source, tmp_path / "d")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fmristream", "info", str(tmp_path / "d"), "--runs"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupted_conversion_says_how_to_go_on_and_does(tmp_path):
    words = ["convert", "synth://?subjects=24&shape=40x40x40&frames=120", str(tmp_path / "d"), "--split", "none"]
    command = [sys.executable, "-m", "fmristream", *words]
    listening = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # where tests run in the background, it is ignored
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("converting"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == "interrupted: finished runs are kept; run the same command again and it goes on from there"
    assert main([*words, "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "d"), "--deep", "--quiet"]) == 0


def test_wide_tables_are_not_cut_where_nobody_looks(tmp_path, capsys):
    name = "sub-01_" + "task-" + "x" * 150
    source = write_runs(tmp_path / "source", {f"{name}.nii": brain_like()})
    converted(source, tmp_path / "d")
    assert main(["info", str(tmp_path / "d"), "--runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(name + "  ") for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_info_lists_runs_in_both_forms(tmp_path, capsys):
    _, url = two_runs(tmp_path)
    assert main(["info", str(url), "--runs", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["run_table"]] == ["sub-1_bold", "sub-2_bold"]
    assert main(["info", str(url), "--runs"]) == 0
    text = capsys.readouterr().out
    assert document["content_digest"] in text
    assert document["generation_digest"] in text
    assert "sub-2_bold" in text
