"""The job templates do what they say: what AWS Batch would run converts, and scripts called wrongly say how to call them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fmristream
from tests.ingest.cohorts import contents, convert, write_runs
from tests.ingest.test_masks import head

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = [TOOLS / "slurm" / "convert_array.sh", TOOLS / "batch" / "submit.sh"]


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
    assert "SHARDS" in called.stderr
    assert "set -eu" not in called.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_shell(script):
    subprocess.run(["shellcheck", str(script)], check=True)
