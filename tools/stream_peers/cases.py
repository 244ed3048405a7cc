"""Every way that is measured: what it is called, who does it, what it delivers, and what is not equal about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from tools.stream_peers.data import Facts, Sample

Stream = Callable[[int], Iterator[Sample]]  # of one round, by its number; opened anew, without end
Peer = Callable[[Facts, "Case"], Stream]

MASKED, PLACED = "masked", "placed"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to read windows.

    Attributes:
        name: in tables.
        peer: `module:function` in this package.
        output: `masked` (t, v), `placed` (t, x, y, z), or what the peer has instead.
        layout: that it reads, for its size and for making it.
        variant: which of several ways of the same peer.
        threads: that the reader may use; it is pinned to so many CPUs.
        in_flight: windows asked for at the same time, of remote cases; 0 where a loader decides by what it measures.
        environment: where it runs; "" for the one of this project.
        note: what is not equal.
    """

    name: str
    peer: str
    output: str = PLACED
    layout: str = ""
    variant: str = ""
    threads: int = 1
    in_flight: int = 1
    environment: str = ""
    note: str = ""

    def open(self, facts: Facts) -> Stream:
        """The reader, made once."""
        module, _, function = self.peer.partition(":")
        peer: Peer = getattr(import_module(f"tools.stream_peers.{module}"), function)
        return peer(facts, self)


CLIPS = "clips at fixed starts, z-scored when they were written"
WRITTEN = "z-scored when it was written"


def _ours(codec: str, output: str, threads: int) -> Case:
    name = f"ours {codec} {output}, {threads} thread{'s' if threads > 1 else ''}"
    note = "lossy" if codec == "int8" else ""
    return Case(
        name=name, peer="ours:ours", output=output, layout=f"ours-{codec}", variant=codec, threads=threads, note=note
    )


def _same(name: str, peer: str, *, output: str = MASKED, variant: str = "", environment: str = "") -> Case:
    return Case(
        name=f"{name}, {output}",
        peer=f"same_layout:{peer}",
        output=output,
        layout="ours-lossless",
        variant=variant,
        environment=environment,
    )


LOCAL = (
    Case(name="memcpy masked", peer="ceilings:memcpy", output=MASKED, note="ceiling"),
    Case(name="memcpy placed", peer="ceilings:memcpy", note="ceiling"),
    Case(name="pread + decode", peer="ceilings:decode", output=MASKED, layout="ours-lossless", note="ceiling, no crc"),
    Case(
        name="pread + crc + decode",
        peer="ceilings:decode",
        output=MASKED,
        layout="ours-lossless",
        variant="crc",
        note="ceiling",
    ),
    *(
        _ours(codec, output, threads)
        for codec in ("lossless", "raw", "int8")
        for output in (MASKED, PLACED)
        for threads in (1, 2)
    ),
    _same("ours by tensorstore + torch", "tensorstore"),
    _same("ours by tensorstore + our kernels", "tensorstore", variant="kernels"),
    _same("ours by tensorstore + our kernels", "tensorstore", variant="kernels", output=PLACED),
    _same("ours by zarr-python + torch", "zarr_python"),
    _same("ours by zarr-python + our kernels", "zarr_python", variant="kernels"),
    _same("ours by zarrs + numpy", "zarr_python", variant="zarrs", environment="zarrs"),
    Case(
        name="SwiFT .pt verbatim", peer="published:swift", layout="swift", variant="verbatim", note=f"{WRITTEN}; t fast"
    ),
    Case(name="SwiFT .pt stacked", peer="published:swift", layout="swift", variant="stacked", note=WRITTEN),
    Case(name="SwiFT .pt reused buffer", peer="published:swift", layout="swift", variant="reused", note=WRITTEN),
    Case(
        name="TFF .pt, two copies",
        peer="published:tff",
        output="TFF",
        layout="tff",
        note=f"{WRITTEN}; 2 channels fp32, cropped; t fast",
    ),
    Case(name="nibabel .nii.gz", peer="published:nibabel_gz", layout="nifti"),
    Case(name="nibabel .nii mmapped", peer="published:nibabel_mmap", layout="nifti"),
    Case(name="indexed_gzip .nii.gz", peer="published:indexed_gzip", layout="nifti", environment="indexed_gzip"),
    Case(name="fp16 .npy mmap, copied", peer="published:npy", layout="npy", variant="fresh", note=WRITTEN),
    Case(name="fp16 .npy mmap, reused buffer", peer="published:npy", layout="npy", variant="reused", note=WRITTEN),
    Case(name="webdataset", peer="loaders:webdataset", layout="webdataset", note=f"{CLIPS}; in stored order"),
    Case(name="MosaicML streaming", peer="loaders:mosaic", layout="mosaic", environment="mosaic", note=CLIPS),
    Case(name="LitData, cloned", peer="loaders:litdata", layout="litdata", environment="litdata", note=CLIPS),
    Case(
        name="LitData, reused buffer",
        peer="loaders:litdata",
        layout="litdata",
        variant="reused",
        environment="litdata",
        note=CLIPS,
    ),
    Case(name="zarr-python, default chunks", peer="published:zarr_default", layout="zarr-default"),
    Case(
        name="zarrs, default chunks",
        peer="published:zarr_default",
        layout="zarr-default",
        variant="zarrs",
        environment="zarrs",
    ),
)


def _remote(name: str, peer: str, layout: str, in_flight: int, *, output: str = MASKED, note: str = "") -> Case:
    return Case(
        name=f"{name}, {in_flight} in flight" if in_flight else f"{name}, as it decides",
        peer=peer if ":" in peer else f"remote:{peer}",
        output=output,
        layout=layout,
        in_flight=in_flight,
        threads=2,  # both CPUs, which it shares with the server
        note=note,
    )


REMOTE = (
    *(_remote("ours", "ours", "ours-lossless", number) for number in (1, 8, 16, 32, 0)),
    *(_remote("ours by tensorstore + our kernels", "tensorstore", "ours-lossless", number) for number in (1, 16)),
    *(_remote("ours by zarr-python + our kernels", "zarr_python", "ours-lossless", number) for number in (1, 8)),
    _remote("ours by fsspec + our kernels", "fsspec_sync", "ours-lossless", 1),
    _remote("SwiFT .pt by fsspec", "swift", "swift", 1, output=PLACED, note=f"20 objects at once; {WRITTEN}"),
    _remote(
        "webdataset", "loaders:webdataset", "webdataset", 1, output=PLACED, note=f"{CLIPS}; one stream, in stored order"
    ),
)
