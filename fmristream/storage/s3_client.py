"""The S3 client: retries in one place for each kind of failure, and every wait with an end.

s3fs retries what botocore has retried, and some calls once more around that: up to 125 attempts of one request, an hour
of silence against a server that accepts and never answers. Here botocore retries calls, s3fs only bodies that break off,
and what either gave up on is final.
"""

import asyncio
import errno
import os
from typing import Any

import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    NoAuthTokenError,
    NoCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from fsspec.asyn import sync_wrapper
from s3fs.core import _error_wrapper
from s3fs.errors import translate_boto_error

# Of one call, with waits of 0.5, 1, 2 and 4 s on average between them: where 1 of 20 answers is an error 3 calls in
# 10 million fail, where 1 of 5 is, 3 in 10,000. "standard" also stops retrying for a while when most of all calls fail.
CALL_ATTEMPTS = 5

# Of a body that breaks off or stalls, each with a call of its own.
BODY_ATTEMPTS = 4

# Without a byte: a part of 8 MiB is taken and answered within that even by a server across 4 Mbit/s.
SILENCE_S = 20
CONNECT_S = 10

# For the whole of a body that never falls silent and never ends: slower than this no training and no conversion is.
SLOWEST_BYTES_PER_S = 64 * 2**10
LONGEST_S = 900

# Credentials that are no good any more, which some servers say with status 400.
_EXPIRED = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired"})
_REFUSED = frozenset({401, 403})

# Nothing to sign with: a profile's login has ended, a role's keys cannot be had.
_NO_LOGIN = (CredentialRetrievalError, NoAuthTokenError, SSOError, TokenRetrievalError)

# What arrived there was not what was sent.
_DAMAGED_ON_THE_WAY = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"})


class S3Client(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs with bounded retries; errors are OSErrors whose cause is the client's own."""

    connect_timeout = CONNECT_S
    read_timeout = SILENCE_S
    retries = BODY_ATTEMPTS

    async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(arguments.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *options, **arguments)
        for attempts_left in reversed(range(CALL_ATTEMPTS)):
            try:
                return await call(**arguments)
            except ClientError as error:
                code = error.response["Error"].get("Code")
                if code in _DAMAGED_ON_THE_WAY and attempts_left:
                    continue
                said = error.response["Error"].get("Message") or f"{code}, status {status_of(error)}"
                if code in _EXPIRED or status_of(error) in _REFUSED:
                    raise PermissionError(said if code in (None, "403") else f"{said} ({code})") from error
                raise translate_boto_error(error, message=said) from error
            except ResponseParserError as error:  # a page of whatever stands between
                if not attempts_left:
                    raise OSError(errno.EIO, "the answer is not one of S3") from error
            except HTTPClientError as error:  # botocore has tried often enough; s3fs would begin again
                raise OSError(errno.EIO, str(error)) from error
            except NoCredentialsError as error:
                raise OSError(errno.EACCES, f"{error}; for a public bucket set AWS_NO_SIGN_REQUEST=YES") from error
            except _NO_LOGIN as error:
                raise OSError(errno.EACCES, str(error)) from error
        raise AssertionError("the last attempt returns or raises")

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(self, path: str, *, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        for attempts_left in reversed(range(BODY_ATTEMPTS)):
            whole = super()._cat_file(path, start=start, end=end, **options)
            try:
                return bytes(await asyncio.wait_for(whole, timeout=_limit_s(start, end)))
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, "the answer did not come to its end in time") from error
            except FlexibleChecksumError as error:  # of whole objects, where the server keeps checksums
                if not attempts_left:
                    raise OSError(errno.EIO, f"damaged on the way or on the server: {error}") from error
            except HTTPClientError as error:
                raise OSError(errno.EIO, str(error)) from error
        raise AssertionError("the last attempt returns or raises")

    cat_file = sync_wrapper(_cat_file)

    async def _read_range(self, path: str, start: int, stop: int) -> tuple[bytes, str, str]:
        """Bytes [start, stop), the object's ETag, and the range that the server says it gave ("" where it gave all)."""
        bucket, key, _ = self.split_path(path)

        async def call() -> tuple[bytes, str, str]:
            wanted = f"bytes={start}-{stop - 1}"
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted)
            body = answer["Body"]
            try:
                data = await body.read()
            finally:
                body.close()
            return data, answer.get("ETag", ""), answer.get("ContentRange", "")

        # As s3fs reads objects: what breaks off in the body is called again, what `_call_s3` gave up on is not.
        whole = _error_wrapper(call, retries=BODY_ATTEMPTS)
        try:
            return await asyncio.wait_for(whole, timeout=_limit_s(start, stop))
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, "the answer did not come to its end in time") from error
        except HTTPClientError as error:
            raise OSError(errno.EIO, str(error)) from error


def client_options() -> dict[str, Any]:
    """Arguments of `S3Client`, beside those of every file system."""
    # What people set for all their AWS clients (AWS_MAX_ATTEMPTS, or `max_attempts` of the profile) holds here too.
    try:
        chosen = Session().get_config_variable("max_attempts")
    except BotoCoreError as error:  # a profile that is not there
        raise OSError(errno.EINVAL, str(error)) from error
    return {
        # As GDAL and others have it: public buckets, for people without keys.
        "anon": os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("yes", "true", "on", "1"),
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": chosen or CALL_ATTEMPTS}},
        "default_cache_type": "none",
        # s3fs asks for the size of whatever it might read in parallel pieces: twice the requests for all small objects.
        "max_concurrency": 1,
    }


def status_of(error: BaseException | None) -> int:
    """HTTP status of an answer that was an error, here or in its cause; 0 where there was no answer."""
    while error is not None:
        if isinstance(error, ClientError):
            return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _limit_s(start: int | None, end: int | None) -> float:
    """How long a read may take with all its attempts."""
    if end is None or end < 0:
        return LONGEST_S
    shortest = BODY_ATTEMPTS * (SILENCE_S + CONNECT_S)
    return min(LONGEST_S, shortest + (end - max(start or 0, 0)) / SLOWEST_BYTES_PER_S)
