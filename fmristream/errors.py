"""What can go wrong for a user, as one tree.

FmriStreamError
├── UsageError            an argument, filter or option that makes no sense (also a ValueError)
├── MissingExtraError     a feature whose optional package is not installed (also an ImportError)
├── SourceError           an input that cannot be converted; the run is quarantined with this text
├── StorageError          the store failed, or cannot do what is needed (also an OSError)
│   ├── ObjectMissingError    an object that the dataset names is not there (also a FileNotFoundError)
│   ├── ObjectExistsError     an object that is written once is there already (also a FileExistsError)
│   ├── AccessError           the store lets nobody in with these credentials, or not any more (also a PermissionError)
│   └── ConflictError         another writer committed a version first
├── EngineError           the processes or machines that do the work died, cannot be reached, or differ from this one
├── CorruptDataError      stored bytes are not what was written: checksum, length or digest differ
├── FormatError           not an fmristream dataset, or one that needs a newer reader
├── SplitError            a split with an empty part, or a subject in two parts
├── SpaceError            runs that share no space were about to be mixed
└── ResumeError           a saved state does not belong to this dataset, window or selection

Every message is one sentence: what, where, expected, got, what to do.
"""


class FmriStreamError(Exception):
    """Base of every error that fmristream raises on purpose."""


class UsageError(FmriStreamError, ValueError):
    """An argument, filter or option that makes no sense."""


class MissingExtraError(FmriStreamError, ImportError):
    """A feature whose optional package is not installed."""


class SourceError(FmriStreamError):
    """An input that cannot be converted."""


class StorageError(FmriStreamError, OSError):
    """The store failed, or cannot do what is needed."""


class ObjectMissingError(StorageError, FileNotFoundError):
    """An object that the dataset names is not there."""


class ObjectExistsError(StorageError, FileExistsError):
    """An object that is written once is there already."""


class AccessError(StorageError, PermissionError):
    """The store refuses access: credentials are missing, wrong or expired. Trying again changes nothing."""


class ConflictError(StorageError):
    """Another writer committed a version first."""


class EngineError(FmriStreamError):
    """The processes or machines that do the work died, cannot be reached, or differ from this one."""


class CorruptDataError(FmriStreamError):
    """Stored bytes are not what was written."""


class FormatError(FmriStreamError):
    """Not an fmristream dataset, or one that needs a newer reader."""


class SplitError(FmriStreamError):
    """A split with an empty part, or a subject in two parts."""


class SpaceError(FmriStreamError):
    """Runs that share no space were about to be mixed."""


class ResumeError(FmriStreamError):
    """A saved state does not belong to this dataset, window or selection."""
