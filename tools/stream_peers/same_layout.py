"""Our own layout read by others: they fetch and decode residuals, what follows is theirs or ours."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.stream_peers.cases import Case, Stream
from tools.stream_peers.data import Facts
from tools.stream_peers.published import configure_zarr, randomly

Normalize = Callable[[Any, int], Any]


def normalizer(facts: Facts, case: Case, moments: list[Any]) -> Normalize:
    """Residuals (t, v) of a run as float16 z-scores: with our kernels, with torch, or with numpy where there is no torch."""
    from tools.stream_peers.ours import Normalizer, voxel_scale

    if case.variant == "kernels":
        return Normalizer(facts, moments, case.output)
    scales = [voxel_scale(one) for one in moments]
    if case.environment:
        return lambda residual, run: ((residual - scales[run][0]) * scales[run][1]).astype(np.float16)
    import torch

    torch.set_num_threads(case.threads)
    tensors = [tuple(torch.from_numpy(values) for values in scale) for scale in scales]

    def by_torch(residual: Any, run: int) -> Any:
        delta, inverse = tensors[run]
        return torch.from_numpy(residual).float().sub_(delta).mul_(inverse).half()

    return by_torch


def open_tensorstore(facts: Facts, case: Case, object_name: str, array: str, context: Any) -> Any:
    """One array of a run's group."""
    import tensorstore

    where = f"{facts.where(case.layout)}/{object_name}/{array}/"
    scheme, _, rest = where.partition("://")
    kvstore = (
        {"driver": "http", "base_url": f"{scheme}://{rest.partition('/')[0]}", "path": "/" + rest.partition("/")[2]}
        if rest
        else {"driver": "file", "path": where}
    )
    # A chunk that is missing must be an error, as it is with us.
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    return tensorstore.open(spec, context=context, open=True, read=True).result()


def tensorstore_arrays(facts: Facts, case: Case) -> tuple[list[Any], list[Any]]:
    """(residual of each run, its moments)."""
    import tensorstore

    limit = {"limit": case.threads}
    requests = {"limit": max(case.in_flight, 1) * 2}
    context = tensorstore.Context({"data_copy_concurrency": limit, "http_request_concurrency": requests})
    objects = facts.objects["lossless"]
    moments = [open_tensorstore(facts, case, one, "moments", context).read().result() for one in objects]
    return [open_tensorstore(facts, case, one, "residual", context) for one in objects], moments


def tensorstore(facts: Facts, case: Case) -> Stream:
    """tensorstore, one window at a time."""
    arrays, moments = tensorstore_arrays(facts, case)
    normalize = normalizer(facts, case, moments)
    return randomly(facts, lambda run, start: normalize(arrays[run][start : start + facts.window].read().result(), run))


def zarr_arrays(facts: Facts, case: Case) -> tuple[list[Any], list[Any]]:
    """(residual of each run, its moments) by zarr-python, with zarrs' pipeline where it is wanted."""
    import zarr

    configure_zarr(case)
    groups: list[Any] = [
        zarr.open_group(f"{facts.where(case.layout)}/{name}", mode="r") for name in facts.objects["lossless"]
    ]
    return [group["residual"] for group in groups], [group["moments"][...] for group in groups]


def zarr_python(facts: Facts, case: Case) -> Stream:
    """zarr-python, one window at a time."""
    arrays, moments = zarr_arrays(facts, case)
    normalize = normalizer(facts, case, moments)
    return randomly(facts, lambda run, start: normalize(arrays[run][start : start + facts.window], run))
