"""Is a dataset whole, does it agree with itself, and is it what its source says? Each question costs more than the last."""

from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError
from fmristream.ingest.pseudonyms import pseudonymised, read_key, require_same_key
from fmristream.ingest.sources import EntityFilter, Listing, find_runs
from fmristream.report.against import compare_with_sources
from fmristream.report.deep import check_all_deeply
from fmristream.report.findings import Findings, ProgressCallback, VerifyProgress, VerifyReport
from fmristream.report.layout import check_layouts
from fmristream.report.objects import check_objects, check_objects_of_runs, objects_of_generation
from fmristream.report.threads import Counter
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import HINT, hinted_number, newest_generation
from fmristream.storage import open_store


def verify(
    url: str,
    *,
    deep: bool = False,
    against: str | None = None,
    space: str | None = None,
    subject_pattern: str | None = None,
    kind: str | None = None,
    entities: EntityFilter | None = None,
    cifti: bool = False,
    pseudonyms: str | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check the newest version of a dataset.

    Always: every object that it names is there with its size and digest; tables, index blocks, shards and zarr.json
    agree.

    Args:
        url: the dataset.
        deep: also decode every chunk, compute digests and statistics again, and read a sample through zarr-python.
        against: also compare every stored value with this source (folder, file, glob or `synth://`), read by nibabel.
        space: as it was given to the conversion, where it chose among the source's runs.
        subject_pattern: likewise.
        kind: likewise.
        entities: likewise.
        cifti: likewise.
        pseudonyms: path of the key file, where the dataset's subjects have pseudonyms.
        progress: called as work proceeds.

    Raises:
        FormatError: there is no dataset, or it needs a newer reader.
        UsageError: the source holds no runs, or the key is not the one that the dataset was made with.
        StorageError: the store failed; nothing can be said.
    """
    listing = (
        None
        if against is None
        else find_runs(against, space=space, subject_pattern=subject_pattern, kind=kind, entities=entities, cifti=cifti)
    )
    found = Findings()
    dataset = _opened(url, found)
    if dataset is not None and listing is not None:
        key = None if pseudonyms is None else read_key(pseudonyms, target=url)
        require_same_key(dataset.generation.document, key, url)
        listing = listing if key is None else pseudonymised(listing, key)
    if dataset is not None:
        _check(dataset, listing, found, deep=deep, progress=progress)
    return VerifyReport(
        url=url,
        content_digest=dataset.generation.document["content_digest"] if dataset else "",
        generation_digest=dataset.generation_digest if dataset else "",
        deep=deep,
        against=against or "",
        runs=0 if dataset is None or found.tables_damaged else len(dataset.runs),
        **found.counts(),
        faults=tuple(found.faults),
    )


def _opened(url: str, found: Findings) -> Dataset | None:
    store = open_store(url)
    try:
        dataset = Dataset(url, store, newest_generation(store))
    except CorruptDataError as error:
        found.fault(str(error))
        return None
    if hinted_number(store) == 0:
        found.fault("the hint is missing or damaged; restore it from a copy", key=HINT)
    return dataset


def _check(
    dataset: Dataset, listing: Listing | None, found: Findings, *, deep: bool, progress: ProgressCallback | None
) -> None:
    of_generation = list(objects_of_generation(dataset.generation))
    counter = _counter("checking tables", sum(one.bytes for one in of_generation), "bytes", progress)
    found.merge(check_objects(dataset.store, of_generation, counter))
    _read_tables(dataset, found)
    if found.tables_damaged:  # they say what else there is
        return
    stored = sum(table.stored()[0] for table in dataset.array_tables)
    found.merge(check_objects_of_runs(dataset, _counter("checking objects", stored, "bytes", progress)))
    counter = _counter("checking indexes", len(dataset.runs), "runs", progress)
    found.merge(check_layouts(dataset, found.damaged(), counter))
    frames = int(dataset.runs.numbers("frames").sum())
    if deep:
        found.merge(check_all_deeply(dataset, _counter("decoding", frames, "frames", progress)))
    if listing is not None:
        counter = _counter("comparing with the source", frames, "frames", progress)
        found.merge(compare_with_sources(dataset, listing, counter))


def _read_tables(dataset: Dataset, found: Findings) -> None:
    """Load every table; the dataset keeps them."""
    try:
        with_arrays = sum(table.runs for table in dataset.array_tables)
        rows = (len(dataset.runs), with_arrays, len(dataset.participants), len(dataset.skipped))
        told = dataset.generation.document
        segments = sum(segment["runs"]["rows"] for segment in told["segments"])
        expected = (
            segments,
            segments,
            *(told[name]["rows"] if told[name] else 0 for name in ("participants", "skipped")),
        )
        if rows != expected:
            found.fault(
                f"its tables hold {rows} runs, runs with arrays, participants and skipped inputs, not {expected}"
            )
        assert dataset.content_digest  # raises where it is not the recorded one
    except (CorruptDataError, ObjectMissingError, FormatError) as error:
        found.tables_damaged = True
        if not any(key in str(error) for key in found.damaged()):
            found.fault(str(error))


def _counter(stage: str, total: int, unit: str, progress: ProgressCallback | None) -> Counter:
    def tell(done: int) -> None:
        if progress is not None:
            progress(VerifyProgress(stage=stage, done=done, total=total, unit=unit))

    tell(0)
    return Counter(tell)
