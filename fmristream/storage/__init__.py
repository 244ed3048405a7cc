"""Bytes in and out of local disks and buckets: the only package that imports fsspec.

`open_store(url)` gives a `Store` with the four verbs that a dataset needs (put_new, stream_new, read_range, replace_hint);
`fmristream.storage.sources` reads what is to be converted.
"""

from fmristream.storage.store import NewObject, Store, Unfinished, open_store, put_all
from fmristream.storage.urls import display_url, join_url

__all__ = ["NewObject", "Store", "Unfinished", "display_url", "join_url", "open_store", "put_all"]
