"""How errors fall with the number of subjects: a power law a n^-b + c, and how sure its numbers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 500
_SEED = 2000
# Below so many sizes a floor cannot be told from a slope: c is 0.
_SIZES_FOR_FLOOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """error(n) = scale x n^-exponent + floor."""

    scale: float
    exponent: float
    floor: float

    def __call__(self, sizes: Floats) -> Floats:
        return np.asarray(self.scale * np.power(sizes, -self.exponent) + self.floor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """A power law and its 95 % intervals.

    Attributes:
        law: fitted to the means over seeds.
        exponent: its interval, seeds resampled.
        grid: sizes at which the curve is drawn.
        curve: the law there.
        low: 2.5th percentile of resampled laws there.
        high: 97.5th.
    """

    law: PowerLaw
    exponent: tuple[float, float]
    grid: Floats
    curve: Floats
    low: Floats
    high: Floats


def fit_power_law(sizes: Floats, errors: Floats) -> PowerLaw:
    """Least squares of the errors; scale and floor are not below 0, and the exponent lies in 0 to 3."""
    from scipy.optimize import least_squares

    has_floor = len(np.unique(sizes)) >= _SIZES_FOR_FLOOR
    slope = np.polyfit(np.log(sizes), np.log(np.maximum(errors, 1e-12)), 1)
    exponent = float(np.clip(-slope[0], 1e-3, 2.9))
    best = None
    for floor in (0.0, 0.5 * float(errors.min())) if has_floor else (0.0,):
        start = [float(np.exp(slope[1])) or 1.0, exponent, floor][: 3 if has_floor else 2]
        bounds = ([0.0, 0.0, 0.0][: len(start)], [np.inf, 3.0, max(float(errors.max()), 1e-12)][: len(start)])
        inside = np.clip(start, np.array(bounds[0]) + 1e-12, np.array(bounds[1]) - 1e-12)
        found = least_squares(
            lambda p: p[0] * np.power(sizes, -p[1]) + (p[2] if has_floor else 0.0) - errors,
            inside,
            bounds=bounds,
            x_scale=np.maximum(np.abs(inside), 1e-3),
            xtol=1e-12,
            ftol=1e-12,
            max_nfev=5000,
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return PowerLaw(scale=float(best.x[0]), exponent=float(best.x[1]), floor=float(best.x[2]) if has_floor else 0.0)


def fit_with_interval(errors: Mapping[int, Mapping[int, float]], *, draws: int = DRAWS) -> Fit:
    """A law of mean errors by size, with intervals over seeds: whole curves of seeds are drawn again.

    Args:
        errors: by size, by seed; seeds that lack a size are left out of nothing else.
        draws: how often.
    """
    sizes = sorted(errors)
    seeds = sorted({seed for row in errors.values() for seed in row})
    law = fit_power_law(*_means(errors, sizes, seeds))
    grid = np.geomspace(sizes[0], sizes[-1], 60)
    rng = np.random.default_rng(_SEED)
    laws = []
    for _ in range(draws if len(seeds) > 1 else 0):
        x, y = _means(errors, sizes, rng.choice(seeds, len(seeds)).tolist())
        if len(x) >= 2:
            laws.append(fit_power_law(x, y))
    curves = np.stack([one(grid) for one in laws] or [np.full(len(grid), np.nan)])
    exponents = [one.exponent for one in laws] or [np.nan]
    low, high = np.quantile(curves, (0.025, 0.975), axis=0)
    least, most = np.quantile(exponents, (0.025, 0.975))
    return Fit(law=law, exponent=(float(least), float(most)), grid=grid, curve=law(grid), low=low, high=high)


def _means(
    errors: Mapping[int, Mapping[int, float]], sizes: Sequence[int], seeds: Sequence[int]
) -> tuple[Floats, Floats]:
    """(sizes, mean errors) over these seeds; a seed may come several times."""
    found = {size: [errors[size][seed] for seed in seeds if seed in errors[size]] for size in sizes}
    kept = {size: values for size, values in found.items() if values}
    return np.array(list(kept), dtype=np.float64), np.array([np.mean(values) for values in kept.values()])
