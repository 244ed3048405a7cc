"""What a trained network is, for those who were not there: OUT/MODEL_CARD.md, from what is in OUT, with no subject named."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmristream._version import __version__
from fmristream.storage.urls import display_url
from train.beyond.facts import parcel_places
from train.beyond.trained import Trained, load_trained
from train.files import read_json, write_whole

CARD = "MODEL_CARD.md"


def write_card(out: Path) -> Path:
    """Write the card of a finished run into its folder: the old one or the new one is there.

    Raises:
        FmriStreamError: the run has no whole checkpoint.
    """
    write_whole(out / CARD, card(load_trained(str(out)), read_json(out / "report.json")))
    return out / CARD


def card(trained: Trained, report: Mapping[str, Any] | None) -> str:
    """The text.

    Args:
        trained: the network.
        report: report.json of its run, where there is one.
    """
    sections = [_what(trained), _data(trained), _targets(trained), _numbers(report or {}), _beside(report or {})]
    return "\n\n".join("\n".join(lines) for lines in [*sections, _use(trained), _loading(trained)]) + "\n"


def _what(trained: Trained) -> list[str]:
    recipe = trained.recipe
    weights = trained.weights or {}
    values = sum(tensor.numel() for tensor in weights.values())
    steps = int(trained.name.removeprefix("step-")) if trained.name.startswith("step-") else recipe.train.steps
    options = ", ".join(f"{name} = {json.dumps(value)}" for name, value in recipe.model.options.items())
    return [
        f"# {recipe.model.name}: {', '.join(trained.targets) or recipe.objective.kind}",
        "",
        "| | |",
        "| --- | --- |",
        f"| checkpoint | {trained.name}, weights {trained.weights_are} |",
        f"| numbers in it | {values:,} in {len(weights)} tensors |",
        f"| options | {options or 'the defaults'} |",
        f"| objective | {recipe.objective.kind} |",
        f"| begun with | {'other weights (start.from)' if recipe.start.from_ else 'nothing'} |",
        f"| steps x batch | {steps:,} x {recipe.train.batch_size} |",
        f"| made with | fmristream {__version__} |",
    ]


def _data(trained: Trained) -> list[str]:
    data, facts = trained.recipe.data, trained.facts
    lines = [
        "## Training data",
        "",
        f"- URL: {display_url(data.url) or 'not known'}, {'some runs of ' if data.where else ''}split {data.train_split!r}",
        f"- content: {trained.content_digest or 'not known'}",
        f"- windows: {data.window or 'whole runs'} frames, step {data.step}, normalised by `{data.normalize}`",
    ]
    if facts is not None:
        sizes = facts["voxel_sizes_mm"]
        lines += [
            f"- grid {_by(facts['grid'])} voxels of {_by(sizes)} mm, axes to {facts['orientation'] or 'nobody knows where'}"
            if facts["grid"]
            else f"- {len(parcel_places(facts))} parcels, components or grayordinates",
            f"- TR {', '.join(f'{tr:g}' for tr in facts['tr_s']) or 'not known'} s, space {', '.join(facts['spaces'])}",
        ]
    return [*lines, "- licence and data use agreement: a converted dataset carries none; those of its source apply"]


def _targets(trained: Trained) -> list[str]:
    lines = ["## What it gives", ""]
    for objective in trained.objectives:
        names = trained.class_names(objective)
        if not names:
            told = f"a number, in the column's unit (training mean {objective.offset:.4g}, SD {objective.scale:.4g})"
        elif objective.classes:
            told = f"logits of {', '.join(names)}"
        else:
            told = f"one logit: above 0 {names[1]}, below {names[0]}"
        lines.append(f"- {objective.target}: {told}")
    return [*lines, *([] if trained.objectives else ["- features of windows (`--task embed`); it has no target"])]


def _numbers(report: Mapping[str, Any]) -> list[str]:
    lines = ["## Numbers", ""]
    tables = list(_tables(report))
    if not tables:
        return [*lines, "No validation or test split was scored."]
    lines += ["| split | target | n | metric | value | 95 % |", "| --- | --- | --- | --- | --- | --- |"]
    for split, target, part in tables:
        count = part.get("num_subjects", part.get("num_windows"))
        for name, value in part["metrics"].items():
            bounds = part.get("intervals", {}).get(name)
            interval = "" if not bounds or None in bounds else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
            shown = "" if value is None else f"{value:.3f}"
            lines.append(f"| {split} | {target} | {count} | {name} | {shown} | {interval} |")
    for target, part in _targets_of(report).items():
        if isinstance(part.get("threshold"), float | int):
            lines += ["", f"{target}: threshold {part['threshold']:.4g}, chosen on {part['threshold_chosen_on']}."]
    return lines


def _tables(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(split, target, numbers) of everything that was scored."""
    for target, part in _targets_of(report).items():
        for split in ("val", "test"):
            if "metrics" in part.get(split, {}):
                yield split, target, part[split]
    for entry in report.get("transfer", ()):
        for target, part in entry.get("targets", {}).items():
            if "metrics" in part:
                yield f"elsewhere: {entry['url']}", target, part


def _targets_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return {str(report.get("target") or report.get("objective")): report, **report.get("targets", {})}


def _beside(report: Mapping[str, Any]) -> list[str]:
    """The verdict and every paired difference, as report.json has them."""
    lines, beside = ["## Beside baselines", ""], report.get("beside") or {}
    for target, one in beside.get("targets", {}).items():
        lines += [f"- {said}" for said in one["verdict"]]
        rows = [(baseline["name"], row) for baseline in one["baselines"] for row in baseline["differences"]]
        lines += (
            ["", "| target | baseline | metric | net - baseline | 95 % |", "| --- | --- | --- | --- | --- |"]
            if rows
            else []
        )
        for name, row in rows:
            difference = "" if row["difference"] is None else f"{row['difference']:+.3f}"
            interval = "" if None in row["interval"] else "{:+.3f} to {:+.3f}".format(*row["interval"])
            lines.append(f"| {target} | {name} | {row['metric']} | {difference} | {interval} |")
        lines.append("")
    if beside.get("targets"):
        return lines[:-1]
    why = f" ({beside['status']}: {beside['why']})" if "why" in beside else ""
    return [
        *lines,
        f"No baseline was computed{why}: nothing says that the network knows more than connectivity or motion does.",
    ]


def _use(trained: Trained) -> list[str]:
    return [
        "## Intended use and limits",
        "",
        "- For research on groups. It is no medical device, and no number of it is a diagnosis of anybody.",
        "- It knows scanners, sites, ages and preprocessing of its training data only; `--task predict` says how other data "
        "differ, and refuses another grid, voxel size or orientation.",
        "- What else its features know (site, scanner, motion) is told by `--task probe`.",
        "- Weights may hold traces of the participants: share them as the data's terms allow.",
    ]


def _loading(trained: Trained) -> list[str]:
    return [
        "## How to load it",
        "",
        "```bash",
        "python -m train --task predict THIS_FOLDER URL    # or embed, probe, anomaly",
        "```",
        "",
        "```python",
        "from train.beyond.api import load",
        "",
        "network = load('THIS_FOLDER')",
        "vectors = network.embed(bold, affine=affine, tr_s=tr_s)  # one run (x, y, z, t), normalised as in training",
        "```",
    ]


def _by(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values) if values else "unknown"
