"""The page of a run holds the report's numbers, is well-formed, fetches nothing, and names neither subjects nor secrets."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

import fmristream
from tests.train.small import write_small
from train.evaluate import Subjects
from train.files import read_json, write_json
from train.html_facts import without_names
from train.html_figures import forest, roc_points, scatter, true_rates, wilson
from train.html_numbers import confusion_counts
from train.html_report import main, write_html
from train.html_tags import number, table, tag, text
from train.main import main as train_main

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Every element closed in order; numbers, pictures and addresses collected."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.open, self.values, self.images, self.addresses, self.words, self.names = [], [], [], [], [], []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        self.names.append(name)
        assert len(found) == len(attributes)
        if name not in VOID:
            self.open.append(name)
        if name == "data":
            self.values.append(float(found["value"]))
        if name == "img":
            assert found["alt"]
            self.images.append(base64.b64decode(found["src"].removeprefix("data:image/svg+xml;base64,")).decode())
        self.addresses += [value for key, value in found.items() if key in ("src", "href", "action", "data")]
        assert not any(key.startswith("on") for key in found)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("html")
    write_small(
        folder,
        cohort,
        data={"where": "age > 1"},
        train={"checkpoint_every": 3, "eval_every": 3},
        eval={"bootstrap_draws": 200},
    )
    assert train_main([str(folder / "small.toml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_every_number_of_the_report_stands_on_the_page(finished):
    report = read_json(finished / "report.json")
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    values = set(page.values)
    for part in ("val", "test"):
        assert {value for value in report[part]["metrics"].values() if value is not None} <= values
        assert {bound for pair in report[part]["intervals"].values() for bound in pair} <= values
    rows = [row for one in report["beside"]["targets"]["sex"]["baselines"] for row in one["differences"]]
    assert len(rows) == 4
    for row in rows:
        assert {row["network"], row["baseline"], row["difference"], *row["interval"]} <= values
    for sentence in report["beside"]["targets"]["sex"]["verdict"]:
        assert sentence in page.text
    assert report["threshold"] in values


def test_the_page_tells_where_the_numbers_are_from(finished, cohort):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    clips = fmristream.StreamingDataset(cohort, window=8, split="train")
    for known in (
        clips.content_digest,
        clips.generation_digest,
        fmristream.__version__,
        "AUROC",
        "By site",
        "Leak audit",
    ):
        assert (known in page.text) == (known != "By site")  # this cohort has one site
    assert "validation and test" in page.text
    assert len(page.images) == 5  # ROC, confusion, two forests, curves


def test_the_page_fetches_nothing_runs_nothing_and_its_pictures_are_sound(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.names
    assert all(address.startswith("data:image/svg+xml") for address in page.addresses)
    for svg in page.images:
        for element in ElementTree.fromstring(svg).iter():
            assert not element.tag.endswith("script")
            assert not any(key.endswith("href") and value.startswith("http") for key, value in element.items())


def test_the_page_names_no_subject(finished):
    people = {row["subject"] for row in read_json(finished / "baselines.json")["people"]}
    assert len(people) == 20
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    everything = page.text + "".join(" ".join(ElementTree.fromstring(svg).itertext()) for svg in page.images)
    assert not [name for name in people if re.search(rf"(?<![\w.]){name}(?![\w.])", everything)]


def test_hostile_names_and_secrets_stay_text_or_away(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    hostile = '<script>alert("$x_$")</script>'
    report = read_json(out / "report.json")
    report["target"] = hostile
    report["beside"]["targets"] = {hostile: report["beside"]["targets"]["sex"]}
    report["beside"]["targets"][hostile]["sites"] = [
        {"site": "<img src=http://x.y/z>", "subjects": 12, "numbers": {"net": {"auroc": 0.5}}},
        {"site": None, "sites": 2, "subjects": 5, "numbers": {}},
    ]
    write_json(out / "report.json", report)
    recipe = (out / "recipe.toml").read_text()
    recipe = re.sub(r"(?m)^url = .*$", 'url = "https://me:hunter2@host/data?sig=TOPSECRET"', recipe)
    recipe = re.sub(r"(?m)^where = .*$", "where = \"subject != '0007' and age > 3\"", recipe)
    (out / "recipe.toml").write_text(recipe)
    markup = write_html(out).read_text(encoding="utf-8")
    page = Page(markup)
    assert "script" not in page.names
    assert page.names.count("img") == len(page.images)
    assert hostile in page.text
    assert "<img src=http://x.y/z>" in page.text
    assert "2 sites of fewer test subjects, 5 together" in page.text
    assert not re.search("hunter2|TOPSECRET|0007", markup)
    assert "age > 3" in page.text


def test_it_is_made_from_the_folder_alone_and_again_alike(finished, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("checkpoints", "report.html", "curves.png"))
    assert main([str(out)]) == 0
    assert (out / "report.html").read_bytes() == (finished / "report.html").read_bytes()
    for name in ("log.jsonl", "provenance.json", "leaks.json", "recipe.toml"):
        (out / name).unlink()
    assert main([str(out)]) == 0
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "missing or damaged" in page.text
    (out / "report.json").unlink()
    assert main([str(out)]) == 2
    assert "finished run" in capsys.readouterr().err


def test_a_run_without_a_target_has_its_loss_and_no_baseline(tmp_path):
    write_json(
        tmp_path / "report.json",
        {
            "step": 4,
            "target": None,
            "objective": "masked",
            "val": {"num_windows": 9, "metrics": {"loss": 0.25}, "intervals": {}},
        },
    )
    steps = [
        {"event": "step", "step": n, "loss": 1.0 / n, "lr": 1e-3, "seconds": 0.5, "wait_s": 0.1} for n in range(1, 4000)
    ]
    looks = [{"event": "eval", "step": 2, "loss": 0.3}]
    log = [{"event": "start", "step": 0}, *steps, *looks, {"event": "damaged", "checkpoint": "step-2", "reason": "<b>"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"event": "st')
    page = Page(write_html(tmp_path).read_text(encoding="utf-8"))
    assert 0.25 in page.values
    assert "loss 0.25 on 9 validation windows" in page.text
    assert "Beside the net" not in page.text
    assert len(page.images) == 1
    assert len(page.images[0]) < 200_000  # of thousands of steps, stretches are drawn
    assert "checkpoint: step-2, reason: <b>" in page.text


def test_several_targets_and_leaks_are_told_on_top(tmp_path):
    rng = np.random.default_rng(0)
    people = [{"subject": f"s{n}", "truth": float(n), "score": float(n + rng.normal())} for n in range(30)]
    age = {
        "objective": "regression",
        "test": {"metrics": {"mae": 0.7, "r": None}, "intervals": {"mae": [0.5, 0.9]}, "subjects": people},
    }
    words = [{"subject": f"s{n}", "truth": n % 3, "score": rng.normal(size=3).tolist()} for n in range(30)]
    hand = {
        "objective": "classification",
        "classes": ["both", "left", "right"],
        "test": {"metrics": {"balanced_accuracy": 0.4}, "intervals": {}, "subjects": words},
    }
    write_json(tmp_path / "report.json", {"step": 4, "targets": {"age": age, "hand": hand}})
    pair = dict.fromkeys(("same_run", "same_subject", "alike", "same_label", "without_fingerprint"), 0)
    pair |= {
        "one": "train",
        "other": "test",
        "one_runs": 4,
        "other_runs": 4,
        "same_family": 1,
        "fingerprints": True,
        "named": [],
    }
    write_json(tmp_path / "leaks.json", {"audit": "warn", "pairs": [pair]})
    page = Page(write_html(tmp_path).read_text(encoding="utf-8"))
    assert "The splits of this run leak" in page.text
    assert {0.7, 0.5, 0.9, 0.4} <= set(page.values)
    assert "age: mean absolute error 0.700 [0.500, 0.900] on 30 test subjects." in page.text
    assert len(page.images) == 2
    assert not re.search(r"\bs\d+\b", page.text)


def test_curves_and_intervals_agree_with_oracles():
    rng = np.random.default_rng(3)
    truth = (np.arange(50) % 2).astype(float)
    score = np.round(truth + rng.normal(size=50), 1)  # with ties
    false, true = roc_points(truth, score)
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    theirs = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(false, theirs[0])
    np.testing.assert_allclose(true, theirs[1])
    assert true_rates(truth, score)[-1] == 1
    share, low, high = wilson(8, 10)  # Newcombe 1998, method 3
    assert (share, round(low, 4), round(high, 4)) == (0.8, 0.4902, 0.9433)
    subjects = Subjects(label=tuple(map(str, range(50))), truth=truth, score=score)
    counts, _ = confusion_counts(subjects, threshold=0.5, names=())
    assert counts.sum() == 50
    assert counts[1, 1] == int(((score > 0.5) & (truth == 1)).sum())


def test_pictures_take_any_name():
    hostile = "<script> $\\frac{1} & \u00e9"
    subjects = Subjects(label=("a", "b", "c"), truth=np.arange(3.0), score=np.array([0.0, 2.0, 1.0]))
    for svg in (scatter(subjects, unit=hostile), forest([(hostile, 0.1, (-0.1, 0.3))], unit=hostile)):
        assert hostile in " ".join(ElementTree.fromstring(svg).itertext())


def test_text_is_escaped_and_numbers_keep_their_value():
    assert text("<a href='x'>&") == "&lt;a href=&#x27;x&#x27;&gt;&amp;"
    assert number(1 / 3) == '<data value="0.3333333333333333">0.333</data>'
    assert (number(None), number(float("nan"))) == ("–", "–")
    assert tag("p", text("x"), class_='"') == '<p class="&quot;">x</p>'
    Page(table([text("a"), text("b")], [[text("<"), number(2.0)]], caption=text("&")))


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("where = \"age > 60 and task == 'rest'\"", True),
        ("where = \"subject not in ['s01', 's02']\"", False),
        ("where = \"participant_id == 's01'\"", False),
        ('where = "subject == \\"s01\\" and age > 2"', False),
    ],
)
def test_a_condition_that_may_name_people_is_shown_without_its_words(where, kept):
    shown = without_names(f"[data]\n{where}\nwindow = 3\n")
    assert ("rest" in shown) == kept
    assert "s01" not in shown
    assert "window = 3" in shown
