"""The loops that numpy would make several passes of: compiled by numba, cached on disk, one thread each, without the GIL."""

from typing import Any

import numba
import numpy as np

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")
# Sums in whatever order makes vector code: only where their last bits enter nothing that is compared.
_jit_any_order = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})


# Voxels that are worked on at a time: what several loops over them touch stays in the first-level cache.
BLOCK = 4096
# Accumulators over a frame of floats: sums that do not depend on each other are added side by side, in a fixed order.
LANES = 512


@_jit
def gather(planes: Any, columns: Any, values: Any) -> None:
    """values[number + k] = planes[z + k, place]; planes is (z, x*y) with x fastest, `grid.masked_columns` has the rest."""
    for c in range(columns.shape[0]):
        place, z, number, length = columns[c, 0], columns[c, 1], columns[c, 2], columns[c, 3]
        for k in range(length):
            values[number + k] = planes[z + k, place]


@_jit
def measure_small_integers(
    values: Any, reference: Any, residual: Any, sums: Any, squares: Any,
    recent_sums: Any, recent_squares: Any, used: Any, background: Any,
) -> Any:  # fmt: skip
    """8- and 16-bit integers, exactly: (background count, low and high of the others, least and most difference).

    Args:
        values: (v,) stored.
        reference: (v,) stored dtype.
        residual: (v,) written, wrapping.
        sums: (v,) int64 differences of all frames but the recent ones.
        squares: (v,) int64, see sums.
        recent_sums: (v,) int32 differences of recent frames: half the memory traffic of int64.
        recent_squares: (v,) uint32, see recent_sums.
        used: (blocks,) uint64, how far recent sums can have grown at most; moved on to int64 before they overflow.
        background: int32 value that does not count for low and high; outside the dtype where there is none.
    """
    backgrounds = np.int64(0)
    # Beyond 16 bits; with the ends of int32 in their place LLVM makes no vector code.
    low = np.int32(2**30)
    high = np.int32(-(2**30))
    least = np.int32(0)
    most = np.int32(0)
    # Several short loops, because each of them becomes vector code and one that does all of it does not.
    for block in range(used.size):
        start = block * BLOCK
        stop = min(start + BLOCK, values.size)
        here, references, residuals = values[start:stop], reference[start:stop], residual[start:stop]
        down = np.int32(0)
        up = np.int32(0)
        for j in range(here.size):
            difference = np.int32(np.int32(here[j]) - np.int32(references[j]))
            residuals[j] = difference
            down = min(down, difference)
            up = max(up, difference)
        least, most = min(least, down), max(most, up)
        zeros = np.int32(0)
        for j in range(here.size):
            zeros = np.int32(zeros + np.int32(np.int32(here[j]) == background))
        backgrounds += zeros
        for j in range(here.size):
            value = np.int32(here[j])
            lower = np.int32(2**30) if value == background else value
            higher = np.int32(-(2**30)) if value == background else value
            low = lower if lower < low else low
            high = higher if higher > high else high
        peak = np.uint64(max(np.int64(up), -np.int64(down)))
        growth = max(peak * peak, np.uint64(2) * peak)  # of a sum of squares below 2^32, and of a sum below 2^31
        if used[block] + growth > np.uint64(2**32 - 1):
            _carry(recent_sums[start:stop], sums[start:stop])
            _carry(recent_squares[start:stop], squares[start:stop])
            used[block] = 0
        used[block] += growth
        some_sums, some_squares = recent_sums[start:stop], recent_squares[start:stop]
        for j in range(here.size):
            difference = np.int32(np.int32(here[j]) - np.int32(references[j]))
            some_sums[j] += difference
            some_squares[j] += np.uint32(difference) * np.uint32(difference)
    return backgrounds, low, high, least, most


@_jit
def _carry(recent: Any, totals: Any) -> None:
    for v in range(recent.size):
        totals[v] += recent[v]
        recent[v] = 0


@_jit
def measure_large_integers(
    values: Any, reference: Any, residual: Any, sums: Any, squares: Any,
    background: Any, has_background: bool, shift: float, largest: int,
) -> Any:  # fmt: skip
    """32- and 64-bit integers: residuals wrap in the dtype, sums are float64."""
    count = np.int64(0)
    total = 0.0
    total_squares = 0.0
    low = np.inf
    high = -np.inf
    wraps: Any = False
    for v in range(values.size):
        wrapped = values[v] - reference[v]
        residual[v] = wrapped
        # Subtracted as integers: float64 would lose small differences of large 64-bit values.
        signed = np.int64(wrapped)
        difference = np.float64(signed)
        if values[v] >= reference[v] and signed < 0:
            difference += 2.0**64
            wraps = True
        elif values[v] < reference[v] and signed >= 0:
            difference -= 2.0**64
            wraps = True
        wraps = wraps or signed > largest or signed < -largest - 1
        value = np.float64(values[v])
        sums[v] += difference
        squares[v] += difference * difference
        if not (has_background and values[v] == background):
            count += 1
            total += value - shift
            total_squares += (value - shift) * (value - shift)
            low = min(low, value)
            high = max(high, value)
    return count, total, total_squares, low, high, wraps


@_jit
def measure_floats(
    values: Any, shift: Any, sums: Any, squares: Any, missing: Any,
    totals: Any, total_squares: Any, lows: Any, highs: Any, background: Any, centre: float,
) -> Any:  # fmt: skip
    """Floats, finite values only: (foreground count, not finite count); sums in float64.

    Args:
        values: (v,) stored.
        shift: (v,) what is subtracted before summing, against cancellation.
        sums: (v,) float64 differences.
        squares: (v,) float64.
        missing: (v,) int64 frames in which the value is not finite.
        totals: (LANES,) float64 of value - centre over the foreground.
        total_squares: (LANES,) float64, see totals.
        lows: (LANES,) stored dtype, of the foreground.
        highs: (LANES,) see lows.
        background: the value that is no foreground; NaN where there is none.
        centre: a constant near the mean.
    """
    count = np.int64(0)
    nonfinite = np.int64(0)
    for start in range(0, values.size, LANES):
        stop = min(start + LANES, values.size)
        here, shifts, some_sums, some_squares = (
            values[start:stop],
            shift[start:stop],
            sums[start:stop],
            squares[start:stop],
        )
        odd = np.int32(0)
        for j in range(here.size):
            odd += np.int32((here[j] - here[j]) != 0)
        if odd == 0:
            for j in range(here.size):
                difference = np.float64(here[j]) - shifts[j]
                some_sums[j] += difference
                some_squares[j] += difference * difference
            inside = np.int32(0)
            for j in range(here.size):
                is_inside = here[j] != background
                centred = np.float64(here[j]) - centre if is_inside else 0.0
                totals[j] += centred
                total_squares[j] += centred * centred
                inside += np.int32(is_inside)
            count += inside
            for j in range(here.size):
                is_inside = here[j] != background
                lows[j] = here[j] if is_inside and here[j] < lows[j] else lows[j]
                highs[j] = here[j] if is_inside and here[j] > highs[j] else highs[j]
            continue
        nonfinite += odd
        for j in range(here.size):
            if (here[j] - here[j]) != 0:
                missing[start + j] += 1
                continue
            difference = np.float64(here[j]) - shifts[j]
            some_sums[j] += difference
            some_squares[j] += difference * difference
            if here[j] != background:
                centred = np.float64(here[j]) - centre
                totals[j] += centred
                total_squares[j] += centred * centred
                count += 1
                lows[j] = min(lows[j], here[j])
                highs[j] = max(highs[j], here[j])
    return count, nonfinite


@_jit
def normalize_voxelwise(frames: Any, delta: Any, inverse_sd: Any, packed: Any) -> None:
    """packed[t, v] = (frames[t, v] - delta[v]) x inverse_sd[v]; not finite -> 0."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            z = (frames[t, v] - delta[v]) * inverse_sd[v]
            packed[t, v] = z if np.isfinite(z) else 0.0


@_jit
def normalize_globally(
    frames: Any, scale: float, offset: float, background: Any, has_background: bool, fill: float, packed: Any
) -> None:
    """packed[t, v] = frames[t, v] x scale + offset; the background value and what is not finite -> fill."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            z = np.float64(frames[t, v]) * scale + offset
            if not np.isfinite(z) or (has_background and frames[t, v] == background):
                packed[t, v] = fill
            else:
                packed[t, v] = z


@_jit
def add_reference(residual: Any, reference: Any, values: Any) -> None:
    """values[t, v] = residual[t, v] + reference[v], wrapping in the dtype they share."""
    for t in range(values.shape[0]):
        for v in range(values.shape[1]):
            values[t, v] = residual[t, v] + reference[v]


@_jit
def place(packed: Any, positions: Any, grid: Any) -> None:
    """grid[t, positions[v]] = packed[t, v] where the position is not negative; grid is (t, x*y*z)."""
    for t in range(packed.shape[0]):
        for v in range(packed.shape[1]):
            position = positions[v]
            if position >= 0:
                grid[t, position] = packed[t, v]


@_jit
def parcel_means(values: Any, indptr: Any, voxels: Any, weights: Any, means: Any) -> None:
    """means[p] = weighted mean of the finite values of parcel p, summed in float64; NaN where there is none.

    Args:
        values: (v,) stored.
        indptr: (p + 1,) int64 where each parcel's voxels begin.
        voxels: (n,) int64 places in values.
        weights: (n,) float32.
        means: (p,) float32, written.
    """
    for parcel in range(means.size):
        total = 0.0
        weight = 0.0
        for k in range(indptr[parcel], indptr[parcel + 1]):
            value = np.float64(values[voxels[k]])
            if value - value == 0:
                total += np.float64(weights[k]) * value
                weight += np.float64(weights[k])
        means[parcel] = total / weight if weight > 0 else np.nan


@_jit_any_order
def block_sums(values: Any, starts: Any, blocks: Any, sums: Any) -> None:
    """sums[b] += the finite values of block b; of these sums only signs and ratios are kept.

    Args:
        values: (v,) stored.
        starts: (n + 1,) int32: stretches of voxels, none longer than BLOCK.
        blocks: (n,) int32: which block each stretch lies in.
        sums: (b,) float32, added to.
    """
    for n in range(blocks.size):
        here = values[starts[n] : starts[n + 1]]
        total = 0.0
        for j in range(here.size):
            value = np.float64(here[j])
            total += value if value - value == 0 else 0.0
        sums[blocks[n]] += total


@_jit
def block_sums_of_small_integers(values: Any, starts: Any, blocks: Any, sums: Any) -> None:
    """The same of 8- and 16-bit integers, in half the time: BLOCK of them fit into 32 bits."""
    for n in range(blocks.size):
        here = values[starts[n] : starts[n + 1]]
        total = np.int32(0)
        for j in range(here.size):
            total = np.int32(total + np.int32(here[j]))
        sums[blocks[n]] += total


@_jit
def quantize(
    values: Any, step: Any, offset: Any, sd: Any, bound: float, background: Any, has_background: bool,
    largest: int, escape: int, codes: Any, decoded: Any, escaped: Any,
) -> Any:  # fmt: skip
    """One frame as codes: (number of escapes, largest error, sum of squared errors, a voxel that cannot be held or -1).

    Errors are in temporal SDs.

    Args:
        values: (v,) of the source.
        step: (v,) float32; 0 where every value is the offset.
        offset: (v,) of the decoded dtype.
        sd: (v,) float64.
        bound: error that is allowed, in SDs; none where the SD is 0.
        background: a value that must stay what it is, and that nothing else may become, in the decoded dtype.
        has_background: whether there is one.
        largest: largest code, and smallest with the other sign.
        escape: the code that says that the value stands elsewhere.
        codes: (v,) written.
        decoded: (v,) written: what a reader gets.
        escaped: (v,) uint32, its beginning written: voxels that are not held by their codes, rising.
    """
    count = 0
    worst = 0.0
    total = 0.0
    wrong = -1
    for v in range(values.size):
        value = np.float64(values[v])
        by = np.float64(step[v])
        start = np.float64(offset[v])
        code: Any = 0
        if by > 0:
            place = np.rint((value - start) / by)
            code = np.int64(place) if abs(place) <= largest else largest + 1
        decoded[v] = np.float64(code) * by + start
        relative = _error(np.float64(decoded[v]), value, sd[v])
        fits = relative <= bound
        if has_background:
            fits = fits and (decoded[v] == background) == (value == background)
        if code > largest or not fits:
            code = escape
            decoded[v] = value if value == value else np.nan  # one NaN for all
            escaped[count] = v
            count += 1
            relative = _error(np.float64(decoded[v]), value, sd[v])
            if relative > bound:
                wrong = v
        codes[v] = code
        worst = max(worst, relative)
        total += relative * relative
    return count, worst, total, wrong


@_jit
def _error(found: float, value: float, sd: float) -> float:
    """The difference in SDs; 0 between one NaN and another, or equal infinities; infinite where nothing is allowed."""
    if found == value or (found != found and value != value):
        return 0.0
    error = abs(found - value) / sd if sd > 0 else np.inf
    return error if error == error else np.inf


@_jit
def dequantize(codes: Any, step: Any, offset: Any, values: Any) -> None:
    """values[v] = codes[v] x step[v] + offset[v]: the product is exact in double precision, sum and result are rounded."""
    for v in range(values.size):
        values[v] = np.float64(codes[v]) * np.float64(step[v]) + np.float64(offset[v])


@_jit
def _spread(at: Any, shape: Any, first: Any, share: float, box: Any) -> Any:
    """Add the weights of linear interpolation at one point to a box of source voxels; False outside the field of view."""
    for i in range(3):
        nearest = np.floor(at[i] + 0.5)
        if abs(at[i] - nearest) < 1e-7:  # rounding must not put what lies on a voxel beside it
            at[i] = nearest
        if at[i] < -0.5 - 1e-7 or at[i] > shape[i] - 0.5 + 1e-7:
            return False
        at[i] = min(max(at[i], 0.0), shape[i] - 1.0)  # the outer half of the outermost voxels has their own value
    for corner in range(8):
        weight = share
        for i in range(3):
            rest = at[i] - np.floor(at[i])
            weight *= rest if (corner >> i) & 1 else 1.0 - rest
        if weight > 0.0:
            i = np.int64(np.floor(at[0])) + (corner & 1) - first[0]
            j = np.int64(np.floor(at[1])) + ((corner >> 1) & 1) - first[1]
            k = np.int64(np.floor(at[2])) + ((corner >> 2) & 1) - first[2]
            box[i, j, k] += weight
    return True


@_jit
def _unload(box: Any, first: Any, shape: Any, start: int, places: Any, weights: Any, is_filling: bool) -> Any:
    """Write what a box holds from `start` on, if that is wanted, and empty it: how many weights there were."""
    count = np.int64(0)
    for k in range(box.shape[2]):
        for j in range(box.shape[1]):
            for i in range(box.shape[0]):
                if box[i, j, k] > 0.0:
                    if is_filling:
                        places[start + count] = (first[0] + i) + shape[0] * ((first[1] + j) + shape[1] * (first[2] + k))
                        weights[start + count] = box[i, j, k]
                    count += 1
                    box[i, j, k] = 0.0
    return count


@_jit
def _sample(index: Any, matrix: Any, shape: Any, points: Any, at: Any, first: Any, box: Any) -> None:
    """Fill the box of one target voxel."""
    share = 1.0 / (points[0] * points[1] * points[2])
    for c in range(points[2]):
        for b in range(points[1]):
            for a in range(points[0]):
                x = index[0] + ((a + 0.5) / points[0] - 0.5)
                y = index[1] + ((b + 0.5) / points[1] - 0.5)
                z = index[2] + ((c + 0.5) / points[2] - 0.5)
                for i in range(3):
                    at[i] = matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] * z + matrix[i, 3]
                _spread(at, shape, first, share, box)


@_jit
def sparse_weights(
    matrix: Any, shape: Any, size: Any, points: Any, starts: Any, places: Any, weights: Any, is_filling: bool
) -> None:
    """Weights of linear interpolation, averaged over points spread evenly over each target voxel.

    Args:
        matrix: (3, 4) float64, target voxel index to source voxel index.
        shape: (3,) int64 of the source.
        size: (3,) int64 of the target.
        points: (3,) int64 per axis of a target voxel.
        starts: (t + 1,) int64: counts are written to starts[t + 1]; where filling, their sums are read.
        places: (k,) uint32 positions in a Fortran-ordered source, written where filling.
        weights: (k,) float32, likewise.
        is_filling: the second of two passes.
    """
    extents = np.abs(matrix[:, 0]) + np.abs(matrix[:, 1]) + np.abs(matrix[:, 2])  # of a target voxel in source voxels
    reach = np.ceil(extents).astype(np.int64) + 3
    box = np.zeros((reach[0], reach[1], reach[2]))
    index, at, first = np.empty(3), np.empty(3), np.empty(3, dtype=np.int64)
    for target in range(size[0] * size[1] * size[2]):
        index[0] = target % size[0]
        index[1] = (target // size[0]) % size[1]
        index[2] = target // (size[0] * size[1])
        is_near = True
        for i in range(3):
            centre = matrix[i, 0] * index[0] + matrix[i, 1] * index[1] + matrix[i, 2] * index[2] + matrix[i, 3]
            first[i] = np.int64(np.floor(centre - extents[i] / 2)) - 1
            is_near = is_near and -extents[i] - 1 < centre and centre < shape[i] + extents[i]
        if is_near:
            _sample(index, matrix, shape, points, at, first, box)
        count = _unload(box, first, shape, starts[target], places, weights, is_filling) if is_near else 0
        if not is_filling:
            starts[target + 1] = count


@_jit
def apply_sparse(volume: Any, starts: Any, places: Any, weights: Any, slope: float, inter: float, out: Any) -> None:
    """out[t] = sum of weights x (volume x slope + inter) over the places of t, in double precision."""
    for t in range(out.size):
        total = 0.0
        for k in range(starts[t], starts[t + 1]):
            total += np.float64(weights[k]) * (np.float64(volume[places[k]]) * slope + inter)
        out[t] = total


@_jit
def add_weighted(values: Any, weight: float, sums: Any) -> None:
    """Add weight x values to sums."""
    for v in range(sums.size):
        sums[v] += weight * values[v]


@_jit
def scale(values: Any, slope: float, inter: float, out: Any) -> None:
    """Values x slope + inter, in double precision."""
    for v in range(out.size):
        out[v] = np.float64(values[v]) * slope + inter
