"""Which tokens of a parcel series a network is shown: a published mode, its extent, and noise that decides the rest."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fmristream.errors import UsageError

Mode = Literal["auto_encode", "predict_last", "predict_last_pixel"]
MODES = ("auto_encode", "predict_last", "predict_last_pixel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """What to hide: random tokens (auto_encode), whole trailing tokens (predict_last), or exact trailing frames.

    `ratio` is the hidden share of tokens or frames. `frames`, for the predicting modes, is their number instead.
    """

    mode: Mode = "auto_encode"
    ratio: float = 0.2
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"masking mode {self.mode!r} is unknown; known: {', '.join(MODES)}")
        if not 0 <= self.ratio < 1:
            raise UsageError(f"the masked share must lie in [0, 1), got {self.ratio!r}")
        if self.frames is not None and (self.mode == "auto_encode" or self.frames < 1):
            raise UsageError(
                f"masking {self.frames} frames needs a predicting mode and a number above 0, got mode {self.mode}"
            )

    def masked_frames(self, frames: int) -> int:
        """How many of a window's frames a predicting mode hides."""
        hidden = int(frames * self.ratio) if self.frames is None else self.frames
        if not 1 <= hidden < frames:
            raise UsageError(f"{self.mode}: {hidden} of {frames} frames would be hidden; hide 1 to {frames - 1}")
        return hidden


NOTHING = Masking(ratio=0.0)


class Reconstruction(NamedTuple):
    """What a network made of a window: series (b, parcels, t) and what was hidden of it.

    `latent` holds the encoder's (b, 1 + shown tokens, channels), cls first; `restore` (b, tokens) the place of each token
    in the order shown, hidden ones last; `hidden_tokens` (b, tokens) and `hidden` (b, parcels, t) are true where hidden.
    """

    series: Tensor
    hidden: Tensor
    latent: Tensor
    hidden_tokens: Tensor
    restore: Tensor


class TokenChoice(NamedTuple):
    """`shown` (b, kept) in the order of the noise, `restore` and `hidden` (b, tokens) as in `Reconstruction`."""

    shown: Tensor
    restore: Tensor
    hidden: Tensor


def choose_tokens(noise: Tensor, kept: int) -> TokenChoice:
    """Show the `kept` tokens of the smallest noise (b, tokens), in its order; ties in the order of tokens."""
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(dim=1)
    return TokenChoice(shown=shuffle[:, :kept], restore=restore, hidden=restore >= kept)


def choose_random(batch: int, tokens: int, ratio: float, noise: Tensor) -> TokenChoice:
    """Hide a share of the tokens at random: int(tokens * (1 - ratio)), as published, are shown."""
    _check_noise(noise, batch, tokens)
    return choose_tokens(noise, int(tokens * (1 - ratio)))


def choose_trailing(hidden: Tensor, kept: int, batch: int, noise: Tensor | None) -> TokenChoice:
    """Hide the tokens where `hidden` (tokens,) is true, all but `kept`; noise, if given, only orders those shown."""
    order = torch.zeros(batch, len(hidden), device=hidden.device) if noise is None else noise.float()
    _check_noise(order, batch, len(hidden))
    # The noise's ranks, lifted past all others where hidden.
    ranks = order.argsort(dim=1, stable=True).argsort(dim=1) + hidden * len(hidden)
    return choose_tokens(ranks, kept)


def draw_noise(batch: int, tokens: int, *, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform noise (b, tokens); drawn where the generator lives, so that a seed gives the same on every device."""
    place = device if generator is None else generator.device
    return torch.rand(batch, tokens, generator=generator, device=place).to(device)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """(b, n, channels) at (b, k) places: (b, k, channels)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def complete_tokens(shown: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """Put (b, kept, channels) back in token order, with the mask token (1, 1, channels) in every gap."""
    b, kept, channels = shown.shape
    gaps = mask_token.to(shown.dtype).expand(b, restore.shape[1] - kept, channels)
    return take_tokens(torch.cat([shown, gaps], dim=1), restore)


def _check_noise(noise: Tensor, batch: int, tokens: int) -> None:
    if noise.shape != (batch, tokens):
        raise UsageError(f"noise must be (batch, tokens) = {(batch, tokens)}, got {tuple(noise.shape)}")
