"""The benchmark of streaming compares equal work: whatever is timed delivers the same z-scores, and what fails is told."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tools.bench_stream import main, make_layouts, prepared, wanted_cases
from tools.shaping_server import Shape, in_thread
from tools.stream_peers import environments
from tools.stream_peers.cases import LOCAL, MASKED, REMOTE, Case
from tools.stream_peers.checks import expected, require_equal
from tools.stream_peers.data import TFF_CROP, TFF_DROPPED, Facts
from tools.stream_peers.environments import REQUIREMENTS, Environment
from tools.stream_peers.layouts import MAKERS, prepare
from tools.stream_peers.worker import batch, one_round

SIZE = {"shape": (20, 19, 16), "frames": 33, "runs": 2, "window": 6}
HERE = {name: all(find_spec(module.replace("-", "_")) for module in REQUIREMENTS[name]) for name in REQUIREMENTS}

# Other people's packages warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Facts:
    return prepared(tmp_path_factory.mktemp("bench"), **SIZE)


def test_the_values_that_are_expected_are_those_of_nibabel_and_numpy(facts):
    for run in range(facts.runs):
        values = nibabel.load(facts.nifti(run, gzipped=True)).get_fdata()
        sd = values.std(axis=3, keepdims=True)
        z = np.divide(values - values.mean(axis=3, keepdims=True), sd, out=np.zeros_like(values), where=sd > 0)
        np.testing.assert_array_equal(facts.mask, sd[..., 0] > 0)
        for case in (Case(name="", peer=""), Case(name="", peer="", output=MASKED)):
            wanted = np.moveaxis(z[..., 5:11], -1, 0)
            wanted = wanted[:, facts.mask] if case.output == MASKED else wanted
            np.testing.assert_allclose(expected(facts, case, run, 5), wanted, atol=1e-4)


@pytest.mark.parametrize("case", LOCAL, ids=lambda case: case.name)
def test_every_way_delivers_the_same_windows(case, facts):
    if case.environment and not HERE[case.environment]:
        pytest.skip(f"{case.environment} is installed by the tool, in an environment of its own")
    if case.layout in MAKERS:
        prepare(facts, case.layout)
    seen = set()
    samples = case.open(facts)(1)
    for sample in islice(samples, 9):
        require_equal(facts, case, sample)
        seen.add(sample[:2])
    samples.close()
    assert len(seen) > 1 or case.peer.startswith("ceilings:")
    if not case.peer.startswith(("ceilings:", "loaders:")):
        assert any(start % facts.window for _, start in seen)
    told = one_round(case.open(facts), case, round=2, windows=3)
    assert (told["windows"], told["windows"] % batch(case)) == (4 if case.peer == "ours:ours" else 3, 0)


def test_tff_delivers_the_run_normalised_as_a_whole_beside_it(facts):
    [case] = [case for case in LOCAL if case.output == "TFF"]
    prepare(facts, "tff")
    run, start, values = next(case.open(facts)(3))
    stored = nibabel.load(facts.nifti(run)).get_fdata()[TFF_CROP][..., TFF_DROPPED:]
    inside = stored[stored != 0]
    z = (stored - inside.mean()) / inside.std(ddof=1)
    z[stored == 0] = z.min()
    first = start - TFF_DROPPED
    np.testing.assert_allclose(values[0].numpy(), z[..., first : first + facts.window], atol=1e-4)


def far_away(case: Case) -> object:
    # zarr's event loop keeps its HTTP session until the process ends, and may not end well beside others'.
    return pytest.param(case, id=case.name, marks=pytest.mark.full if "zarr_python" in case.peer else ())


@pytest.mark.parametrize("case", [far_away(case) for case in REMOTE])
def test_every_way_delivers_the_same_windows_from_far_away(case, facts):
    if case.layout == "webdataset" and shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl")
    if case.layout in MAKERS:
        prepare(facts, case.layout)
    with in_thread(facts.path, Shape(latency_s=0.001)) as (url, server):
        samples = case.open(replace(facts, url=url))(1)
        for sample in islice(samples, 5):
            require_equal(facts, case, sample)
        samples.close()
        assert server.counts.requests > 0
        if case.in_flight > 1:
            assert server.counts.most_in_flight > 1


def test_a_wrong_window_is_found_out(facts):
    [case] = [case for case in LOCAL if case.name == "fp16 .npy mmap, copied"]
    prepare(facts, "npy")
    run, start, values = next(case.open(facts)(1))
    require_equal(facts, case, (run, start, values))
    for wrong in ((run, start + 1, values), (1 - run, start, values), (run, start, np.nan * values)):
        with pytest.raises(ValueError, match="is off by up to"):
            require_equal(facts, case, wrong)
    with pytest.raises(ValueError, match="float32, expected"):
        require_equal(facts, case, (run, start, values.astype(np.float32)))


def test_results_are_told_as_table_document_and_picture(tmp_path, facts, capsys):
    size = ["--shape", "20x19x16", "--frames", "33", "--runs", "2", "--window", "6"]
    words = [*size, "--rounds", "2", "--seconds", "0.02", "--cases", "npy mmap, copied"]
    told = ["--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png")]
    assert main([str(facts.path.parent), *words, *told]) == 0
    document = json.loads((tmp_path / "result.json").read_text())
    base, npy = document["cases"]
    assert [base["case"]["name"], npy["case"]["name"]] == ["ours lossless placed, 1 thread", "fp16 .npy mmap, copied"]
    assert len(npy["windows_per_s"]) == 2
    assert base["ours_over_it"] == 1
    ratios = [b / a for a, b in zip(npy["windows_per_s"], base["windows_per_s"], strict=True)]
    assert npy["ours_over_it"] == pytest.approx(np.median(ratios))
    spent = [mine / ours for mine, ours in zip(npy["cpu_ms"], base["cpu_ms"], strict=True)]
    assert npy["ours_over_it_cpu"] == pytest.approx(np.median(spent))
    assert npy["stored_mb"] == pytest.approx(20 * 19 * 16 * 6 * 2 / 1e6, rel=0.02)
    assert document["packages"]["torch"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "fp16 .npy mmap, copied" in capsys.readouterr().out


def test_what_cannot_be_installed_or_made_is_told(tmp_path, facts, monkeypatch):
    def fail(command):
        raise environments.subprocess.CalledProcessError(1, command, stderr="\nERROR: No matching distribution\n")

    monkeypatch.setattr(environments, "_run", fail)
    assert environments.prepare("litdata", tmp_path) == Environment(
        versions={}, missing="not installed: ERROR: No matching distribution"
    )
    here = {"": Environment(python="/bin/false", versions={}), "gone": Environment(versions={}, missing="gone")}
    broken = Case(name="x", peer="loaders:litdata", layout="litdata")
    assert make_layouts([replace(broken, environment="gone")], facts, here) == {}
    assert "could not be made" in make_layouts([broken], facts, here)["x"]


def test_cases_are_chosen_by_words_and_bring_what_they_are_compared_with():
    assert wanted_cases(LOCAL, []) == list(LOCAL)
    assert [case.name for case in wanted_cases(LOCAL, ["TFF"])] == [
        "ours lossless placed, 1 thread",
        "TFF .pt, two copies",
    ]
    names = [case.name for case in wanted_cases(REMOTE, ["zarr-python"])]
    assert names[:2] == ["ours, 1 in flight", "ours, 8 in flight"]
    with pytest.raises(SystemExit, match="no case has nothing in its name"):
        wanted_cases(LOCAL, ["nothing"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_nobody_is_left_standing_still_when_the_benchmark_is_killed(facts):
    script = (
        "import sys, time\n"
        "from tools.stream_peers import measure\n"
        "from tools.stream_peers.cases import LOCAL\n"
        "from tools.stream_peers.data import Facts\n"
        "facts = Facts.parse(sys.argv[1])\n"
        "with measure.worker(measure.Measured(case=LOCAL[0]), facts, sys.executable) as one:\n"
        "    one.ask(None)\n"
        "    print(one.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, facts.text], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        status = Path(f"/proc/{int(driver.stdout.readline())}/stat")
        assert comes_to(status, "T")
        driver.kill()
    assert comes_to(status, "Z", "")


def comes_to(status: Path, *states: str) -> bool:
    """Whether a process reaches one of the states; "" is to be gone. Signals take their time."""
    for _ in range(1000):
        try:
            state = status.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = ""
        if state in states:
            return True
        time.sleep(0.01)
    return False
