"""Which voxels a score rests on: integrated gradients and occlusion of any volume network, in bounded memory.

Pure functions of a network `forward(bold) -> (b, outputs)` with bold (b, c, x, y, z, t), whose rows do not see each other.
Neither says that a region matters to the brain: both say what this network, with these weights, does with this input.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmristream.errors import UsageError

Network = Callable[[Tensor], Tensor]
Regions = NDArray[np.int64]

BaselineKind = Literal["zero", "window-mean", "background"]
BASELINES: tuple[BaselineKind, ...] = ("zero", "window-mean", "background")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Integrated gradients of some windows, and what they must sum to."""

    values: Tensor  # in the shape of the windows: each value's part of the change
    outputs: Tensor  # (b,) float64: the network's output
    baseline_outputs: Tensor  # (b,) float64: for the baseline

    @property
    def change(self) -> Tensor:
        """(b,) what the attributions explain: the output minus the baseline's."""
        return self.outputs - self.baseline_outputs

    @property
    def gap(self) -> Tensor:
        """(b,) completeness: what the attributions sum to, minus that change; smaller with more steps."""
        return self.values.double().flatten(1).sum(1) - self.change


def make_baseline(bold: Tensor, kind: BaselineKind, *, fill: Tensor | None = None) -> Tensor:
    """What stands for "nothing there", in the shape of the windows (b, c, x, y, z, t).

    Args:
        bold: the windows.
        kind: `zero`, which is each voxel's mean over its run where inputs are voxel z-scores; `window-mean`, each voxel's mean
            over the window, which leaves the fluctuations to be explained and not the still image; `background`, the
            value outside the mask, which is not 0 for global z-scores.
        fill: (b, c), that value (`Batch.fill`); for `background`.

    Raises:
        UsageError: there is no such kind, or no fill.
    """
    if kind == "zero":
        return torch.zeros_like(bold)
    if kind == "window-mean":
        return bold.mean(-1, keepdim=True).expand_as(bold)
    if kind not in BASELINES:
        raise UsageError(f"baseline {kind!r} must be one of {', '.join(BASELINES)}")
    if fill is not None:
        return fill.to(bold)[:, :, None, None, None, None].expand_as(bold)
    raise UsageError("baseline 'background' needs the value outside the mask, fill (b, c)")


def integrated_gradients(
    network: Network, bold: Tensor, *, baseline: Tensor, output: int = 0, steps: int = 64, chunk: int = 1
) -> Gradients:
    """Sundararajan, Taly and Yan (2017): the gradient along the straight line from the baseline, times the way.

    The integral is a Gauss-Legendre sum, exact for a gradient that is a polynomial of degree 2 steps - 1 along the line.

    Args:
        network: in evaluation mode (`evaluating`).
        bold: (b, c, x, y, z, t) float32.
        baseline: in the same shape.
        output: which of the network's outputs.
        steps: points on the line.
        chunk: points that the network sees at once; memory is that of a training step of so many windows.

    Raises:
        UsageError: shapes or numbers make no sense.
    """
    _check(bold, baseline, chunk=chunk, steps=steps)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    at = torch.as_tensor((nodes + 1) / 2, dtype=bold.dtype, device=bold.device)
    share = torch.as_tensor(weights / 2, dtype=bold.dtype, device=bold.device)
    values = torch.zeros_like(bold, memory_format=torch.contiguous_format)
    for row, (start, way) in enumerate(zip(baseline, bold - baseline, strict=True)):
        for place in range(0, steps, chunk):
            part = slice(place, place + chunk)
            points = (start + at[part].view(-1, *[1] * way.dim()) * way).detach().requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(_output(network, points, output).sum(), points)
            values[row] += torch.tensordot(share[part], slope, dims=1)
        values[row] *= way
    return Gradients(
        values=values,
        outputs=_outputs(network, bold, output, chunk),
        baseline_outputs=_outputs(network, baseline, output, chunk),
    )


def occlusion(
    network: Network, bold: Tensor, regions: Regions, *, baseline: Tensor, output: int = 0, chunk: int = 1
) -> Tensor:
    """(b, regions) float64: how much the output falls when a region shows the baseline in every frame.

    Args:
        network: in evaluation mode (`evaluating`).
        bold: (b, c, x, y, z, t).
        regions: (x, y, z) number of each voxel's region; negative: in none.
        baseline: in the shape of `bold`.
        output: which of the network's outputs.
        chunk: windows that the network sees at once.

    Raises:
        UsageError: shapes or numbers make no sense.
    """
    _check(bold, baseline, chunk=chunk)
    if regions.shape != tuple(bold.shape[2:5]) or regions.max(initial=-1) < 0:
        raise UsageError(
            f"regions {regions.shape} must number voxels of the grid {tuple(bold.shape[2:5])}, one at least"
        )
    number = torch.as_tensor(regions, device=bold.device)[None, ..., None]
    count = int(regions.max()) + 1
    falls = torch.zeros((len(bold), count), dtype=torch.float64)
    with torch.no_grad():
        whole = _outputs(network, bold, output, chunk)
        for row, (window, hidden) in enumerate(zip(bold, baseline, strict=True)):
            for place in range(0, count, chunk):
                some = range(place, min(place + chunk, count))
                shown = torch.stack([torch.where(number == one, hidden, window) for one in some])
                falls[row, some.start : some.stop] = whole[row] - _output(network, shown, output).double().cpu()
    return falls


def block_regions(inside: NDArray[np.bool_], block: int) -> Regions:
    """(x, y, z) number of each voxel's cube of `block`³ voxels, cubes that hold a voxel inside counted in C order; -1 outside.

    Raises:
        UsageError: the edge is below 1, or nothing is inside.
    """
    if block < 1 or not inside.any():
        raise UsageError(f"cubes of {block}³ voxels over {int(inside.sum())} voxels: expected 1 or more of both")
    cubes = tuple(-(-size // block) for size in inside.shape)
    cube = np.ravel_multi_index(tuple(axis // block for axis in np.nonzero(inside)), cubes)
    regions = np.full(inside.shape, -1, dtype=np.int64)
    regions[inside] = np.unique(cube, return_inverse=True)[1]
    return regions


def painted(scores: NDArray[np.float64], regions: Regions) -> NDArray[np.float32]:
    """(x, y, z) every voxel with its region's score; 0 in none."""
    return np.where(regions >= 0, scores[np.maximum(regions, 0)], 0).astype(np.float32)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode, and able to give gradients in it; afterwards in the mode that it had."""
    was_training = network.training
    network.eval()
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            # cuDNN's recurrent networks have gradients in training mode only.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            yield network
        finally:
            network.train(was_training)


def _outputs(network: Network, bold: Tensor, output: int, chunk: int) -> Tensor:
    """(b,) float64 on the host."""
    with torch.no_grad():
        parts = [bold[place : place + chunk] for place in range(0, len(bold), chunk)]
        return torch.cat([_output(network, part, output) for part in parts]).double().cpu()


def _output(network: Network, bold: Tensor, output: int) -> Tensor:
    outputs = network(bold)
    if outputs.dim() != 2 or not 0 <= output < outputs.shape[1]:
        raise UsageError(f"output {output} was asked for, the network gives {tuple(outputs.shape)}; count from 0")
    return outputs[:, output]


def _check(bold: Tensor, baseline: Tensor, **counts: int) -> None:
    if bold.dim() != 6 or baseline.shape != bold.shape:
        raise UsageError(
            f"expected windows (b, c, x, y, z, t) and a baseline of their shape, got {tuple(bold.shape)} and "
            f"{tuple(baseline.shape)}"
        )
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be 1 or more, got {count}")
