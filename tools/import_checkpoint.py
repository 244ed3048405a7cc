"""Bring a published checkpoint in: strictly, by its own names, as safetensors with a recipe.

    python tools/import_checkpoint.py hcp_sex.ckpt --as swift --out weights/hcp_sex
    python tools/import_checkpoint.py pytorch_model.bin --as brainlm --config config.json --out weights/brainlm
    python tools/import_checkpoint.py phase3.pth --as tff3 --set "img_size=[75,93,81,20]" --set num_attention_heads=16 --out DIR

Exit 0: written; 1: the file is refused, nothing is written; 2: the command asks for something that makes no sense.
docs/checkpoints.md says more.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmristream.errors import FmriStreamError, UsageError
from train.models.checkpoint_files import CheckpointFile, read_checkpoint
from train.models.imported import ABOUT, RECIPE, WEIGHTS, dtypes, licence, write_import
from train.models.importing import Fitted, Told, fit_weights, setting
from train.models.load import printable
from train.models.published import FAMILIES

WRITTEN, REFUSED, WRONG_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Import one file; the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        file = read_checkpoint(chosen.file)
        told = [
            Told(by=f"{file.name}'s own metadata" if file.network else "its hyper-parameters", options=file.options),
            Told(by="--config", options=read_config(chosen.config) if chosen.config else {}),
            Told(by="--set", options=dict(setting(text) for text in chosen.set), only_known=True),
        ]
        fitted = fit_weights(file.tensors, chosen.network, source=file.name, told=told, backbone=chosen.backbone)
        write_import(chosen.out, fitted, file, force=chosen.force)
    except FmriStreamError as error:
        print(f"import_checkpoint: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else REFUSED
    except OSError as error:
        print(f"import_checkpoint: {error.filename or chosen.out}: {error.strerror or error}", file=sys.stderr)
        return REFUSED
    print("\n".join(summary(fitted, file)))
    print(f"written    {chosen.out}: {WEIGHTS}, {RECIPE}, {ABOUT}")
    return WRITTEN


def read_config(path: Path) -> dict[str, Any]:
    """The options in a published config.json, or in the model section of a recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        found: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read as {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}"
        ) from error
    if isinstance(found, Mapping) and path.suffix == ".toml":
        found = found.get("model", found)
    if not isinstance(found, Mapping):
        raise UsageError(f"{path}: expected options by name, got {type(found).__name__}")
    return dict(found)


def summary(fitted: Fitted, file: CheckpointFile) -> list[str]:
    """What was taken, what was left, and where each option is known from."""
    values = sum(tensor.numel() for tensor in fitted.tensors.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes(fitted.tensors).items())
    without = " without its head" if fitted.backbone else ""
    lines = [
        f"{file.name} ({file.layout}, {file.size_bytes:,} bytes, sha256 {file.sha256})",
        f"network    {fitted.network}{without}: {len(fitted.tensors)} tensors ({kinds}), {values:,} values, all of them fit",
    ]
    lines += [f"stripped   {file.wrapper}"] if file.wrapper else []
    lines += [f"ignored    {name}: {reason}" for name, reason in fitted.ignored.items()]
    lines += [f"option     {name} = {value}  ({fitted.known_from[name]})" for name, value in fitted.options.items()]
    return [printable(line) for line in (*lines, f"licence    {licence(fitted, file)}")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help=".safetensors, .ckpt, .pt, .pth or .bin")
    parser.add_argument("--as", dest="network", required=True, choices=list(FAMILIES), help="the network that it is of")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a published config.json, or a recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the network (repeatable)"
    )
    parser.add_argument("--backbone", action="store_true", help="leave the head behind (swift)")
    parser.add_argument("--force", action="store_true", help="replace an earlier import in DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
