"""Tar shards of `convert --format webdataset` in a webdataset pipeline: samples and batches, nothing unpickled."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.shards.digest import sha256
from fmristream.signal.grid import Shape3, stored_order
from fmristream.storage import join_url, open_store
from fmristream.stream.batch import Batch

# What report.tar_plan writes.
FORMAT, VERSION = "fmristream-webdataset", 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TarPart:
    """One folder of finished tar shards. Picklable: pipelines send its methods to worker processes.

    Attributes:
        urls: of its tars, for `webdataset.WebDataset`.
        mask: (x, y, z), the voxels of packed samples.
        is_packed: whether samples are (t, v); else (t, x, y, z).
        grid: of placed samples, or of the mask.
        samples: in all tars.
    """

    urls: tuple[str, ...]
    mask: NDArray[np.bool_]
    is_packed: bool
    grid: Shape3
    samples: int

    def decode(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """`bold` float32, what its JSON says, and its `key`; for `WebDataset(...).map(part.decode)`.

        Raises:
            CorruptDataError: the members are not those of a sample of this part.
        """
        key = str(sample.get("__key__", "?"))
        try:
            record = json.loads(sample["json"])
            bold = read_npy(sample["bold.npy"])
        except (KeyError, ValueError) as error:
            raise CorruptDataError(f"sample {key}: no bold.npy and json of fmristream's tar shards: {error}") from error
        expected = (int(self.mask.sum()),) if self.is_packed else self.grid
        if bold.shape[1:] != expected:
            raise CorruptDataError(
                f"sample {key}: frames of {bold.shape[1:]}, expected {expected}: another folder's shard"
            )
        if "slope" in record:  # raw stored values
            with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
                bold = (bold.astype(np.float64) * record["slope"] + record["inter"]).astype(np.float32)
            record["fill"] = 0.0
        return {**record, "bold": bold, "key": key}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of decoded samples; for `.batched(n, collation_fn=part.collate)`.

        `window`, `sample` and `position` of such a batch are -1: the order is the pipeline's, and nobody can resume it.
        """
        count = len(samples)
        values = torch.from_numpy(np.stack([sample["bold"] for sample in samples])[:, None])
        numbers = [
            name for name in samples[0]["targets"] if not any(isinstance(s["targets"][name], str) for s in samples)
        ]
        return Batch(
            packed=values if self.is_packed else None,
            placed=None if self.is_packed else values,
            positions=torch.from_numpy(stored_order(self.mask)),
            grid=self.grid,
            fill=torch.tensor([[_number(sample["fill"])] for sample in samples]),
            valid=torch.ones(count, dtype=torch.bool),
            window=torch.full((count,), -1),
            start=torch.tensor([int(sample["start"]) for sample in samples]),
            subject=[str(sample["subject"]) for sample in samples],
            run=[str(sample["run"]) for sample in samples],
            targets={name: torch.tensor([_number(s["targets"][name]) for s in samples]) for name in numbers},
            global_size=count,
            position=-1,
        )


def tar_part(url: str, part: str) -> TarPart:
    """A part of the tar shards in a folder, as their index tells.

    Args:
        url: folder, or any URL that datasets are read from.
        part: `train`, `val`, `test` or `unsplit`.

    Raises:
        FormatError: no finished shards, or those of a newer release.
        UsageError: there is no such part.
        CorruptDataError: the mask is not the one of the index.
    """
    store = open_store(url)
    index = json.loads(store.read("index.json"))
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise FormatError(f"{store.name}: index.json is not of fmristream's tar shards, version {VERSION}")
    if part not in index["parts"]:
        raise UsageError(f"{store.name}: no part {part!r}; there are {', '.join(index['parts'])}")
    found = index["parts"][part]
    data = store.read(found["mask"]["key"])
    if sha256(data) != found["mask"]["sha256"]:
        raise CorruptDataError(f"{store.name}/{found['mask']['key']}: not the mask that was written with these shards")
    mask = read_npy(data).astype(bool)
    options = index["options"]
    is_packed = options["arrays"] == "packed"
    size = mask.shape if is_packed else options["grid"] or mask.shape
    return TarPart(
        urls=tuple(join_url(url, shard["key"]) for shard in found["shards"]),
        mask=mask,
        is_packed=is_packed,
        grid=(int(size[0]), int(size[1]), int(size[2])),
        samples=int(found["samples"]),
    )


def read_npy(data: bytes) -> NDArray[Any]:
    """The array of a .npy file; objects, which would be unpickled, are refused.

    Raises:
        ValueError: it is none, or of another length than it says.
    """
    stream = io.BytesIO(data)
    if npy.read_magic(stream) != (1, 0):
        raise ValueError("a .npy file of another version than 1.0")
    shape, is_fortran, dtype = npy.read_array_header_1_0(stream)
    if dtype.hasobject or is_fortran:
        raise ValueError(f"an array of {dtype} in {'Fortran' if is_fortran else 'C'} order")
    if len(data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data) - stream.tell()} bytes of values for a shape of {shape}")
    return np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
