"""What a Slurm job of a conversion looks like: a few fields of a TOML file, checked before anything is submitted."""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fmristream.errors import UsageError

# One run needs some 200 MB (docs/measured.md); the rest is Python, its packages and the page cache that Slurm counts in.
DEFAULT_MEMORY = "2GB"
DEFAULT_WALLTIME = "04:00:00"

# Of its wall time: then a worker leaves by itself and its run is given to another, instead of being lost with the job.
_LIFETIME_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJobs:
    """One job = one worker = one run at a time.

    Attributes:
        queue: partition; Slurm's default where empty.
        account: whom the hours are charged to.
        walltime: of a job, as sbatch takes it; a conversion may last longer, jobs are submitted again.
        memory: of a job, as in "2GB".
        cores: of a job.
        interface: network interface by which workers reach this process, as in "ib0".
        python: interpreter of the workers; this one where empty.
        log_directory: where Slurm writes what the jobs print; the current folder where empty.
        local_directory: scratch of the workers, on the node.
        shared_temp_directory: a folder that all nodes see, for the keys of the encrypted connection; the current one
            where empty.
        job_extra_directives: further lines for `#SBATCH`.
        job_script_prologue: shell lines before the worker starts, as in "module load python".
    """

    queue: str = ""
    account: str = ""
    walltime: str = DEFAULT_WALLTIME
    memory: str = DEFAULT_MEMORY
    cores: int = 1
    interface: str = ""
    python: str = ""
    log_directory: str = ""
    local_directory: str = ""
    shared_temp_directory: str = ""
    job_extra_directives: tuple[str, ...] = ()
    job_script_prologue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        walltime_s(self.walltime)
        if self.cores < 1:
            raise UsageError(f"cores = {self.cores}: a job needs 1 or more")

    @property
    def lifetime_s(self) -> int:
        """After how many seconds a worker leaves by itself."""
        return math.floor(_LIFETIME_SHARE * walltime_s(self.walltime))


def read_slurm_jobs(path: str) -> SlurmJobs:
    """Read a TOML file whose fields are those of `SlurmJobs`.

    Raises:
        UsageError: the file is not there, is no TOML, or holds a field that means nothing here.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--cluster-options {path}: cannot be read: {error}") from error
    return _checked(document, path)


def walltime_s(text: str) -> int:
    """Seconds of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UsageError: it is none of these, or 0.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is not None:
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        if days is not None or len(numbers) == 3:
            hours, minutes, seconds = (*numbers, 0, 0)[:3]
        else:
            hours, minutes, seconds = (0, *numbers, 0)[:3]
        total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        if total > 0:
            return total
    raise UsageError(f"walltime = {text!r}: expected a time limit as sbatch takes it, as in 04:00:00 or 1-12")


def _checked(document: Mapping[str, Any], path: str) -> SlurmJobs:
    kinds = {field.name: type(field.default) for field in fields(SlurmJobs)}
    values: dict[str, Any] = {}
    for name, value in document.items():
        if name not in kinds:
            raise UsageError(f"--cluster-options {path}: unknown field {name!r}; known are {', '.join(kinds)}")
        if kinds[name] is tuple:
            good = isinstance(value, list) and all(isinstance(line, str) for line in value)
            value = tuple(value) if good else value
        else:
            good = type(value) is kinds[name]
        if not good:
            wanted = {tuple: "a list of strings", str: "a string", int: "a whole number"}[kinds[name]]
            raise UsageError(f"--cluster-options {path}: {name} = {value!r}; expected {wanted}")
        values[name] = value
    return SlurmJobs(**values)
