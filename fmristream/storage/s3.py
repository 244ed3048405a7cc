"""A dataset in an S3 bucket: names are taken by `If-None-Match: *`, large objects by multipart uploads.

Every object carries a random write id. A retried put of which the first answer was lost meets its own object: the id
tells it from another writer's.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

from fmristream.errors import ObjectExistsError, ObjectMissingError, StorageError
from fmristream.storage.async_reads import AsyncReads, S3Reads
from fmristream.storage.filesystem import PART_BYTES
from fmristream.storage.obstore_reads import obstore_reads
from fmristream.storage.remote import ReadOnlyStore
from fmristream.storage.store import Unfinished, checked_key, translated, whole_range

WRITE_ID = "fmristream-write-id"

# A put that meets another one under way (409) is tried again when that has ended.
_CLAIMS = 5
_CLAIM_WAIT_S = 0.2

_CONFLICT, _TAKEN, _MISSING, _NO_SUCH_RANGE = 409, 412, 404, 416


class S3Store(ReadOnlyStore):
    """A bucket prefix. Costs one request a verb; a streamed object of n parts n + 3."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._bucket, _, self._prefix = self._root.partition("/")

    def put_new(self, key: str, data: bytes) -> None:
        self._put_new(key, data, write_id=secrets.token_hex(16))

    def stream_new(self, key: str) -> "S3NewObject":
        return S3NewObject(self, checked_key(key))

    def replace_hint(self, key: str, data: bytes) -> None:
        self.call("put_object", key, Body=data)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        from fmristream.storage.s3_client import status_of

        if start == stop:
            return b""
        path = self._path(key)
        try:
            data = translated(self.name, key, lambda: bytes(self._fs.cat_file(path, start=start, end=stop)))
        except StorageError as error:
            if status_of(error) != _NO_SUCH_RANGE:
                raise
            data = b""  # it begins behind the end
        return whole_range(data, store=self.name, key=key, start=start, stop=stop)

    def async_reads(self) -> AsyncReads:
        return obstore_reads(self._url, self.name) or S3Reads(self._fs, self._root, self.name)

    def size(self, key: str) -> int:
        return int(self.call("head_object", key)["ContentLength"])

    def list(self, prefix: str) -> list[str]:
        pages = self._pages("list_objects_v2", self._name(prefix), {"ContinuationToken": "NextContinuationToken"})
        return sorted(self._relative(entry["Key"]) for page in pages for entry in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        self.call("delete_object", key)

    def unfinished(self) -> tuple[Unfinished, ...]:
        pages = self._pages(
            "list_multipart_uploads",
            self._prefix,
            {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
        )
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        return tuple(Unfinished(key=self._relative(one["Key"]), upload=one["UploadId"]) for one in uploads)

    def discard_unfinished(self, unfinished: Unfinished) -> None:
        try:
            self.call("abort_multipart_upload", unfinished.key, UploadId=unfinished.upload)
        except ObjectMissingError:  # its writer has completed or discarded it
            return

    def keeps_removed(self) -> bool | None:
        try:
            answer = translated(self.name, "", lambda: self._fs.call_s3("get_bucket_versioning", Bucket=self._bucket))
        except StorageError:  # not everybody who may write may ask, and not every server knows
            return None
        return answer.get("Status") in ("Enabled", "Suspended")  # suspended: what was kept before is kept

    def call(self, method: str, key: str, **arguments: Any) -> Any:
        """One call of the S3 API about one object."""
        name = self._name(key)
        return translated(self.name, key, lambda: self._fs.call_s3(method, Bucket=self._bucket, Key=name, **arguments))

    def claim(self, key: str, write_id: str, action: Callable[[], None]) -> bool:
        """Run what creates an object; False where it has to be done again, because another writer was in the way.

        Raises:
            ObjectExistsError: the object is there, and not by this write.
            StorageError: the store failed.
        """
        from fmristream.storage.s3_client import status_of

        try:
            action()
        except StorageError as error:
            if status_of(error) not in (_CONFLICT, _TAKEN, _MISSING):
                raise
            standing = self._standing(key)
            if standing is not None and standing != write_id:
                raise ObjectExistsError(f"{self.name}/{key}: exists already and is written only once") from error
            if standing is None and status_of(error) == _MISSING:
                raise
            return standing is not None
        return True

    def _put_new(self, key: str, data: bytes, *, write_id: str) -> None:
        def put() -> None:
            self.call("put_object", key, Body=data, IfNoneMatch="*", Metadata={WRITE_ID: write_id})

        for attempt in range(_CLAIMS):
            if self.claim(key, write_id, put):
                return
            time.sleep(_CLAIM_WAIT_S * 2**attempt)
        raise StorageError(
            f"{self.name}/{key}: the server says again and again that others are writing it; run the command again"
        )

    def _standing(self, key: str) -> str | None:
        """Write id of the object that is there, "" if it has none; None where nothing is there."""
        try:
            return str(self.call("head_object", key).get("Metadata", {}).get(WRITE_ID, ""))
        except ObjectMissingError:
            return None

    def _pages(self, method: str, folder: str, markers: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Every page of a listing of what lies below a folder; `markers`: argument that says where to go on, and its source."""
        ask = partial(self._fs.call_s3, method, Bucket=self._bucket, Prefix=f"{folder}/" if folder else "")
        position: dict[str, str] = {}
        while True:
            page = translated(self.name, self._relative(folder), partial(ask, **position))
            yield page
            position = {name: page[following] for name, following in markers.items() if page.get(following)}
            if not page.get("IsTruncated") or not position:
                return

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}".lstrip("/")

    def _relative(self, name: str) -> str:
        return name[len(self._prefix) + 1 :] if self._prefix else name


class S3NewObject:
    """Collects parts of 8 MiB and sends them as they fill; `commit` makes them an object. A small one is put at once."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._write_id = secrets.token_hex(16)
        self._rest = bytearray()
        self._upload = ""
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes | memoryview) -> None:
        self._rest += data
        while len(self._rest) >= PART_BYTES:
            # All parts but the last have one length: some servers demand it.
            self._send(bytes(memoryview(self._rest)[:PART_BYTES]))
            del self._rest[:PART_BYTES]

    def commit(self) -> None:
        if not self._upload:
            self._store._put_new(self._key, bytes(self._rest), write_id=self._write_id)
            return
        if self._rest:
            self._send(bytes(self._rest))
            self._rest.clear()
        # Ceph before release 18 ignores the condition here; streamed objects have random names, so looking is enough there.
        if self._store._standing(self._key) is not None:
            raise ObjectExistsError(f"{self._store.name}/{self._key}: exists already and is written only once")
        is_done = self._store.claim(self._key, self._write_id, self._complete)
        if not is_done:  # the parts are lost with a refused completion
            raise StorageError(f"{self._where}: another writer was at it in this moment; run the command again")
        self._upload = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._rest.clear()
        if not self._upload:
            return
        upload, self._upload = self._upload, ""
        try:
            self._store.discard_unfinished(Unfinished(key=self._key, upload=upload))
        except StorageError:
            if exc[0] is None:  # else what went wrong first is what people have to know; `gc` removes the parts
                raise

    def _send(self, part: bytes) -> None:
        if not self._upload:
            begun = self._store.call("create_multipart_upload", self._key, Metadata={WRITE_ID: self._write_id})
            self._upload = str(begun["UploadId"])
        number = len(self._parts) + 1
        sent = self._of_upload("upload_part", PartNumber=number, Body=part)
        self._parts.append({"ETag": sent["ETag"], "PartNumber": number})

    def _complete(self) -> None:
        self._of_upload("complete_multipart_upload", MultipartUpload={"Parts": self._parts}, IfNoneMatch="*")

    def _of_upload(self, method: str, **arguments: Any) -> Any:
        try:
            return self._store.call(method, self._key, UploadId=self._upload, **arguments)
        except ObjectMissingError as error:
            raise StorageError(
                f"{self._where}: its upload was removed meanwhile, by `fmristream gc` perhaps; run the command again"
            ) from error

    @property
    def _where(self) -> str:
        return f"{self._store.name}/{self._key}"
