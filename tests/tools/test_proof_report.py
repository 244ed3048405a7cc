"""The page says what was found, how sure it is, and what is missing."""

import dataclasses

import numpy as np
import pytest

from fmristream.errors import UsageError
from tools.proof_cells import EFFECTS, Settings, cells
from tools.proof_cohorts import Scores
from tools.proof_report import BEGIN, END, difference, entry, write_report
from tools.proof_results import append, auroc_draws, line_of

SETTINGS = Settings()


def line(cell, *, skill, seed=0, subjects=40):
    rng = np.random.default_rng([seed, cell.seed])
    truth = np.arange(subjects) % 2.0
    scores = Scores(
        subject=tuple(f"{number:04d}" for number in range(subjects)),
        truth=truth,
        score=rng.normal(skill * truth),
        shuffled=rng.normal(size=subjects),
    )
    facts = {"num_train": 60, "seconds": 100.0, "core_s": 90.0, "parameters": 88_921, "last_loss": 0.1234}
    return line_of(cell, SETTINGS, scores, facts)


@pytest.fixture
def some(tmp_path):
    """FC everywhere, SwiFT's own input on two effects with two seeds, nothing else."""
    wanted = cells(["fc", "swift", "mlp"], list(EFFECTS), [0, 1])
    for cell in wanted:
        if cell.model == "fc" or (cell.input == "voxel" and cell.effect in ("coupling", "order")):
            append(
                tmp_path / "results.jsonl", line(cell, skill=0 if cell.effect == "order" else 2, seed=len(cell.model))
            )
    (tmp_path / "refused.json").write_text('{"mlp": "there is no model \'mlp\'"}')
    return tmp_path, wanted


def section(text, heading):
    """The table's rows under a heading, as lists of cells."""
    body = text.split(f"### {heading}\n")[1].split("\n### ")[0]
    return [[part.strip() for part in row.strip("|").split("|")] for row in body.splitlines() if row.startswith("|")]


def test_the_page_has_what_is_there_and_says_what_is_not(some):
    out, wanted = some
    page = out / "proof.md"
    page.write_text(f"# Ours\n\nwords before\n{BEGIN}\nold\n{END}\nwords after\n")
    write_report(page, out=out, wanted=wanted, settings=SETTINGS)
    text = page.read_text()
    assert text.startswith("# Ours\n\nwords before\n")
    assert text.endswith(f"{END}\nwords after\n")
    assert "old" not in text
    assert "12 of 56 cells are finished. **Missing: 44**" in text
    assert "- SwiFT: 36 of 40 cells not run" in text
    assert "- MLP on a window's parcels: 8 of 8 cells not run: not in this copy, there is no model 'mlp'" in text
    head, _, fc, swift, mlp = section(text, "Models × effects")
    assert head[1:] == list(EFFECTS)
    assert mlp[1:] == ["not run"] * 4
    assert [shown == "not run" for shown in swift[1:]] == [effect not in ("coupling", "order") for effect in EFFECTS]
    assert fc[1].count("(") == 1
    assert len(fc[1].split("(")[1].split()) == 2  # each of two seeds
    assert "88,921" in text
    assert (out / "proof.png").read_bytes().startswith(b"\x89PNG")
    write_report(page, out=out, wanted=wanted, settings=SETTINGS)
    assert page.read_text() == text


def test_cells_of_another_recipe_are_not_in_the_tables(some):
    out, wanted = some
    longer = dataclasses.replace(SETTINGS, steps=SETTINGS.steps + 1)
    write_report(out / "new.md", out=out, wanted=wanted, settings=longer)
    text = (out / "new.md").read_text()
    assert "8 of 56 cells are finished" in text  # the readers, which take no steps
    assert section(text, "Models × effects")[3][1:] == ["not run"] * 4


def test_a_page_without_marks_is_left_alone(some):
    out, wanted = some
    (out / "other.md").write_text("# Not ours\n")
    with pytest.raises(UsageError, match="expected a page with the lines"):
        write_report(out / "other.md", out=out, wanted=wanted, settings=SETTINGS)
    assert (out / "other.md").read_text() == "# Not ours\n"


def test_nothing_finished_is_a_page_that_says_so(tmp_path):
    wanted = cells(["fc"], ["order"], [0])
    write_report(tmp_path / "new.md", out=tmp_path, wanted=wanted, settings=SETTINGS)
    assert "0 of 1 cells are finished. **Missing: 1**" in (tmp_path / "new.md").read_text()


def test_an_entry_is_the_mean_over_seeds_with_an_interval_of_that_mean():
    found = cells(["fc"], ["coupling"], [0, 1, 2])
    lines = [line(cell, skill=1) for cell in found]
    one = entry(lines)
    assert one.mean == pytest.approx(np.mean([each["auroc"] for each in lines]))
    assert list(one.seeds) == [0, 1, 2]
    assert one.low < one.mean < one.high
    # Three cohorts say more than one.
    alone = entry(lines[:1])
    assert one.high - one.low < alone.high - alone.low
    expected = np.quantile(np.mean([auroc_draws(each["truth"], each["score"]) for each in lines], axis=0), 0.025)
    assert one.low == pytest.approx(expected)
    assert entry([]) is None


def test_a_cell_that_was_done_twice_counts_once_with_its_last_line():
    (cell,) = cells(["fc"], ["coupling"], [0])
    lines = [line(cell, skill=0, seed=1), line(cell, skill=3, seed=2)]
    assert entry(lines).mean == lines[1]["auroc"]


def test_differences_are_paired_by_subject_and_seed():
    (mine, other), (theirs, _) = (cells([model], ["coupling"], [0, 1]) for model in ("sd", "fc"))
    better, worse = line(mine, skill=4, seed=1), line(theirs, skill=0, seed=2)
    assert difference([better], [better]) == (0, 0, 0)
    gain, low, high = difference([better], [worse])
    assert gain == pytest.approx(better["auroc"] - worse["auroc"])
    assert 0 < low < gain < high
    # Subjects in another order are the same subjects; a seed that the other lacks does not count.
    turned = {**worse, **{name: worse[name][::-1] for name in ("subject", "truth", "score", "shuffled")}}
    assert difference([better, line(other, skill=0)], [turned]) == pytest.approx((gain, low, high))
    assert difference([line(other, skill=0)], [worse]) is None
