"""What a scan comes with beside its frames, joined late: series aligned to the frames, and columns of a table.

What is not known (NaN, or not finite) enters as 0 beside a number that says so. Numbers should be standardised with the
statistics of the training subjects before they come here. Codes enter as one number for each code; one that is not of the
training subjects' codes, such as a new site's, is not known.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError

RECURRENT: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


def with_missing(values: Tensor) -> Tensor:
    """(..., k) to (..., 2 k) float32: the values, 0 where one is not finite, and then 1 where that is so."""
    is_known = values.isfinite()
    return torch.cat([torch.where(is_known, values, 0).float(), (~is_known).float()], dim=-1)


class SideSeries(nn.Module):
    """A small recurrence over the side series, or a map of each frame alone where order must not be known."""

    def __init__(self, series: int, *, width: int, rnn: str) -> None:
        super().__init__()
        self.series = series
        if rnn == "none":
            self.each = nn.Linear(2 * series, width)
        else:
            self.rnn = RECURRENT[rnn](2 * series, width, batch_first=True)
        self.is_recurrent = rnn != "none"

    def forward(self, side: Tensor, frames: tuple[int, int]) -> Tensor:
        """(b, t, series) to (b, t, width); `frames` is the (b, t) that the bold has."""
        if side.shape != (*frames, self.series):
            raise UsageError(
                f"cnn_rnn: side must be {(*frames, self.series)} as (b, t, series), got {tuple(side.shape)}; "
                "give the model the number of series as `side`"
            )
        known = with_missing(side)
        states: Tensor = self.rnn(known)[0] if self.is_recurrent else torch.tanh(self.each(known))
        return states


class Columns(nn.Module):
    """Columns of a table as one vector; a column of kind 0 is a number, of kind n a code from 0 to n - 1."""

    def __init__(self, kinds: tuple[int, ...], *, width: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.numbers = [place for place, kind in enumerate(kinds) if kind == 0]
        self.map = nn.Linear(2 * len(self.numbers) + sum(kind + 1 for kind in kinds if kind), width)

    def forward(self, columns: Tensor, batch: int) -> Tensor:
        """(b, columns) to (b, width)."""
        if columns.shape != (batch, len(self.kinds)):
            raise UsageError(
                f"cnn_rnn: columns must be {(batch, len(self.kinds))} as (b, columns), got {tuple(columns.shape)}; "
                "give the model the kind of each as `columns`"
            )
        return F.gelu(self.map(self.spread(columns)))

    def spread(self, columns: Tensor) -> Tensor:
        """(b, columns) to (b, numbers): all numbers and which are missing, then each code's places and whether it is missing."""
        parts = [with_missing(columns[:, self.numbers])]
        for place, kind in enumerate(self.kinds):
            if kind:
                codes = columns[:, place, None] == torch.arange(kind, device=columns.device)
                parts.append(torch.cat([codes, ~codes.any(1, keepdim=True)], dim=1).float())
        return torch.cat(parts, dim=1)
