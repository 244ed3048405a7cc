"""Two hundred damaged sources in one collection: none is accepted silently, every reason names its file, the rest converts."""

import json
import subprocess
import sys
from collections import Counter

import pytest

import fmristream
from fmristream.ingest.sources.listing import without_suffix
from tests.ingest.cohorts import bold, contents, convert, stored_bytes_of, write_runs
from tests.ingest.damage import HOSTILE, KINDS, corpus


@pytest.mark.parametrize(
    ("count", "seed"), [(len(KINDS), 1), *(pytest.param(200, seed, marks=pytest.mark.full) for seed in (2, 3))]
)
def test_no_damaged_source_is_accepted_silently_and_the_others_finish(tmp_path, count, seed):
    damaged = corpus(tmp_path / "in", seed=seed, count=count)
    healthy = {f"sub-healthy{n}_bold": bold(seed=n) for n in range(3)}
    write_runs(tmp_path / "in", healthy)
    report = convert(str(tmp_path / "in"), str(tmp_path / "out"))
    assert report.exit_code == 3
    found = contents(str(tmp_path / "out"))
    reasons = {one.name: one.reason for one in report.quarantined}
    assert {name: found[name] for name in healthy} == {
        name: stored_bytes_of(stored) for name, stored in healthy.items()
    }
    accepted: Counter[str] = Counter()
    for one in damaged:
        name = without_suffix(one.name)
        if name in found:
            accepted[one.kind] += 1
            assert one.verdict != "refused", one
            assert found[name] == stored_bytes_of(one.stored), one
        else:
            assert one.verdict != "valid", reasons
            reason = reasons[name if name in reasons else one.name]
            assert reason.startswith(f"{one.name}: "), reason
            assert len(reason) > len(one.name) + 10
    assert len(found) + len(reasons) == count + len(healthy)
    assert all(accepted[kind] for kind, (verdict, _, _) in KINDS.items() if verdict == "valid")
    skipped = {name for name, _ in fmristream.open(str(tmp_path / "out")).skipped}
    assert skipped == set(reasons)
    print(f"{count} sources, {len(reasons)} quarantined, accepted {dict(accepted)}")


@pytest.mark.parametrize("count", [len(KINDS), pytest.param(200, marks=pytest.mark.full)])
def test_bombs_and_lies_are_refused_before_memory_is_asked_for(tmp_path, count):
    hostile = [one for one in corpus(tmp_path / "in", seed=4, count=count) if one.kind.startswith(HOSTILE)]
    write_runs(tmp_path, {"healthy": bold()})
    paths = [str(tmp_path / "in" / one.name) for one in hostile]
    command = [sys.executable, "-m", "tests.ingest.measured_refusals", str(tmp_path / "healthy.nii.gz"), *paths]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout)
    slowest, largest = max(one["seconds"] for one in found), max(one["growth_mib"] for one in found)
    print(f"{len(found)} refused, slowest {slowest:.3f} s, at most {largest:.1f} MiB more")  # shown with -s
    assert [one["name"] for one in found if not one["reason"].startswith(one["name"])] == []
    assert largest <= 64
