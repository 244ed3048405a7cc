"""One synthetic subject: who it is, and the still images that its runs fluctuate about.

The only things that sex and age change are the time courses (see courses.py): nothing here depends on either, so
that no still image tells them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmristream.synth.anatomy import Coordinates, Tissue, edge_softness, network_maps, signal_left, tissue
from fmristream.synth.draws import FloatArray, Purpose, generator, settle

YOUNGEST_YEARS, OLDEST_YEARS = 20.0, 80.0
# Signal of T2*-weighted images, in scanner units.
GREY_SIGNAL, WHITE_SIGNAL, FLUID_SIGNAL, SCALP_SIGNAL = 1000.0, 830.0, 1250.0, 420.0
AIR_SIGNAL, AIR_NOISE = 18.0, 7.0
# Standard deviations as a share of the local mean; together 1 to 3 %.
NETWORK_SD = 0.011
BACKGROUND_SD = 0.004
GLOBAL_SD = 0.002
PULSATION_SD = 0.012
NOISE_SD = 0.009
DRIFT_SD = 0.003
NUM_BACKGROUNDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What one subject's runs are made of, at the voxels asked for, in scanner units."""

    mean: npt.NDArray[np.float32]
    noise_sd: npt.NDArray[np.float32]
    networks: npt.NDArray[np.float32]
    backgrounds: npt.NDArray[np.float32]
    pulsation: npt.NDArray[np.float32]
    restlessness: float


def sex_of(seed: int, subject: int) -> str:
    """F or M. Subjects 0 and 1, 2 and 3, … are one of each, so that small cohorts have both."""
    first_is_female = generator(seed, Purpose.SEX, subject // 2).integers(2) == 1
    return "F" if first_is_female == (subject % 2 == 0) else "M"


def age_of(seed: int, subject: int) -> float:
    """Years, uniform, to a tenth."""
    return round(float(generator(seed, Purpose.AGE, subject).uniform(YOUNGEST_YEARS, OLDEST_YEARS)), 1)


def standard_age(years: float) -> float:
    """-1 for the youngest, 1 for the oldest."""
    return (2 * years - YOUNGEST_YEARS - OLDEST_YEARS) / (OLDEST_YEARS - YOUNGEST_YEARS)


def subject_images(at: Coordinates, *, seed: int, subject: int, shape: tuple[int, int, int]) -> Images:
    """The still images of one subject at some voxels of a grid."""
    rng = generator(seed, Purpose.ANATOMY, subject)
    warped = _warp(at, rng)
    parts = tissue(warped, softness=edge_softness(shape))
    mean = _mean_signal(warped, parts, rng)
    noise = NOISE_SD * _about_one(rng, 0.2) * (0.7 + 0.3 * parts.grey + 0.6 * parts.fluid)
    amplitudes = _about_one(rng, 0.15, 6)
    networks = NETWORK_SD * amplitudes[:, None] * network_maps(warped) * (0.45 + 0.55 * parts.grey)
    waves = _waves(at, rng) * (BACKGROUND_SD * _about_one(rng, 0.2) * np.sqrt(2 / NUM_BACKGROUNDS))
    pulsation = PULSATION_SD * _about_one(rng, 0.3) * parts.fluid
    return Images(
        mean=settle(mean),
        noise_sd=settle(np.hypot(noise * mean, AIR_NOISE)),
        networks=settle(networks * mean),
        backgrounds=settle(waves * mean),
        pulsation=settle(pulsation * mean),
        restlessness=float(settle(_about_one(rng, 0.4))),
    )


def _warp(at: Coordinates, rng: np.random.Generator) -> Coordinates:
    """Positions moved by a few mm, smoothly: what spatial normalisation leaves of anatomical differences."""
    shift, frequency, phase = rng.normal(0, 0.012, (3, 2)), rng.normal(0, 2.5, (3, 2, 3)), rng.uniform(0, 6.28, (3, 2))
    moved = [
        place
        + sum(
            shift[axis, k] * np.sin(sum(f * u for f, u in zip(frequency[axis, k], at, strict=True)) + phase[axis, k])
            for k in range(2)
        )
        for axis, place in enumerate(at)
    ]
    return Coordinates(*moved)


def _mean_signal(at: Coordinates, parts: Tissue, rng: np.random.Generator) -> FloatArray:
    """Tissue contrast under the receive coil's field, with dropouts."""
    grey, white, fluid = _about_one(rng, 0.02, 3) * (GREY_SIGNAL, WHITE_SIGNAL, FLUID_SIGNAL)
    still = parts.grey * grey + parts.white * white + parts.fluid * fluid + parts.scalp * SCALP_SIGNAL
    tilt, bend = rng.normal(0, 0.04, 3), rng.normal(0.05, 0.03, 3)
    field = sum(t * u + b * u**2 for t, b, u in zip(tilt, bend, at, strict=True))
    gain = _about_one(rng, 0.1)
    return np.asarray(gain * still * np.exp(field) * signal_left(at) + AIR_SIGNAL)


def _waves(at: Coordinates, rng: np.random.Generator) -> FloatArray:
    """Smooth patterns over the whole brain, the source of long-range correlation that means nothing."""
    frequency, phase = rng.normal(0, 2.5, (NUM_BACKGROUNDS, 3)), rng.uniform(0, 6.28, NUM_BACKGROUNDS)
    waves = [
        np.cos(sum(f * u for f, u in zip(frequency[k], at, strict=True)) + phase[k]) for k in range(NUM_BACKGROUNDS)
    ]
    return np.stack(waves)


def _about_one(rng: np.random.Generator, spread: float, count: int | None = None) -> FloatArray:
    """Positive factors with median 1."""
    return np.asarray(np.exp(rng.normal(0, spread, count)))
