"""What windows a network was trained on, in words that a checkpoint holds, and how other data differ from that."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SpaceError
from train.data import parcels_with_voxels

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset

# Edges of voxels, and TRs, that differ by less are the same: headers round them.
_SAME = 0.01


def data_facts(clips: "StreamingDataset", *, frames: int) -> dict[str, Any]:
    """What a network must find again in the data that it is applied to; no subject is named.

    Args:
        clips: the training windows.
        frames: of the longest window of all parts.
    """
    words = clips.state(0).values
    parcels = None if clips.has_grid else parcels_with_voxels(clips)
    centres = None if parcels is None else clips.parcel_centres_mm
    return {
        "grid": list(clips.grid) if clips.has_grid else None,
        "channels": clips.channels,
        "frames": frames,
        "voxels": clips.voxels,
        # Grayordinates are 91,000 places, all of which are there.
        "parcels": None if parcels is None else len(parcels) if len(parcels) == clips.voxels else parcels.tolist(),
        "centres_mm": None if centres is None else np.float32(centres[parcels]).tolist(),
        "orientation": clips.orientation,
        "voxel_sizes_mm": None if clips.voxel_sizes_mm is None else list(clips.voxel_sizes_mm),
        "tr_s": _trs(clips),
        "spaces": sorted(clips.runs.counts("space")),
        "space_digest": clips.runs[0].space_digest,
        "atlases": words.get("atlases", ""),
        "labels": {name: list(labels) for name, labels in clips.target_labels.items()},
    }


def parcel_places(facts: Mapping[str, Any]) -> NDArray[np.int64]:
    """Places in a packed frame of the parcels that the network reads."""
    parcels = facts["parcels"]
    return np.arange(parcels) if isinstance(parcels, int) else np.array(parcels, dtype=np.int64)


def differences(trained: Mapping[str, Any], clips: "StreamingDataset") -> list[str]:
    """What is said of data that the network takes although it was trained on others.

    Raises:
        SpaceError: the network would read something else than it learnt to read.
    """
    now = data_facts(clips, frames=clips.window)
    where = clips.dataset.store.name
    _refuse_other_places(trained, now, where)
    told = []
    if (before := trained["space_digest"]) != now["space_digest"]:
        told.append(
            f"the stored voxels are not those of training ({now['voxels']}, then {trained['voxels']}): what lies outside "
            f"the mask here was signal there, or the other way round (space {now['space_digest'][:12]}, then {before[:12]})"
        )
    if trained["spaces"] != now["spaces"]:
        told.append(f"the space is {_words(now['spaces'])}, that of training {_words(trained['spaces'])}")
    if trained["atlases"] != now["atlases"]:
        told.append("the parcels' weights are not those of training: another mask, or another atlas of as many parcels")
    known, other = trained["tr_s"], now["tr_s"]
    if not known or not other:
        told.append(
            f"TR: {_seconds(other)} here, {_seconds(known)} in training; whether windows last as long is not known"
        )
    elif not all(any(math.isclose(tr, one, rel_tol=_SAME) for one in known) for tr in other):
        told.append(f"TR is {_seconds(other)}, that of training {_seconds(known)}: a window lasts another time")
    return told


def _refuse_other_places(trained: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    for name, what in (("grid", "a grid"), ("channels", "channels"), ("parcels", "parcels with voxels")):
        if trained[name] != now[name]:
            raise SpaceError(
                f"{where}: has {what} of {_short(now[name])}, the network was trained on {_short(trained[name])}; convert the "
                "data onto the grid and mask (or atlas) of training"
            )
    if trained["grid"] is None and trained["parcels"] is not None and trained["voxels"] != now["voxels"]:
        raise SpaceError(
            f"{where}: gives {now['voxels']} values a frame, the network was trained on {trained['voxels']}; use its atlas"
        )
    if trained["grid"] is None:
        return
    if trained["orientation"] != now["orientation"]:
        raise SpaceError(
            f"{where}: its axes run to {now['orientation'] or 'nobody knows where'}, those of training to "
            f"{trained['orientation'] or 'nobody knows where'}; a network would see brains mirrored: convert with known affines"
        )
    sizes, own = trained["voxel_sizes_mm"], now["voxel_sizes_mm"]
    if sizes is not None and own is not None and not np.allclose(sizes, own, rtol=_SAME, atol=0):
        raise SpaceError(
            f"{where}: voxels of {_short(own)} mm, the network was trained on {_short(sizes)} mm; resample the data to those"
        )


def _trs(clips: "StreamingDataset") -> list[float]:
    """The TRs that runs have; empty where one has none that is known."""
    found = {None if tr is None or not math.isfinite(tr) else round(tr, 6) for tr in clips.runs.column("tr_s")}
    return [] if None in found else sorted(tr for tr in found if tr is not None)


def _seconds(values: Iterable[float]) -> str:
    return f"{', '.join(f'{value:g}' for value in values)} s" if values else "not known"


def _words(labels: Iterable[str]) -> str:
    return ", ".join(label or "unknown" for label in labels)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} (places {value[0]} to {value[-1]})"
    return " x ".join(f"{one:g}" for one in value) if isinstance(value, list) else str(value)
