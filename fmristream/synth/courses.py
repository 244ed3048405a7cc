"""Time courses of one run: networks that carry the planted effects, head motion, drifts and physiology.

Networks 0 and 1 carry sex, networks 2 and 3 carry age, by one of these effects:

coupling   correlation of the two time courses, .2 ± strength / 2
amplitude  the first one's fluctuations are up to 1 + strength times as large
order      the first one leads or lags the second by up to `strength` frames
states     one of three states at a time: the first one active, the second, neither; of the changes of state,
           (2 ± strength) / 4 go that way round, the others the other way round
none       correlation .2 for everybody

Every network's time course has mean 0 over the run and, but for `amplitude`, the same variance: the mean image and
the SD image are blind to coupling, order and states. Of order and states one extreme is the other reversed in time, so
that functional connectivity, which doesn't know which frame comes first, is blind to them, too.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmristream.synth.draws import FloatArray, Purpose, generator, settle

COMMON_COUPLING = 0.2
MAX_STRENGTH = {"none": 100.0, "coupling": 2 * (1 - COMMON_COUPLING), "amplitude": 10.0, "order": 20.0, "states": 2.0}
NUM_NETWORKS = 6
NUM_STATES = 3
# How long a state lasts: three of them are a period of .04 Hz, amid the frequencies that BOLD has.
SHORTEST_STATE_S, LONGEST_STATE_S = 6.0, 10.0
# The haemodynamic response leaves little above .1 Hz, and the scanner's drift hides what is below .01 Hz.
CORNER_HZ, FLOOR_HZ = 0.08, 0.008
PULSE_CORNER_HZ = 0.3
# Circular convolution wraps around within this margin, which is cut off.
MARGIN_S = 60.0
SPIKE_RATE = 0.012
SPIKE_DECAY = 0.4
MOTION_SD_MM = 0.08
MOTION_CORNER_HZ = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a run shows of its subject: values between -1 and 1 for sex and for age."""

    kind: str
    strength: float
    sex: float
    age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Courses:
    """Time courses of one run, (component, frame); SD 1 except where a unit is given."""

    networks: npt.NDArray[np.float32]
    backgrounds: npt.NDArray[np.float32]
    pulsation: npt.NDArray[np.float32]
    whole_brain: npt.NDArray[np.float32]
    drift: npt.NDArray[np.float32]
    spike_share: npt.NDArray[np.float32]
    motion_mm: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How many frames, how far apart."""

    frames: int
    tr_s: float


def run_courses(
    timing: Timing, effect: Effect, *, seed: int, subject: int, run: int, num_backgrounds: int, restlessness: float
) -> Courses:
    """All time courses of one run."""
    rng = generator(seed, Purpose.COURSES, subject, run)
    networks = _networks(rng, timing, effect)
    backgrounds = _standard(_slow(_white(rng, timing, num_backgrounds), timing))
    whole_brain = _standard(_slow(_white(rng, timing, 1), timing))[0]
    pulsation = _standard(_slow(_white(rng, timing, 1), timing, corner_hz=PULSE_CORNER_HZ))[0]
    motion_mm, spike_share = _motion(rng, timing, restlessness)
    return Courses(
        networks=settle(networks),
        backgrounds=settle(backgrounds),
        pulsation=settle(pulsation),
        whole_brain=settle(whole_brain),
        drift=settle(_drift(rng, timing)),
        spike_share=settle(spike_share),
        motion_mm=settle(motion_mm),
    )


def coupling_of(effect: Effect, value: float) -> float:
    """The correlation planted between a pair of networks whose effect has this value."""
    return COMMON_COUPLING + (effect.strength / 2 * value if effect.kind == "coupling" else 0.0)


def _networks(rng: np.random.Generator, timing: Timing, effect: Effect) -> FloatArray:
    pairs = [_pair(rng, timing, effect, value) for value in (effect.sex, effect.age)]
    others = _standard(_slow(_white(rng, timing, NUM_NETWORKS - 4), timing))
    return np.concatenate([*pairs, others])


def _pair(rng: np.random.Generator, timing: Timing, effect: Effect, value: float) -> FloatArray:
    """Two networks' time courses."""
    if effect.kind == "states":
        return _states(rng, timing, forward=0.5 + effect.strength * value / 4)
    white = _white(rng, timing, 2)
    if effect.kind == "order":
        lead = effect.strength * value / 2
        both = np.stack([white[0], white[0]])
        return _standard(_slow(both, timing, delay_frames=np.array([-lead, lead])))
    first, free = _standard(_slow(white, timing))
    rho = coupling_of(effect, value)
    second = rho * first + np.sqrt(max(0.0, 1 - rho**2)) * free
    pair = _standard(np.stack([first, second]))
    if effect.kind == "amplitude":
        pair[0] *= 1 + effect.strength * (1 + value) / 2
    return pair


def _states(rng: np.random.Generator, timing: Timing, *, forward: float) -> FloatArray:
    """Two networks' time courses, each high in a state of its own; `forward` is the chance that a change goes forward."""
    shortest, longest = (max(1, round(length / timing.tr_s)) for length in (SHORTEST_STATE_S, LONGEST_STATE_S))
    length = timing.frames + _margin(timing)
    count = -(-(length + longest) // shortest)
    lasts = rng.integers(shortest, longest + 1, count)
    steps = np.where(rng.random(count) < forward, 1, -1)
    state = np.repeat((rng.integers(NUM_STATES) + np.cumsum(steps)) % NUM_STATES, lasts)
    # Not always at the beginning of a state, or the first frames would tell which direction of time is which.
    state = state[rng.integers(longest) :][:length]
    return _standard(_slow(np.stack([state == 0, state == 1]).astype(np.float64), timing))


def _white(rng: np.random.Generator, timing: Timing, count: int) -> FloatArray:
    return rng.standard_normal((count, timing.frames + _margin(timing)))


def _margin(timing: Timing) -> int:
    """Frames that are made beyond the run's, and cut off."""
    return int(np.ceil(MARGIN_S / timing.tr_s)) + int(MAX_STRENGTH["order"])


def _slow(
    white: FloatArray, timing: Timing, *, corner_hz: float = CORNER_HZ, delay_frames: FloatArray | None = None
) -> FloatArray:
    """Noise with the spectrum of BOLD, each row delayed by its own, perhaps broken, number of frames."""
    length = white.shape[1]
    frequency = np.fft.rfftfreq(length)
    hz = frequency / timing.tr_s
    passed = hz / np.hypot(hz, FLOOR_HZ) / np.hypot(1, hz / corner_hz)
    delays = np.zeros(len(white)) if delay_frames is None else delay_frames
    spectrum = np.fft.rfft(white) * passed * np.exp(-2j * np.pi * np.outer(delays, frequency))
    return np.fft.irfft(spectrum, n=length)[:, : timing.frames]


def _standard(courses: FloatArray) -> FloatArray:
    """Mean 0 and SD 1 over the run."""
    centred = courses - courses.mean(axis=1, keepdims=True)
    sd = centred.std(axis=1, keepdims=True)
    return np.asarray(centred / np.where(sd > 0, sd, 1))


def _motion(rng: np.random.Generator, timing: Timing, restlessness: float) -> tuple[FloatArray, FloatArray]:
    """Displacement (x, y, z) in mm, and the share of signal lost by the spins that moved."""
    slow = _slow(_white(rng, timing, 3), timing, corner_hz=MOTION_CORNER_HZ)
    motion = MOTION_SD_MM * restlessness * _standard(slow)
    jolts = np.where(rng.random(timing.frames) < SPIKE_RATE * restlessness, rng.gamma(3.0, 0.4, timing.frames), 0.0)
    direction = rng.normal(0, 0.6, (3, timing.frames))
    echo = _decaying(jolts)
    return motion + direction * jolts, -0.012 * echo


def _decaying(jolts: FloatArray) -> FloatArray:
    """Each jolt followed by its dying echo, over as many frames as it takes to fall under 1 %."""
    length = int(np.ceil(np.log(0.01) / np.log(SPIKE_DECAY)))
    return np.convolve(jolts, SPIKE_DECAY ** np.arange(length))[: len(jolts)]


def _drift(rng: np.random.Generator, timing: Timing) -> FloatArray:
    """Warm-up and slow change: polynomials of low degree with mean 0 over the run."""
    time = np.linspace(-1, 1, timing.frames)
    weights = rng.normal(0, 1, 3) * (1.0, 0.6, 0.3)
    shape = weights[0] * time + weights[1] * time**2 + weights[2] * time**3
    return np.asarray(shape - shape.mean())
