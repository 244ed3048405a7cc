"""`python -m train RECIPE` and `torchrun -m train RECIPE`."""

import os
import sys
from typing import NoReturn

from train.main import main


def leave(status: int) -> NoReturn:
    """End the process; one of several ranks ends without the interpreter's own teardown.

    Everything is written and the group is left by now. A thread of torch that drops a tensor later waits for Python's lock,
    which an interpreter that ends never gives: the process would abort, and torchrun call a finished run a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


if __name__ == "__main__":
    leave(main())
