"""Planning a large collection: headers are read several at a time, and what comes out does not depend on who is first."""

import random
import threading
import time
from pathlib import Path

import pytest

from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.plan import group_grids, in_order, survey
from fmristream.ingest.sources import find_runs
from fmristream.signal.grid import Grid, same_grid
from tests.ingest.cohorts import bold, write_runs
from tests.ingest.nifti_files import AFFINE


def test_results_keep_their_order_and_no_more_are_waited_for_than_asked():
    lock, at_work, most, begun = threading.Lock(), 0, 0, 0

    def work(number: int) -> int:
        nonlocal at_work, most, begun
        with lock:
            at_work, begun = at_work + 1, begun + 1
            most = max(most, at_work)
        time.sleep(random.Random(number).uniform(0, 0.004))
        with lock:
            at_work -= 1
        return number

    found = []
    for result in in_order(work, range(200), threads=8):
        found.append(result)
        assert begun <= len(found) + 2 * 8
    assert found == list(range(200))
    assert 2 <= most <= 8


def test_the_first_error_in_order_ends_the_work_and_the_threads():
    def work(number: int) -> int:
        if number == 5:
            time.sleep(0.05)
        if number >= 5:
            raise ValueError(number)
        return number

    with pytest.raises(ValueError, match="5"):
        list(in_order(work, range(1000), threads=4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream-plan")]


def test_a_survey_is_the_same_every_time(tmp_path: Path):
    for number in range(40):
        write_runs(tmp_path, {f"sub-{number:02d}_bold": bold(seed=number, shape=(3, 4, 2, 5))})
        (tmp_path / f"sub-{number:02d}_task-x_bold.nii.gz").write_bytes(b"no" * number)
    listing = find_runs(str(tmp_path))
    counted: list[int] = []
    first = survey(listing, ConvertOptions(), counted.append)
    assert [run.source.key for run in first.runs] == sorted(run.source.key for run in first.runs)
    assert (len(first.runs), len(first.quarantined), sum(counted)) == (40, 40, 80)
    for _ in range(3):
        again = survey(listing, ConvertOptions())
        assert (again.runs, again.quarantined, again.warnings) == (first.runs, first.quarantined, first.warnings)


def test_grids_are_grouped_as_a_comparison_of_all_pairs_would():
    draw = random.Random(0)
    affine = (*(value for row in AFFINE for value in row), 0.0, 0.0, 0.0, 1.0)
    items = []
    for number in range(400):
        moved = list(affine)
        for place in (3, 7, 11):
            moved[place] += draw.choice([0.0, 0.0, 1e-3, -1e-3, 9e-4, 2e-3, 0.5]) * draw.choice([1, 1, 1, 40])
        if draw.random() < 0.2:
            moved[0] += draw.choice([1e-6, 1e-4])
        items.append((Grid(shape=draw.choice([(7, 6, 5), (8, 6, 5)]), affine=tuple(moved)), number))
    expected: list[tuple[Grid, list[int]]] = []
    for grid, number in items:
        home = next((members for first, members in expected if same_grid(first, grid)), None)
        if home is None:
            expected.append((grid, [number]))
        else:
            home.append(number)
    assert 10 < len(expected) < 390
    assert group_grids(items) == expected
