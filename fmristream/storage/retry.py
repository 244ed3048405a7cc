"""How often a request that fails is made again, how long anybody waits for it, and what is said in the end."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fmristream.errors import StorageError
from fmristream.storage.filesystem import client_errors
from fmristream.storage.urls import redacted

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds of one read with all its attempts.

    Where 1 of 5 answers is an error, 8 attempts in a row fail 3 times in a million.

    Attributes:
        attempts: at most.
        attempt_s: of one attempt without its transfer: a server that stalls or trickles is asked anew after that.
        slowest_bytes_per_s: what a transfer is given, beside `attempt_s`.
        deadline_s: of all attempts and the pauses between them, beside what one transfer is given.
        first_pause_s: mean of the first pause; each is drawn at random, so that ranks that failed together do not return
            together, and their mean doubles.
        longest_pause_s: of a pause, also of one that a server asks for by Retry-After.
    """

    attempts: int = 8
    attempt_s: float = 30.0
    slowest_bytes_per_s: float = 256 * 2**10
    deadline_s: float = 120.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 20.0

    def transfer_s(self, count: int) -> float:
        """How long the transfer of so many bytes may take."""
        return count / self.slowest_bytes_per_s


class AgainError(Exception):
    """A failure that may pass; `pause_s` is what the server asked for."""

    def __init__(self, reason: str, *, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause_s = pause_s


async def persistently(
    action: Callable[[], Awaitable[T]],
    *,
    policy: RetryPolicy,
    count: int,
    what: str,
    on_retry: Callable[[], None] = lambda: None,
) -> T:
    """Do it until it succeeds.

    Args:
        action: one attempt; AgainError and client errors are tried again, ours are final.
        policy: bounds.
        count: bytes that are asked for.
        what: names the object, for the error.
        on_retry: called before each attempt but the first.

    Raises:
        StorageError: it failed to the end.
    """
    loop = asyncio.get_running_loop()
    begun, slow_s = loop.time(), policy.transfer_s(count)
    end = begun + policy.deadline_s + slow_s
    pause_s, reason = policy.first_pause_s, ""
    for attempt in range(1, policy.attempts + 1):
        left_s = end - loop.time()
        wanted_s = 0.0
        try:
            return await asyncio.wait_for(action(), min(policy.attempt_s + slow_s, max(left_s, 0.001)))
        except TimeoutError:
            reason = "no whole answer in time"
        except AgainError as error:
            reason, wanted_s = error.reason, error.pause_s
        except (StorageError, FileNotFoundError, PermissionError):
            raise
        except client_errors() as error:
            # The client's own text may hold the URL with its query; its kind says enough.
            reason = redacted(str(error)) if type(error) is OSError else type(error).__name__
        sleep_s = min(max(random.uniform(0.5, 1.5) * pause_s, wanted_s), policy.longest_pause_s)
        if attempt == policy.attempts or loop.time() + sleep_s >= end:
            break
        await asyncio.sleep(sleep_s)
        pause_s *= 2
        on_retry()
    raise StorageError(
        f"{what}: {reason}; given up after {attempt} attempts in {loop.time() - begun:.1f} s, look at the server and the "
        "network, then go on from here"
    )
