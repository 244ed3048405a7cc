"""What the models cost is measured in processes of their own, counted right and held against the goals."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools.bench_models import GOALS, ROWS, _way_figures, as_text, forward_flops, main, run_worker
from train.models.swift import Swift
from train.models.swift_config import SwiftConfig

TASK = {"threads": 1, "batch": 1, "device": "cpu", "quick": True}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("frames", [1, 2])
def test_flops_are_those_that_torch_counts(frames):
    # Windows of 16 tokens, whose attention is two plain products that the counter knows.
    config = SwiftConfig(
        img_size=(16, 16, 16, 6),
        patch_size=(2, 2, 2, 1),
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=(2, 2, 2, frames),
        first_window_size=(2, 2, 2, 2),
        last_layer_full_MSA=False,
    )
    model = Swift(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 1, *config.img_size))
    assert forward_flops(model) == counter.get_total_flops()


def test_both_ways_take_turns_and_speed_is_told_by_medians_and_by_round():
    rounds = run_worker({**TASK, "kind": "time", "ways": ["plain", "ours"], "rounds": 2})
    assert {way: len(rows) for way, rows in rounds["rounds"].items()} == {"plain": 2, "ours": 2}
    assert rounds["frames"] == 8
    found = _way_figures([(1, 1), (1, 3), (2, 4)], [(2, 2), (4, 4), (6, 12)], frames=20, flops=8.0)
    assert found["step_s"] == 4
    assert found["speed"] == 8 / 4
    assert found["speed_of_rounds"] == [2, 3]
    assert found["frames_a_second"] == 5
    assert found["flops_a_second"] == 2


@pytest.mark.full
def test_a_row_of_the_table_is_measured_in_a_process_of_its_own(capsys):
    assert main(["table", "--models", "brainlm/5m", "--quick", "--rounds", "2", "--threads", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["table"]["rows"]["brainlm/5m"]
    assert row["parameters"] == 4_850_348
    assert len(row["seconds"]) == 2
    assert row["peak_bytes"] > 2 * 4 * row["parameters"], "weights and gradients at least"


def test_the_text_says_which_goals_were_met():
    way = {"forward_s": 1, "backward_s": 1, "step_s": 2, "frames_a_second": 10, "speed_of_rounds": [1, 3]}
    figures = {
        "machine": dict.fromkeys(
            ("device", "cpu", "cores", "instructions", "torch", "precision", "batch", "load"), "cpu"
        )
        | {"size": "published"},
        "swift": {
            "threads": {"1": {"plain": way | {"speed": 1}, "ours": way | {"speed": GOALS["cpu"]["ours"]}}},
            "peak_bytes": {"plain": 2**21, "ours": 2**20},
            "memory_share": {"plain": 1.0, "ours": 0.5},
        },
        "table": {"threads": 2, "rows": {}, "without_row": ["mlp"]},
    }
    text = as_text(figures)
    assert "goal >= 2.1: met" in text
    assert "goal <= 0.45: MISSED" in text
    assert "without a row here: mlp" in text
    assert "goal" not in as_text(figures | {"machine": figures["machine"] | {"size": "quick"}})


def test_every_row_names_a_model():
    assert {name.partition("/")[0] for name in ROWS} >= {"swift", "tff1", "tff2", "tff3", "brainlm", "brainlm-vitmae"}
