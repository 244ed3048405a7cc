"""Take a trained network out of its run: the weights as safetensors under their published names, the network as a program.

    python -m train.export RUN --to weights.safetensors [--program model.pt2]

The weights file says in its metadata which network it is of, so that `tools/import_checkpoint.py` asks for nothing. The
program is that of `torch.export`: it runs without this repository, for the batch and the device it was made for. Neither
names a machine, a folder, a dataset or a subject.
"""

import argparse
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmristream.errors import CorruptDataError, FmriStreamError, UsageError
from fmristream.storage import display_url
from train.build import unseen_options
from train.config import Recipe, recipe_from
from train.models.checkpoint_files import OWN_METADATA
from train.models.imported import alone
from train.models.importing import Told, build_fitted, fit_weights, setting
from train.models.load import WeightsError, load_named, unwrapped
from train.models.published import FAMILIES, family_of
from train.scored import Weights, find_weights
from train.targets import saved_outputs

DONE, FAILED, WRONG_USAGE = 0, 1, 2
# What the published image models were trained on: parcels and frames.
PUBLISHED_SERIES = (424, 200)
# Found for every network on a CPU: 0.
LARGEST_DIFFERENCE = 1e-5


def export_safetensors(model: nn.Module, path: Path, recipe: Recipe, *, replace: bool = False) -> None:
    """Write the weights under their names, and as metadata the recipe's model section and what no shape tells.

    The file is whole, or there is none.

    Args:
        model: as it was trained, in DDP or compiled too.
        path: ends in .safetensors; must not exist, unless `replace`.
        recipe: names the network and its options; grid and window are told where the recipe has a grid.
        replace: write over an earlier file.
    """
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are written to .safetensors, got {path.suffix!r}")
    state = unwrapped(model.state_dict())[0]
    about = {"model": recipe.model.name, "options": options_of(recipe), "network": unseen_options(_inner(model))}
    metadata = {OWN_METADATA: json.dumps(about, sort_keys=True, default=list)}
    with _put_whole(path, replace=replace) as unfinished:
        save_file(alone(state), unfinished, metadata)


def _inner(model: nn.Module) -> nn.Module:
    """The network in what DDP and torch.compile put around it."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


def options_of(recipe: Recipe) -> dict[str, Any]:
    """The network's options in a recipe, with the grid and the window that the trainer gives it."""
    grid, window = recipe.data.grid, recipe.data.window
    return {**recipe.model.options, **({"img_size": [*grid, window]} if grid is not None else {})}


def export_program(model: nn.Module, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The network in eval mode as a program of tensor operations, which gives what the network gives.

    Args:
        model: on the device that the program is for. Of a pre-training BrainLM the program maps (series, xyz, noise) to the
            series completed, what was hidden, and the latent tokens.
        example: inputs of the wanted shapes; the batch is fixed. Their values are not used, and not kept.

    Raises:
        WeightsError: torch cannot turn this network into a program.
    """
    blank = tuple(torch.zeros_like(tensor) for tensor in example)
    was_training = model.training
    try:
        with torch.no_grad():
            program = torch.export.export(_with_plain_outputs(model.eval()), blank)
    except Exception as error:  # whatever operation it cannot trace
        first_line = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"{type(model).__name__}: torch.export cannot make it a program: {first_line}") from error
    finally:
        model.train(was_training)
    _forget_places(program)
    return program


def save_program(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    model: nn.Module,
    example: Sequence[Tensor],
    replace: bool = False,
) -> None:
    """Write a program to a .pt2 file, read it back, and keep it only if it computes what its network does.

    Raises:
        WeightsError: outputs for the example differ by more than 1e-5.
    """
    if path.suffix != ".pt2":
        raise UsageError(f"{path}: programs are written to .pt2, got {path.suffix!r}")
    with _put_whole(path, replace=replace) as unfinished:
        torch.export.save(program, unfinished)
        difference = largest_difference(model, torch.export.load(unfinished).module(), example)
        if not difference <= LARGEST_DIFFERENCE:  # NaN too
            raise WeightsError(f"{path}: the program differs from its network by {difference:g}; it is not kept")


def largest_difference(model: nn.Module, program: Callable[..., Any], example: Sequence[Tensor]) -> float:
    """How far a program's outputs are from those of the network that it was made of."""
    with torch.no_grad():
        pairs = zip(_flat(_with_plain_outputs(model)(*example)), _flat(program(*example)), strict=True)
        return max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs)


class _Reconstructing(nn.Module):
    """A pre-training network whose outputs are a plain tuple, which a file of a program can say."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, series: Tensor, xyz: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, parcels, t), (parcels, 3), (b, tokens) to the series, what was hidden of it, and the latent tokens."""
        result = self.model(series, xyz, noise=noise)
        return result.series, result.hidden, result.latent


def _with_plain_outputs(model: nn.Module) -> nn.Module:
    from train.models.brainlm import Brainlm
    from train.models.brainlm_vitmae import BrainlmVitmae

    return _Reconstructing(model).eval() if isinstance(model, Brainlm | BrainlmVitmae) else model


def _forget_places(program: torch.export.ExportedProgram) -> None:
    """Take out the lines of source that each operation came from: their paths name a machine, perhaps a user."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


@contextmanager
def _put_whole(path: Path, *, replace: bool) -> Iterator[Path]:
    """A name beside `path`, of the same ending, which takes its place when all is written."""
    if os.path.lexists(path) and not (replace and path.is_file()):
        raise UsageError(f"{path}: is there already; give another name, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors keeps its files for their owner alone; the umask decides
        with open(unfinished, "rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def trained_network(found: Weights, *, settings: Mapping[str, Any]) -> tuple[nn.Module, Recipe]:
    """The network of a run with the weights of a checkpoint, and a recipe that holds all of its options.

    Args:
        found: of `python -m train`.
        settings: options that the recipe took from the data, such as img_size.
    """
    recipe = recipe_from(found.state["recipe"])
    name, source = recipe.model.name, f"step {found.step}"
    weights = unwrapped(found.tensors)[0]
    if family_of(weights) != name:
        outputs = saved_outputs(found.state.get("objective") or {})
        told_outputs = {} if outputs is None else {"outputs": outputs}
        return _other_network(recipe, weights, settings={**told_outputs, **settings}, source=source)
    family = FAMILIES[name]
    defaults = {
        item.name: item.default
        for item in dataclasses.fields(family.config)
        if item.name in family.asked and item.default is not dataclasses.MISSING
    }
    told = [
        Told(by="the network's defaults", options=defaults),
        # The token model's window is the recipe's; networks without that option leave it.
        Told(by="the recipe", options={"num_timepoints_per_voxel": recipe.data.window, **options_of(recipe)}),
        Told(by="--set", options=settings, only_known=True),
    ]
    fitted = fit_weights(weights, name, source=source, told=told)
    return build_fitted(fitted), _with_options(recipe, {**recipe.model.options, **fitted.options})


def _other_network(
    recipe: Recipe, weights: Mapping[str, Tensor], *, settings: Mapping[str, Any], source: str
) -> tuple[nn.Module, Recipe]:
    """A network under other names than published ones: built from the recipe, loaded by all of its names."""
    from train.models import build_model

    options = {**options_of(recipe), **settings}
    try:
        model = build_model(recipe.model.name, options)
    except KeyError as error:
        raise UsageError(
            f"{recipe.model.name} needs {error.args[0]}, which the run took from its data; --set it"
        ) from error
    load_named(model, weights, source=source, ignored={})
    return model, _with_options(recipe, options)


def _with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options=dict(options)))


def example_inputs(model: nn.Module, options: Mapping[str, Any], *, batch: int = 1) -> tuple[Tensor, ...]:
    """Random inputs of a network, of the sizes it was built for.

    Volume networks take (b, c, x, y, z, t), series networks (b, parcels, t), BrainLMs (series, xyz, noise).
    """
    from train.models.brainlm import Brainlm
    from train.models.brainlm_vitmae import BrainlmVitmae

    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Brainlm):
        parcels, frames = model.config.num_brain_voxels, model.window
        tokens = parcels * model.config.num_patches
    elif isinstance(model, BrainlmVitmae):
        parcels, frames = (min(size, model.config.image_size) for size in PUBLISHED_SERIES)
        tokens = model.config.grid**2
    elif "img_size" in options:
        shape = (batch, options.get("in_chans", 1), *options["img_size"])
        return (torch.randn(shape, generator=generator),)
    elif {"parcels", "frames"} <= set(options):
        return (torch.randn(batch, options["parcels"], options["frames"], generator=generator),)
    else:
        raise UsageError(f"{type(model).__name__}: its inputs are not known; give --set img_size=[x,y,z,t]")
    return (
        torch.randn(batch, parcels, frames, generator=generator),
        torch.randn(parcels, 3, generator=generator),
        torch.rand(batch, tokens, generator=generator),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run as it was scored; the exit status is 0, 1 or 2."""
    chosen = _parser().parse_args(arguments)
    try:
        return _export(chosen)
    except FmriStreamError as error:
        print(f"export: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except OSError as error:
        print(f"export: {error.filename or chosen.to}: {error.strerror or error}", file=sys.stderr)
        return FAILED


def _export(chosen: argparse.Namespace) -> int:
    found = find_weights(chosen.run)
    if found is None:
        raise CorruptDataError(
            f"{display_url(chosen.run)}: has no whole checkpoint; give the --out folder of a run, or one of its checkpoints"
        )
    for note in found.notes:
        print(f"export: {note}", file=sys.stderr)
    model, recipe = trained_network(found, settings=dict(setting(text) for text in chosen.set))
    export_safetensors(model, chosen.to, recipe, replace=chosen.force)
    print(
        f"{chosen.to}: {recipe.model.name} after {found.step} steps, {len(model.state_dict())} tensors, {found.which}"
    )
    if chosen.program:
        example = example_inputs(model, options_of(recipe), batch=chosen.batch)
        model.eval()
        save_program(export_program(model, example), chosen.program, model=model, example=example, replace=chosen.force)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in example)
        print(f"{chosen.program}: takes {shapes} on a CPU, and gives the same as the network")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Write the weights of a run for others to use: those that its report scored (train/scored.py).",
    )
    parser.add_argument(
        "run", metavar="RUN", help="the --out folder of a run, RUN/best, a checkpoint, or the URL of one of them"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="PATH", help="a new .safetensors file")
    parser.add_argument("--program", type=Path, metavar="PATH", help="a new .pt2 file of torch.export, for a CPU")
    parser.add_argument("--batch", type=int, default=1, help="windows that the program takes at once (default: 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option that the recipe took from the data, such as img_size=[75,93,81,20] (repeatable)",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
