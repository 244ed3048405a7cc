"""Maps of what a trained network's scores rest on, as NIfTI in the space of the runs, and one picture.

    python -m train.attribution runs/age                          test subjects of its own data, integrated gradients
    python -m train.attribution runs/age URL --method occlusion --block 6 --runs 20

It reads a run of the trainer: its recipe.toml and the weights that its report scored (train/scored.py).
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmristream.errors import FmriStreamError, UsageError
from fmristream.report.export import file_names
from fmristream.report.pictures import require_matplotlib
from train.attribution_maps import write_map, write_picture
from train.attribution_methods import BASELINES
from train.attribution_runs import Method, RunMap, SubjectMean, attribute_runs, cube_regions, parcel_regions
from train.config import Recipe, load_recipe
from train.data import Part, fitted_of, open_part, signal_of
from train.files import write_json
from train.scored import find_weights
from train.targets import saved_outputs

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset

DEFAULT_BLOCK = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A network as a run of the trainer left it, and the data that it is to be asked about."""

    recipe: Recipe
    step: int
    weights: str  # which, in words
    network: nn.Module
    part: Part


def open_trained(folder: Path, *, url: str, split: str, device: torch.device, stack: ExitStack) -> TrainedRun:
    """The network of a run as it was scored, and one split of a dataset as it scores it.

    Args:
        folder: of the run (`--out` of the trainer).
        url: of another dataset; "" for the run's own.
        split: name of the split; "" for all runs.
        device: where the network goes.
        stack: closes the data.

    Raises:
        UsageError: there is no recipe, or no whole checkpoint.
    """
    from train.build import make_model
    from train.launch import World

    if not (folder / "recipe.toml").is_file():
        raise UsageError(f"{folder}: holds no recipe.toml; give the --out folder of a training run")
    recipe = load_recipe(str(folder / "recipe.toml"))
    found = find_weights(folder)
    if found is None:
        raise UsageError(f"{folder}: has no whole checkpoint; train longer, or give another folder")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, url=url or recipe.data.url))
    every: Any = None
    world = World(device=device)
    fitted = fitted_of(recipe, out=folder, world=world)
    part = open_part(recipe, split=split or every, seed=None, world=world, stack=stack, fitted=fitted)
    signal = signal_of({"train": part})
    if signal.takes != "volume" or recipe.data.columns or recipe.data.side:
        raise UsageError(
            f"{folder}: {recipe.model.name} takes {signal.takes if signal.takes != 'volume' else 'more than volumes'}; maps are "
            "made of networks of volumes alone"
        )
    if not recipe.objective.is_supervised:
        raise UsageError(f"{folder}: was trained without a target, its outputs score nothing; give a run that has one")
    outputs = saved_outputs(found.state["objective"])
    network = make_model(recipe, signal, outputs=outputs).to(device)
    network.load_state_dict(dict(found.tensors))
    return TrainedRun(recipe=recipe, step=found.step, weights=found.which, network=network, part=part)


def write_maps(
    trained: TrainedRun, method: Method, *, out: Path, limit: int | None, device: torch.device
) -> dict[str, Any]:
    """One NIfTI map a run, their mean over subjects as NIfTI and PNG, and attribution.json with what made them.

    Args:
        trained: network and data.
        method: how.
        out: a folder; files of an earlier call are replaced.
        limit: only so many runs; None for all.
        device: where the network is.
    """
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    clips = trained.part.clips
    names = file_names(list(clips.runs), suffix=f"_{method.name}.nii.gz")
    mean, rows, first = SubjectMean(clips.grid), [], None
    for found in islice(attribute_runs(trained.network, trained.part, method, device=device), limit):
        first = first or found.run
        mean.add(found)
        write_map(clips, found.run, found.values, out / "runs" / names[found.run.name])
        rows.append(_row(found, names[found.run.name]))
        print(f"{len(rows)}: {found.run.name}: {found.windows} windows{_told(found)}", flush=True)
    if first is None:
        raise UsageError("the split has no window to attribute; give another --split")
    facts = {
        "method": {key: value for key, value in dataclasses.asdict(method).items() if key != "regions"},
        "regions": None if method.regions is None else int(method.regions.max()) + 1,
        "model": trained.recipe.model.name,
        "target": trained.recipe.data.target,
        "step": trained.step,
        "weights": trained.weights,
        "subjects": mean.subjects,
        "content_digest": clips.content_digest,
        "runs": rows,
    }
    write_map(clips, first, mean.value, out / f"mean_{method.name}.nii.gz")
    title = (
        f"{trained.recipe.model.name}, {trained.recipe.data.target}, step {trained.step}: {_words(method)}, "
        f"mean of {mean.subjects} subjects, over the mean image of one"
    )
    colours = "fall of the output" if method.name == "occlusion" else "part of the output's change"
    write_picture(clips, first, mean.value, out / f"mean_{method.name}.png", title=title, colours=colours)
    write_json(out / "attribution.json", facts)
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the maps of a trained run; the exit status is 0, 1 or 2."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    try:
        with ExitStack() as stack:
            trained = open_trained(options.run, url=options.url, split=options.split, device=device, stack=stack)
            method = _method(options, trained.part.clips)
            out = options.out or options.run / "attribution"
            write_maps(trained, method, out=out, limit=options.runs, device=device)
            print(f"written: {out / f'mean_{method.name}.nii.gz'}, .png, runs/, attribution.json")
    except FmriStreamError as error:
        print(f"attribution: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _method(options: argparse.Namespace, clips: "StreamingDataset") -> Method:
    regions = None
    if options.method == "occlusion":
        by_parcels = options.atlas is not None
        regions = parcel_regions(clips, options.atlas) if by_parcels else cube_regions(clips, options.block)
    return Method(
        name=options.method,
        output=options.output,
        baseline=options.baseline,
        steps=options.steps,
        chunk=options.chunk,
        magnitude=options.magnitude,
        regions=regions,
    )


def _row(found: RunMap, path: str) -> dict[str, Any]:
    known = found.change == found.change
    return {
        "run": found.run.name,
        "file": f"runs/{path}",
        "windows": found.windows,
        "change": found.change if known else None,
        "gap": found.gap if known else None,
    }


def _told(found: RunMap) -> str:
    if found.change != found.change:
        return ""
    return f", output minus baseline's {found.change:+.4g}, attributions sum to it within {found.gap:.2g}"


def _words(method: Method) -> str:
    if method.name == "occlusion":
        assert method.regions is not None, "Method checks it"
        return f"occlusion of {int(method.regions.max()) + 1} regions"
    return f"integrated gradients{' (magnitude)' if method.magnitude else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.attribution", description="Maps of what a trained network's scores rest on."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the --out folder of a training run")
    parser.add_argument("url", nargs="?", default="", metavar="URL", help="a dataset (default: the run's own)")
    parser.add_argument("--split", default="test", help='which runs; "" for all (default: test)')
    parser.add_argument("--method", choices=("gradients", "occlusion"), default="gradients")
    parser.add_argument("--output", type=int, default=0, help="which output of the network (default: 0)")
    parser.add_argument("--baseline", choices=BASELINES, default="zero", help="what stands for nothing (default: zero)")
    parser.add_argument("--steps", type=int, default=64, help="points of integrated gradients (default: 64)")
    parser.add_argument("--chunk", type=int, default=1, help="windows at once (default: 1)")
    parser.add_argument("--magnitude", action="store_true", help="sums of absolute values over time")
    parser.add_argument(
        "--block", type=int, default=DEFAULT_BLOCK, help="edge of an occluded cube in voxels (default: 6)"
    )
    parser.add_argument("--atlas", metavar="DIGITS", help="occlude stored parcels instead of cubes")
    parser.add_argument("--runs", type=int, metavar="N", help="the first N runs only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/attribution")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
