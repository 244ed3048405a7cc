"""Clips out of other loaders' own formats, each iterated in its process as its documentation says."""

import json
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from tools.stream_peers.cases import Case, Stream
from tools.stream_peers.data import Facts, Sample


def webdataset(facts: Facts, case: Case) -> Stream:
    """Tars in their order; decoded by webdataset."""
    import webdataset as wds

    count = len(list((facts.path / "webdataset").glob("*.tar")))
    urls = [f"{facts.where('webdataset')}/{number:04d}.tar" for number in range(count)]

    def stream(number: int) -> Iterator[Sample]:
        shards = urls[number % count :] + urls[: number % count]
        for sample in wds.WebDataset(shards, shardshuffle=False).decode().repeat():
            about = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
            yield about["run"], about["start"], sample["npy"]

    return stream


def mosaic_streaming() -> ModuleType:
    """MosaicML's package; it imports torchvision for images, whose builds do not fit CPU builds of torch.

    They want two operators that only the other builds have; nobody calls them here, so their names are enough.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    return import_module("streaming")


_KEPT: list[Any] = []  # what a library defines goes when it goes


def mosaic(facts: Facts, case: Case) -> Stream:
    """MosaicML's StreamingDataset, shuffled."""
    streaming: Any = mosaic_streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset: Any = streaming.StreamingDataset(local=str(facts.path / "mosaic"), remote=None, shuffle=True, batch_size=1)

    def stream(number: int) -> Iterator[Sample]:
        while True:
            for sample in dataset:
                yield int(sample["run"]), int(sample["start"]), sample["bold"]

    return stream


def litdata(facts: Facts, case: Case) -> Stream:
    """LitData's StreamingDataset, shuffled. It hands out its mapped file: copied, as everybody copies who delivers."""
    from litdata import StreamingDataset

    dataset: Any = StreamingDataset(str(facts.path / "litdata"), shuffle=True)
    ring = np.empty((facts.window, *facts.shape), dtype=np.float16)

    def stream(number: int) -> Iterator[Sample]:
        while True:
            for sample in dataset:
                values = sample["bold"]
                if case.variant == "reused":
                    np.copyto(ring, values)
                yield int(sample["run"]), int(sample["start"]), ring if case.variant == "reused" else values.copy()

    return stream
