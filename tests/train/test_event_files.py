"""TensorBoard's own reader finds in an event file what was put there, and what a resume undid is gone."""

import math
import struct
from pathlib import Path

import pytest

from train.event_files import EventFile

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value, event.wall_time) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_scalars_are_read_back_by_name_step_and_time(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    steps = (1, 127, 128, 16_384, 2**40)  # lengths of the variable-length numbers
    for number, step in enumerate(steps):
        file.add(step, {"train/loss": math.pi / (number + 1), "val/größe": -1.5e-30}, wall_time_s=1.75e9 + number)
    file.close()
    found = read(tmp_path)
    assert found["train/loss"] == [
        (step, float32(math.pi / (number + 1)), 1.75e9 + number) for number, step in enumerate(steps)
    ]
    assert [value for _, value, _ in found["val/größe"]] == [float32(-1.5e-30)] * 5


def test_steps_that_a_resume_undid_are_forgotten_attempt_after_attempt(tmp_path):
    for attempt, (first, last) in enumerate([(1, 7), (6, 9), (8, 11)]):
        file = EventFile(tmp_path, first_step=first)
        for step in range(first, last + 1):
            file.add(step, {"loss": 100 * attempt + step})
        file.close()
    assert [(step, value) for step, value, _ in read(tmp_path)["loss"]] == [
        *((step, step) for step in range(1, 6)),
        *((step, 100 + step) for step in range(6, 8)),
        *((step, 200 + step) for step in range(8, 12)),
    ]


def test_a_number_too_large_for_float32_is_left_out_and_not_the_end(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    file.add(1, {"norm": 1e39, "loss": 2.0})
    file.add(2, {"norm": 3.4028234e38})
    file.close()
    found = read(tmp_path)
    assert [step for step, _, _ in found["norm"]] == [2]
    assert [value for _, value, _ in found["loss"]] == [2.0]


def test_a_record_that_was_cut_hides_only_itself(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    for step in (1, 2):
        file.add(step, {"loss": 1.0})
    file.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert [step for step, _, _ in read(tmp_path)["loss"]] == [1]
