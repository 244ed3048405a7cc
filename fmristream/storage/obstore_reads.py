"""Ranges by obstore, a client in Rust: two thirds of the processor time of the others, where it is installed and has keys."""

import asyncio
import os
import re
from datetime import timedelta
from typing import Any

from fmristream.errors import MissingExtraError, ObjectMissingError, StorageError, UsageError
from fmristream.storage.async_reads import AsyncReads, Versions
from fmristream.storage.filesystem import event_loop
from fmristream.storage.retry import AgainError
from fmristream.storage.store import access_refused
from fmristream.storage.urls import scheme_of

# `obstore` or `fsspec`: which client fetches frames. Not set: obstore for s3:// where it is installed and the environment
# has keys or says that there are none; it knows nothing of profiles, single sign-on and what else AWS's own client reads.
CLIENT_VARIABLE = "FMRISTREAM_CLIENT"

_KEYS = ("AWS_ACCESS_KEY_ID",)
_UNSIGNED = ("yes", "true", "on", "1")

# What S3 answers with status 400 where credentials are no good any more; obstore tells these from no other bad request.
_EXPIRED = re.compile("<Code>(ExpiredToken|InvalidToken|TokenRefreshRequired|RequestExpired)</Code>")


def obstore_reads(url: str, name: str) -> AsyncReads | None:
    """Reads of a store by obstore; None where it is not to be used.

    Raises:
        UsageError: the variable says something else.
        MissingExtraError: it asks for obstore, which is not installed.
    """
    chosen = os.environ.get(CLIENT_VARIABLE, "")
    if chosen not in ("", "obstore", "fsspec"):
        raise UsageError(f"{CLIENT_VARIABLE}={chosen}: expected obstore or fsspec")
    is_unsigned = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in _UNSIGNED
    has_keys = scheme_of(url) == "s3" and (is_unsigned or all(os.environ.get(key) for key in _KEYS))
    if chosen == "fsspec" or not (chosen or has_keys):
        return None
    try:
        return ObstoreReads(url, name, is_unsigned=is_unsigned)
    except ImportError as error:
        if not chosen:
            return None
        raise MissingExtraError(
            f"{name}: {CLIENT_VARIABLE}=obstore, which is not installed; pip install 'fmristream[obstore]'"
        ) from error


class ObstoreReads:
    """One attempt each; who asks tries again. Headers of errors, so Retry-After, do not come through obstore."""

    retries = False

    def __init__(self, url: str, name: str, *, is_unsigned: bool) -> None:
        import obstore
        from obstore.store import from_url

        self._obstore = obstore
        self._name = name
        self._versions = Versions(name)
        endpoint = next(filter(None, map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))), "")
        options: dict[str, Any] = {
            "client_options": {"allow_http": endpoint.startswith("http://")},
            "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        }
        if scheme_of(url) == "s3":
            options |= {"skip_signature": is_unsigned, **({"endpoint": endpoint} if endpoint else {})}
        try:
            self._store = from_url(f"{scheme_of(url)}://{url.partition('://')[2]}", **options)
        except obstore.exceptions.BaseError as error:
            raise StorageError(f"{name}: obstore could not be set up ({type(error).__name__})") from error

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return event_loop()

    async def read(self, key: str, start: int, stop: int) -> memoryview:
        errors = self._obstore.exceptions
        try:
            answer = await self._obstore.get_async(self._store, key, options={"range": (start, stop)})
            self._versions.require_same(key, str(answer.meta["e_tag"] or ""), int(answer.meta["size"]))
            data = await answer.bytes_async()
        except (FileNotFoundError, errors.NotFoundError) as error:
            raise ObjectMissingError(
                f"{self._name}/{key}: there is no such object; check the URL, or restore the object from a copy"
            ) from error
        except (PermissionError, errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise access_refused(f"{self._name}/{key}", "the credentials do not allow it") from error
        except errors.BaseError as error:  # its text may hold the URL
            if expired := _EXPIRED.search(str(error)):
                raise access_refused(f"{self._name}/{key}", expired[1]) from error
            raise AgainError(f"obstore says {type(error).__name__}") from error
        if tuple(answer.range) != (start, stop) or len(data) != stop - start:
            raise AgainError(f"bytes {start} to {stop} were asked for and {len(data)} came, from {answer.range[0]} on")
        return memoryview(data)  # its own memory: nothing is copied
