"""Shares of a conversion, done by tasks that know nothing of each other: in any order, killed, twice or not at all."""

import functools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import CorruptDataError, SplitError
from fmristream.ingest.options import ConvertOptions, ConvertReport, Progress, Shard
from fmristream.ingest.shard_jobs import share_of
from fmristream.ingest.sources import SourceRun
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, is_committed, objects, six_runs, write_runs
from tests.ingest.nifti_files import AFFINE, gzip_members, nifti_bytes
from tests.ingest.test_masks import HEAD, MNI, head, write_derivative

OTHER = tuple(tuple(value + 1.0 for value in row) for row in AFFINE)
ALMOST = tuple(tuple(value + (5e-4 if column == 3 else 0.0) for column, value in enumerate(row)) for row in AFFINE)


class Interrupted(BaseException):
    """What a signal would raise, at a chosen moment."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Heads on three grids of which two are one within a thousandth of a millimetre, a dark run, a damaged run."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    for number in range(9):
        affine = (AFFINE, ALMOST, OTHER)[number % 3]
        write_runs(folder, {f"sub-{number}_bold": head(number)}, srow=affine)
    write_runs(folder, {"sub-dark_bold": np.zeros((*HEAD, 12), "<i2")})
    damaged = bytearray(gzip_members(nifti_bytes(head(1))))
    damaged[len(damaged) // 2] ^= 4
    (folder / "sub-bad_bold.nii.gz").write_bytes(damaged)
    (folder / "sub-empty_bold.nii.gz").write_bytes(b"")
    return str(folder)


def stages(source: str, url: str, order, **options) -> list[str]:
    return [convert(source, url, **{"mask": "auto", "shard": shard, **options}).stage for shard in order]


@functools.cache
def plain(source: str, **options) -> tuple[str, ConvertReport]:
    """A conversion that knows of no shards, once per source: beside it."""
    url = str(Path(source).parent / f"alone-{len(list(Path(source).parent.iterdir()))}")
    return url, convert(source, url, **{"mask": "auto", **options})


def same_as_plain(source: str, url: str, **options) -> ConvertReport:
    """Commit, and compare with a conversion that knew of no shards."""
    assert not is_committed(url)
    report = convert(source, url, **{"mask": "auto", **options})
    alone, expected = plain(source, **options)
    assert report.content_digest == expected.content_digest
    assert {one.name for one in report.quarantined} == {one.name for one in expected.quarantined}
    assert sorted(report.warnings) == sorted(expected.warnings)
    assert contents(url) == contents(alone)
    assert not [key for key in objects(url) if key.startswith("pending/")]
    return report


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_shards_in_any_order_leave_nothing_to_do_for_the_conversion_that_commits(mixed, tmp_path, seed):
    url, draw = str(tmp_path / "out"), random.Random(seed)
    count = draw.choice([2, 3, 5, 14])
    order = [f"{index}/{count}" for index in range(1, count + 1)]
    draw.shuffle(order)
    first = stages(mixed, url, order)
    assert first == ["masks"] * (count - 1) + ["runs"]
    draw.shuffle(order)
    assert stages(mixed, url, order) == ["runs"] * count
    report = same_as_plain(mixed, url)
    assert (report.runs, report.resumed, len(report.quarantined)) == (10, 10, 2)


@pytest.mark.full
def test_the_last_shard_to_come_and_those_that_never_came_are_made_up_for(mixed, tmp_path):
    url = str(tmp_path / "out")
    assert stages(mixed, url, ["1/3", "2/3", "3/3", "1/3"]) == ["masks", "masks", "runs", "runs"]
    report = same_as_plain(mixed, url)
    assert 0 < report.resumed < 10


@pytest.mark.full
def test_a_shard_whose_masks_never_came_is_made_up_for(mixed, tmp_path):
    url = str(tmp_path / "out")
    report = convert(mixed, url, mask="auto", shard="2/2")
    assert (report.stage, report.missing_shards, report.exit_code) == ("masks", 1, 3 if report.quarantined else 0)
    assert same_as_plain(mixed, url).resumed == 0


def test_no_mask_to_compute_is_one_visit(tmp_path):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    assert stages(source, url, ["3/3", "1/3", "2/3"], mask="none") == ["runs"] * 3
    assert same_as_plain(source, url, mask="none").resumed == 6


def test_a_given_mask_is_one_visit_and_the_first_run_of_a_grid_gives_the_affine_wherever_it_is(tmp_path):
    mask = np.zeros((7, 6, 5), dtype="u1")
    mask[2:5] = 1
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(mask))
    for number in range(6):
        write_runs(tmp_path / "in", {f"sub-{number}_bold": bold(seed=number)}, srow=(ALMOST, AFFINE)[number % 2])
    url, given = str(tmp_path / "out"), str(tmp_path / "mask.nii")
    assert stages(str(tmp_path / "in"), url, ["1/2", "2/2"], mask=given) == ["runs"] * 2
    assert same_as_plain(str(tmp_path / "in"), url, mask=given).resumed == 6


@pytest.mark.full
def test_the_runs_own_masks_are_united_over_all_shards(tmp_path):
    rng = np.random.default_rng(0)
    runs = {f"{n}": (head(n), rng.random(HEAD) < 0.2 if n != 2 else None) for n in range(4)}
    source, url = write_derivative(tmp_path / "in", runs), str(tmp_path / "out")
    empty = gzip_members(nifti_bytes(np.zeros(HEAD, "u1")))
    (tmp_path / "in" / "sub-1" / "func" / f"sub-1_task-rest{MNI}_desc-brain_mask.nii.gz").write_bytes(empty)
    assert stages(source, url, ["1/3", "2/3", "3/3", "1/3", "2/3", "3/3"])[2:] == ["runs"] * 4
    assert same_as_plain(source, url).resumed == 3


@pytest.mark.parametrize("stage", ["computing masks", "converting"])
def test_a_shard_that_is_killed_goes_on_where_it_was(mixed, tmp_path, stage):
    url = str(tmp_path / "out")
    if stage == "converting":
        stages(mixed, url, ["1/2", "2/2"])
    seen: list[Progress] = []

    def stop(now: Progress) -> None:
        if now.stage == stage and now.frames_done > 2 * 12:
            raise Interrupted

    options = {"mask": "auto", "split": "none", "shard": "1/2"}
    with pytest.raises(Interrupted):
        fmristream.convert(mixed, url, options=ConvertOptions(**options), progress=stop)
    fmristream.convert(mixed, url, options=ConvertOptions(**options), progress=seen.append)
    if stage == "computing masks":
        read = max(now.frames_done for now in seen if now.stage == stage)
        assert 0 < read <= max(now.frames for now in seen if now.stage == stage) - 2 * 12
    assert stages(mixed, url, ["2/2", "1/2"]) == ["runs", "runs"]
    assert same_as_plain(mixed, url).resumed == 10


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.full)])
def test_two_tasks_at_the_same_shard_do_no_harm(request, tmp_path, kind):
    source = write_runs(tmp_path / "in", {f"sub-{n}_bold": head(n) for n in range(4)})
    url = str(tmp_path / "out") if kind == "local" else request.getfixturevalue("s3_url")
    gate = Barrier(4)

    def attempt(shard: str) -> str:
        gate.wait()
        return convert(source, url, mask="auto", shard=shard).stage

    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            last = list(pool.map(attempt, ["1/2", "2/2", "1/2", "2/2"]))
    assert last == ["runs"] * 4
    assert same_as_plain(source, url).resumed == 4


def test_every_run_is_in_exactly_one_shard_whatever_the_order_of_the_listing():
    runs = [SourceRun(key=f"sub-{n}/run.nii.gz", name=f"{n}", url="", subject=f"{n}") for n in range(101)]
    for count in (1, 2, 7, 101, 200):
        shares = [[run.key for run in share_of(runs, Shard(index=n + 1, count=count))] for n in range(count)]
        assert sorted(key for share in shares for key in share) == sorted(run.key for run in runs)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        mixed_up = random.Random(count).sample(runs, len(runs))
        assert shares == [
            [run.key for run in share_of(mixed_up, Shard(index=n + 1, count=count))] for n in range(count)
        ]


def test_records_of_shards_name_nobody_and_no_path(mixed, tmp_path):
    url = str(tmp_path / "out")
    stages(mixed, url, ["1/2", "2/2"])
    store = open_store(url)
    kinds = {key.split("/")[1] for key in store.list("pending")}
    assert {"masks", "shards"} < kinds
    text = "".join([*store.list("pending"), *(store.read(key).decode() for key in store.list("pending"))])
    assert not [word for word in ("sub-", "_bold", str(tmp_path), "nii", "dark") if word in text]


def test_a_shard_after_the_commit_does_nothing(mixed, tmp_path):
    url = str(tmp_path / "out")
    convert(mixed, url, mask="auto")
    before = objects(url)
    assert stages(mixed, url, ["1/2"]) == ["committed"]
    assert objects(url) == before


@pytest.mark.full
def test_a_damaged_record_of_masks_is_reported_and_costs_the_conversion_that_commits_nothing_but_time(mixed, tmp_path):
    url = str(tmp_path / "out")
    stages(mixed, url, ["1/2", "2/2"])
    store = open_store(url)
    for key in store.list("pending/masks"):
        store.delete(key)
        store.put_new(key, b"{}")
    with pytest.raises(CorruptDataError, match="run every shard again"):
        stages(mixed, url, ["1/2"])
    same_as_plain(mixed, url)


def test_a_split_that_cannot_be_is_refused_before_the_work(mixed, tmp_path):
    with pytest.raises(SplitError):
        convert(mixed, str(tmp_path / "out"), split="hash", split_ratios=(0.98, 0.01, 0.01), shard="1/2")
    assert not (tmp_path / "out").exists() or not objects(str(tmp_path / "out"))


def test_the_command_says_the_stage_of_a_shard(tmp_path, capsys):
    source, url = write_runs(tmp_path / "in", {f"sub-{n}_bold": head(n) for n in range(2)}), str(tmp_path / "out")
    command = ["convert", source, url, "--split", "none", "--quiet", "--shard"]
    assert main([*command, "1/2"]) == 0
    assert (
        "masks of 1 run recorded; run the shards again when all have got here (still missing: 1 of them)"
        in capsys.readouterr().out
    )
    assert main([*command, "2/2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["shard"], said["stage"], said["runs"]) == ("2/2", "runs", 1)
    assert main([*command, "1/2"]) == 0
    assert "1 run converted; when all shards are done, run the command without --shard" in capsys.readouterr().out
    assert main(["convert", source, url, "--split", "none", "--quiet"]) == 0
    assert "2 done before" in capsys.readouterr().out
    assert Path(url, "generations").exists()
