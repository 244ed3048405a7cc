"""The part of a report's page about where its numbers are from: training, leaks, data, code, recipe, and how to read it."""

from collections.abc import Mapping
from typing import Any

from train import html_figures
from train.html_facts import RunFacts
from train.html_tags import NOTHING, Html, facts, folded, joined, picture, table, tag, text

_PARTS = {"train": "training", "val": "validation", "test": "test"}


def training_section(run: RunFacts) -> Html:
    """Curves, how long it took, and every time it began again."""
    history = run.history
    shown = [tag("h2", text("Training"))]
    if history is None:
        shown.append(tag("p", text("The log of this run is missing or damaged; there are no curves.")))
    else:
        last = history.steps[-1]
        seconds = sum(float(step.get("seconds") or 0.0) for step in history.steps)
        waited = sum(float(step.get("wait_s") or 0.0) for step in history.steps)
        loss = last.get("loss")
        says = f"Training loss over {len(history.steps):,} steps, {'unknown' if loss is None else f'{loss:.4g}'} at the last"
        shown.append(
            picture(html_figures.curves(history), says=says, caption=text("Steps that a restart undid are left out."))
        )
        rows = [("steps", text(f"{last['step']:,}")), ("time in these steps", text(duration(seconds)))]
        if seconds > 0 and waited > 0:
            rows.append(("of it waiting for data", text(f"{100 * waited / seconds:.1f} %")))
        shown.append(facts(rows))
    return tag("section", *shown, _starts(run), _events(run))


def leaks_section(run: RunFacts) -> Html:
    """What was compared before the first step, and found."""
    heading = tag("h2", text("Leak audit"))
    audit = run.audit
    if audit is None or audit.get("audit") == "off":
        return tag(
            "section", heading, tag("p", text("It was not asked whether the splits share runs, subjects or families."))
        )
    header = [
        text(name) for name in ("between", "runs", "same run", "same subject", "same family", "alike", "no fingerprint")
    ]
    rows = [
        [
            text(f"{_PARTS.get(pair['one'], pair['one'])} and {_PARTS.get(pair['other'], pair['other'])}"),
            text(f"{pair['one_runs']:,} and {pair['other_runs']:,}"),
            *(text(pair[name]) for name in ("same_run", "same_subject", "same_family")),
            text(pair["alike"] + pair["same_label"] if pair["fingerprints"] else "not compared"),
            text(pair["without_fingerprint"]),
        ]
        for pair in audit["pairs"]
    ]
    named = [
        [
            text(f"{pair['one']} and {pair['other']}"),
            text(row["kind"]),
            _code(row["one"]),
            _code(row["other"]),
            _time(row["time"]),
        ]
        for pair in audit["pairs"]
        for row in pair["named"]
    ]
    told = "Before the first step, every two splits were compared by values, labels, families and fingerprints of the runs."
    pairs = (
        table([text(name) for name in ("between", "what", "run", "run", "correlation")], named) if named else NOTHING
    )
    found = table(header, rows) if rows else tag("p", text("There is one split only, and nothing to compare it with."))
    start = audit.get("start")
    of_start = NOTHING if start is None else tag("p", text(f"Of start.from: {start['says']}."))
    return tag("section", heading, tag("p", text(told)), found, pairs, of_start)


def data_section(run: RunFacts) -> Html:
    """Which dataset, which version of it, and how much."""
    data = run.provenance.get("data")
    heading = tag("h2", text("Data"))
    if not data:
        return tag("section", heading, tag("p", text("The folder does not tell what data the run saw.")))
    header = [text(name) for name in ("split", "subjects", "families", "runs", "windows", "left out")]
    rows = [
        [
            text(_PARTS.get(name, name)),
            *(text(f"{part[key]:,}") for key in ("subjects", "families", "runs", "windows")),
            text("; ".join(f"{count} {what}" for what, count in part["left_out"].items()) or "nothing"),
        ]
        for name, part in data["parts"].items()
    ]
    digests = [
        ("dataset", _code(data["url"])),
        ("content digest", _code(data["content_digest"])),
        ("generation digest", _code(data["generation_digest"])),
    ]
    return tag("section", heading, facts(digests), table(header, rows))


def code_section(run: RunFacts) -> Html:
    """What computed it: versions and machine of the last start, which finished the run."""
    starts = run.provenance.get("starts")
    if not starts:
        return NOTHING
    last = starts[-1]
    commit = last["commit"] and f"{last['commit']}{' and uncommitted changes' if last['changed_since_commit'] else ''}"
    rows = [
        ("fmristream", text(last["fmristream"])),
        ("commit", _code(commit) if commit else NOTHING),
        ("torch, Python", text(f"{last['torch']}, {last['python']}")),
        ("processes", text(last["world_size"])),
        ("device", text(last["device_name"])),
        ("machine", text(f"{last['platform']}, {last['cpu_count']} cores, {last['threads']} threads a process")),
    ]
    return tag("section", tag("h2", text("Code and machine")), facts(rows))


def recipe_section(run: RunFacts) -> Html:
    """Every value that decided the run."""
    if not run.recipe_text:
        return NOTHING
    content = tag("pre", tag("code", text(run.recipe_text)))
    return tag("section", tag("h2", text("Recipe")), folded("the whole recipe, every default spelled out", content))


def reading_section(run: RunFacts) -> Html:
    """How far to believe a page like this."""
    said = [
        "Every window of a split was scored once; scores are averaged per run, then per subject, so that long runs do not "
        "outweigh short ones. The threshold was chosen on validation subjects alone.",
        "An interval resamples test subjects and takes the trained net as it is: it says nothing about another seed, another "
        "split or another cohort.",
        "Read the difference to functional connectivity before the number itself. “Not told apart” is no proof that two models "
        "are equal; the interval says how much either may be ahead. A net that does no better than the nuisance reader may read "
        "motion or site.",
        "Many runs on one test split make some of them look good by chance; count them.",
        "This page names no participant, but a dot of a scatter is a person: share it as you would share such a figure.",
    ]
    if not run.target_names:
        said = ["The loss is a mean over every window of a split, once; it has no baseline.", said[3]]
    return tag("section", tag("h2", text("How to read this")), tag("ul", *(tag("li", text(one)) for one in said)))


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _starts(run: RunFacts) -> Html:
    starts = run.provenance.get("starts", ())
    if not starts:
        return NOTHING
    rows = [
        [
            text(start["at"]),
            text(start["resumed_from"] or "from the beginning"),
            text(start["world_size"]),
            text(start["device_name"]),
            text((start["commit"] or "–")[:12]),
        ]
        for start in starts
    ]
    header = [text(name) for name in ("start (UTC)", "went on from", "processes", "device", "commit")]
    told = (
        "Once, without a restart." if len(starts) == 1 else f"{len(starts)} starts, {len(starts) - 1} of them restarts."
    )
    content = table(header, rows)
    return joined([tag("p", text(told)), content if len(starts) <= 10 else folded("all starts", content)])


def _events(run: RunFacts) -> Html:
    """What else the log tells: damaged checkpoints, changed recipes, other weights to begin with."""
    rows = [[text(one["event"]), text(_words(one))] for one in run.events if one["event"] != "start"]
    return table([text("event"), text("what")], rows) if rows else NOTHING


def _words(event: Mapping[str, Any]) -> str:
    from fmristream.storage.urls import redacted

    return redacted(
        ", ".join(f"{key}: {value}" for key, value in event.items() if key != "event" and value is not None)
    )


def _time(correlation: float | None) -> Html:
    return text("–" if correlation is None else f"{correlation:.2f}")


def _code(value: Any) -> Html:
    return tag("code", text(value))
