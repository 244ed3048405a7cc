"""Which patches of a clip a network is not shown: a mode, a share, and noise that decides the rest.

Tokens are numbered over the places of brain patches within the times of a clip, the place fastest. Every sample of a
batch hides the same number of them, and its own row of noise alone says which, so that a sample's mask is the same in any
batch, on any rank.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fmristream.errors import UsageError

Mode = Literal["random", "tube", "window", "span", "future"]
MODES = ("random", "tube", "window", "span", "future")
Shape3 = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMasking:
    """What to hide, and how much of it.

    random: tokens. tube: the same places at all times. window: blocks of `window` patches (x, y, z, time), the last one in
    part, so that the share is exact. span: all places for one stretch of time, somewhere. future: the same, at the end.

    Attributes:
        mode: as above.
        ratio: the hidden share: of tokens (random, window), places (tube) or times (span, future); rounded to whole ones.
        window: patches along x, y, z and time, for mode window.
    """

    mode: Mode = "tube"
    ratio: float = 0.9  # as published for CortexMAE
    window: tuple[int, ...] = (2, 2, 2, 2)

    def __post_init__(self) -> None:
        ratio: Any = self.ratio
        if self.mode not in MODES:
            raise UsageError(f"mask must be one of {', '.join(MODES)}, got {self.mode!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise UsageError(f"mask_ratio must lie between 0 and 1, got {ratio!r}")
        sizes: Any = self.window
        if not isinstance(sizes, tuple) or len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
            raise UsageError(
                f"mask_window must be a list of 4 whole numbers above 0 (patches along x, y, z and time), got {sizes!r}"
            )

    def hidden_tokens(self, *, places: int, times: int) -> int:
        """How many tokens of a clip are hidden.

        Raises:
            UsageError: none or all of them would be.
        """
        parts, size, what = {
            "random": (places * times, 1, "patches"),
            "window": (places * times, 1, "patches"),
            "tube": (places, times, "places"),
            "span": (times, places, "times"),
            "future": (times, places, "times"),
        }[self.mode]
        hidden = round(parts * self.ratio)
        if not 1 <= hidden < parts:
            raise UsageError(
                f"mask {self.mode} with mask_ratio {self.ratio:g} would hide {hidden} of {parts} {what}; some must be hidden "
                "and some shown: change mask_ratio, the clip's length or patch_size"
            )
        return hidden * size

    def noise_size(self, *, places: int, times: int, grid: Shape3) -> int:
        """How many random numbers a sample's mask is made of."""
        if self.mode == "window":
            wx, wy, wz, wt = self.window
            return -(-times // wt) * _blocks(grid, (wx, wy, wz))[1]
        return {"random": places * times, "tube": places, "span": 1, "future": 0}[self.mode]


class TokenSplit(NamedTuple):
    """Token numbers, rising: `shown` (b, kept) and `hidden` (b, rest); together each token once."""

    shown: Tensor
    hidden: Tensor


def split_tokens(masking: VolumeMasking, noise: Tensor, *, places: Tensor, times: int, grid: Shape3) -> TokenSplit:
    """Choose what is shown.

    Args:
        masking: what to hide.
        noise: (b, `masking.noise_size(...)`) uniform in [0, 1); where it is small, patches are shown.
        places: (n,) number of each brain patch in the C-ordered `grid`.
        times: patches along time.
        grid: patches along x, y and z.
    """
    count = len(places)
    expected = masking.noise_size(places=count, times=times, grid=grid)
    if noise.dim() != 2 or noise.shape[1] != expected:
        raise UsageError(
            f"mask {masking.mode}: noise must be (batch, {expected}) for {count} places, {times} times and a grid of "
            f"{list(grid)}, got {tuple(noise.shape)}"
        )
    hidden = masking.hidden_tokens(places=count, times=times)
    if masking.mode in ("span", "future"):
        key = _hidden_times(masking.mode, noise, times=times, length=hidden // count).repeat_interleave(count, dim=1)
    else:
        # Ranks, because equal noise must not mix the tokens of two groups.
        ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
        key = ranks[:, _groups(masking, places, times=times, grid=grid)]
    order = key.argsort(dim=1, stable=True)
    shown = count * times - hidden
    return TokenSplit(order[:, :shown].sort(dim=1).values, order[:, shown:].sort(dim=1).values)


def _groups(masking: VolumeMasking, places: Tensor, *, times: int, grid: Shape3) -> Tensor:
    """(tokens,): which of the numbers of the noise each token goes by."""
    count = len(places)
    token = torch.arange(times * count, device=places.device)
    if masking.mode == "random":
        return token
    if masking.mode == "tube":
        return token % count
    wx, wy, wz, wt = masking.window
    (_, by, bz), blocks = _blocks(grid, (wx, wy, wz))
    _, gy, gz = grid
    x, y, z = places // (gy * gz), places // gz % gy, places % gz
    block = (x // wx * by + y // wy) * bz + z // wz
    return token // count // wt * blocks + block[token % count]


def _blocks(grid: Shape3, window: Shape3) -> tuple[Shape3, int]:
    """Blocks along x, y and z, and their number; some may hold no brain, and then hide nothing."""
    x, y, z = (-(-size // length) for size, length in zip(grid, window, strict=True))
    return (x, y, z), x * y * z


def _hidden_times(mode: Mode, noise: Tensor, *, times: int, length: int) -> Tensor:
    """(b, times) int64: 1 where hidden."""
    last = times - length
    is_last = mode == "future"
    start = torch.full((len(noise), 1), last, device=noise.device) if is_last else (noise * (last + 1)).long()
    time = torch.arange(times, device=noise.device)
    return ((time >= start) & (time < start + length)).long()
