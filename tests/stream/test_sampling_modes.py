"""Every way to choose clips, through the loader: what comes is what was asked for, the same on any world, and resumable."""

import json
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import fmristream
from fmristream import Locality, Mixture, StreamingDataset, StreamingLoader
from fmristream.errors import ResumeError, SpaceError, SplitError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.sampling.deal import Schedule, World
from tests.stream.test_selection import FILES, TABLE, bold, convert_folder
from tests.stream.worlds import in_step, loaders

BATCH = 6
MODES = {
    "phase": {"random_phase": True, "stride": 5},
    "dilated": {"step": 3, "window": 5},
    "same-run": {"views": "same-run", "random_phase": True},
    "same-subject": {"views": "same-subject", "where": "sex == 'F' or age > 30"},
    "subjects": {"weights": "subject", "locality": 2},
    "sexes": {"weights": "column:sex", "random_phase": True},
    "local": {"locality": Locality(windows=3, visits=2), "stride": 2},
}


def clips_of(url: str, **options) -> StreamingDataset:
    return StreamingDataset(url, **{"window": 7, "split": "train", "seed": 11, **options})


def planned(clips, batches: int, *, world: int = 1, start: int = 0, batch_size: int = BATCH) -> list[list[tuple]]:
    """What each global batch would hold, without reading it: (run, first frame, step, window) of each row by view."""
    plan = Schedule(order=clips.order, batch_size=batch_size)
    found = []
    for position in range(start, start + batches * batch_size, batch_size):
        shares = [clips.rows(plan.batch(position, World(rank=rank, size=world))) for rank in range(world)]
        rows = [
            row
            for view in range(clips.views)
            for share in shares
            for row in share[view * len(share) // clips.views : (view + 1) * len(share) // clips.views]
        ]
        found.append([(row.source, row.run.name, row.clip.start, row.clip.step, row.number) for row in rows])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_global_batches_are_the_same_on_any_world_and_from_any_beginning(cohort_url, mode):
    clips = clips_of(cohort_url, **MODES[mode])
    expected = planned(clips, 20)
    for world in (2, 3, 6):
        assert planned(clips, 20, world=world) == expected
    assert planned(clips, 13, world=4, start=7 * BATCH) == expected[7:]


@pytest.mark.parametrize("mode", MODES)
def test_what_the_loader_hands_out_are_the_frames_of_the_plan(cohort_url, mode):
    clips = clips_of(cohort_url, normalize="none", **MODES[mode])
    expected = planned(clips, 2)
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        for rows, batch in zip(expected, loader, strict=False):
            assert len(batch) == len(rows) == BATCH * clips.views
            assert batch.views == clips.views
            for row, (_, run, start, step, number) in enumerate(rows):
                assert (batch.run[row], int(batch.start[row]), int(batch.window[row])) == (run, start, number)
                stop = start + (clips.window - 1) * step + 1
                stored = clips.dataset.read(run, start, stop, packed=True)[::step]
                assert torch.equal(batch.packed[row, 0], torch.from_numpy(stored))


@pytest.mark.parametrize("mode", ["same-subject", "subjects"])
def test_a_state_goes_on_exactly_on_another_world_and_batch_size(cohort_url, mode):
    clips = clips_of(cohort_url, **MODES[mode])
    with ExitStack() as stack:
        ranks = loaders(stack, clips, world=2, batch_size=BATCH)
        for _, _batches in zip(range(3), in_step(ranks), strict=False):
            pass
        state = json.loads(json.dumps(ranks[0].state_dict()))
    expected = planned(clips, 2, start=state["consumed"], batch_size=8)
    with StreamingLoader(clips_of(cohort_url, **MODES[mode]), batch_size=8) as loader:
        loader.load_state_dict(state)
        found = [batch.window.tolist() for _, batch in zip(range(2), loader, strict=False)]
    assert found == [[row[-1] for row in rows] for rows in expected]


def test_shifted_windows_come_once_an_epoch_each_and_begin_elsewhere_in_the_next(cohort_url):
    clips = clips_of(cohort_url, random_phase=True, stride=5)
    rows = [row for batch in planned(clips, 2 * clips.num_windows // BATCH + 2) for row in batch]
    epochs = [rows[: clips.num_windows], rows[clips.num_windows : 2 * clips.num_windows]]
    for epoch in epochs:
        assert Counter(row[-1] for row in epoch) == Counter(range(clips.num_windows))
    starts = [{row[-1]: row[2] for row in epoch} for epoch in epochs]
    assert starts[0] != starts[1]
    plain = clips_of(cohort_url, stride=5)
    assert all(0 <= starts[0][n] - plain.locate(n)[1] < 5 for n in range(clips.num_windows))


@pytest.mark.parametrize("mode", ["same-run", "same-subject"])
def test_two_views_are_of_one_run_or_subject_and_share_no_frame(cohort_url, mode):
    clips = clips_of(cohort_url, **{**MODES[mode], "where": None})
    crossed = 0
    for batch in planned(clips, 16):
        for (_, run, start, *_), (_, other, second, *_) in zip(batch[:BATCH], batch[BATCH:], strict=True):
            assert clips.dataset.run(run).subject == clips.dataset.run(other).subject
            assert run != other or abs(start - second) >= 7
            crossed += run != other
    assert (crossed > 0) == (mode == "same-subject")


def test_balanced_subjects_and_classes_get_equal_shares(cohort_url):
    clips = clips_of(cohort_url, weights="column:sex", where="sex is not missing", split=None)
    sexes = {row["subject"]: row["sex"] for row in clips.dataset.participants}
    assert len(set(Counter(sexes.values()).values())) >= 1
    drawn = clips.rows(clips.order.draws_at(0, clips.order.samples))
    shares = Counter(sexes[row.run.subject] for row in drawn)
    assert max(shares.values()) - min(shares.values()) <= 1


def test_a_filter_chooses_runs_by_what_is_known_of_their_subjects(cohort_url):
    dataset = fmristream.open(cohort_url)
    people = {row["subject"]: row for row in dataset.participants}
    expected = [run.name for run in dataset.runs if people[run.subject]["age"] > 40 and run.split == "train"]
    for clips in (
        StreamingDataset(cohort_url, window=7, where="age > 40 and split == 'train'"),
        StreamingDataset(dataset.where("age > 40"), window=7, split="train"),
        StreamingDataset(dataset.where("split == 'train'").where("age > 40"), window=7),
    ):
        assert clips.runs.column("name") == expected
        assert clips.content_digest == dataset.content_digest
    assert clips[0]["run"] == expected[0]
    everything = StreamingDataset(cohort_url, window=7)
    assert clips.selection_digest != everything.selection_digest
    with pytest.raises(UsageError, match=r"no run where age > 900"):
        StreamingDataset(cohort_url, where="age > 900")


def test_a_view_of_a_dataset_reads_its_runs_and_keeps_to_them_in_another_process(cohort_url):
    import pickle

    view = pickle.loads(pickle.dumps(fmristream.open(cohort_url).where("run == '2'")))
    assert {run.run for run in view.runs} == {"2"}
    assert len(view.all_runs) == 2 * len(view.runs)
    last = len(view.runs) - 1
    assert np.array_equal(view.read(last, 3, 5), fmristream.open(cohort_url).read(view.runs[last].name, 3, 5))
    outside = next(run for run in view.all_runs if run.run == "1")
    assert np.array_equal(view.read(outside, 3, 5), fmristream.open(cohort_url).read(outside.name, 3, 5))
    with pytest.raises(UsageError, match="no run is called"):
        view.run(next(name for name in view.all_runs.column("name") if name not in view.runs.column("name")))


def test_a_split_made_on_the_fly_streams_and_its_parts_share_nobody(cohort_url):
    split = fmristream.split(cohort_url, by="subject", fractions=(0.5, 0.25, 0.25), seed=3)
    parts = [
        StreamingDataset(cohort_url, window=7, split=part, seed=1) for part in (split.train, split.val, split.test)
    ]
    subjects = [set(part.subjects) for part in parts]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 8
    assert [len(some) for some in subjects] == [4, 2, 2]
    with pytest.raises(UsageError, match=r"such as SPLIT.train"):
        StreamingDataset(cohort_url, split=split)
    other = fmristream.split(cohort_url, by="subject", fractions=(0.5, 0.25, 0.25), seed=4)
    with pytest.raises(SplitError, match="does not know"):
        StreamingDataset(cohort_url, split=fmristream.split(fmristream.open(cohort_url).where("sex == 'F'")).train)
    assert other.digest != split.digest
    assert "0001" not in repr(split)


def test_whole_runs_come_padded_to_the_longest(tmp_path):
    files = {"sub-a_bold.nii": bold(0), "sub-b_bold.nii": bold(1)}
    url = convert_folder(tmp_path, files, space="MNI")
    frames = fmristream.open(url).runs[0].frames
    clips = StreamingDataset(url, window=None, step=2, normalize="global-zscore")
    assert (clips.num_windows, clips.window) == (2, -(-frames // 2))
    with StreamingLoader(clips, batch_size=3) as loader:
        (batch,) = list(loader)
        assert batch.valid.tolist() == [True, True, False]
        assert batch.lengths.tolist() == [clips.window] * 3
        assert loader.state_dict()["window"] is None
    assert clips[1]["length"] == clips.window


def test_runs_of_several_lengths_say_how_many_frames_are_theirs(tmp_path):
    from tests.ingest.nifti_files import nifti_bytes
    from tests.stream.test_normalization import brain_like

    long, short = brain_like("i2", seed=0), np.asfortranarray(brain_like("i2", seed=1)[..., :9])
    url = convert_folder(
        tmp_path, {"sub-a_bold.nii": nifti_bytes(long), "sub-b_bold.nii": nifti_bytes(short)}, space="MNI"
    )
    clips = StreamingDataset(url, window=None, normalize="none")
    with StreamingLoader(clips, batch_size=2) as loader:
        (batch,) = list(loader)
    assert batch.lengths.tolist() == [long.shape[-1], 9]
    assert torch.equal(batch.packed[1, 0, :9], torch.from_numpy(clips.dataset.read(1, packed=True)))
    assert (batch.packed[1, 0, 9:] == 0).all()


@pytest.mark.parametrize("stats", ["prefix", "context"])
def test_whole_runs_that_leave_nothing_to_predict_are_left_out_and_told(tmp_path, stats):
    from tests.ingest.nifti_files import nifti_bytes
    from tests.stream.test_normalization import brain_like

    frames = {"a": 23, "b": 9, "c": 10, "d": 11}
    files = {
        f"sub-{label}_bold.nii": nifti_bytes(np.asfortranarray(brain_like("i2", seed=count)[..., :count]))
        for label, count in frames.items()
    }
    url = convert_folder(tmp_path, files, space="MNI")
    every = StreamingDataset(url, window=None, stats=stats, context=8)
    assert not every.left_out
    with pytest.warns(UserWarning, match="2 runs no longer than the context"):
        clips = StreamingDataset(url, window=None, stats=stats, context=10)
    assert clips.left_out == {"runs no longer than the context": 2}
    assert [item["length"] for item in (clips[number] for number in range(len(clips)))] == [23, 11]
    assert clips.selection_digest != every.selection_digest == StreamingDataset(url, window=None).selection_digest
    with StreamingLoader(clips, batch_size=2) as loader:
        (batch,) = list(loader)
        assert batch.lengths.tolist() == [23, 11]
    with pytest.raises(UsageError, match="fewer frames than the longest run's"):
        StreamingDataset(url, window=None, stats=stats, context=23)


def test_runs_shorter_than_the_window_are_counted_and_told_once(tmp_path):
    from tests.ingest.nifti_files import nifti_bytes
    from tests.stream.test_normalization import brain_like

    short = nifti_bytes(np.asfortranarray(brain_like("i2", seed=1)[..., :9]))
    url = convert_folder(tmp_path, {"sub-a_bold.nii": bold(0), "sub-b_bold.nii": short}, space="MNI")
    with pytest.warns(UserWarning, match="1 runs shorter than the window") as told:
        clips = StreamingDataset(url, window=10)
    assert len(told) == 1
    assert clips.left_out == {"runs shorter than the window": 1}
    assert not StreamingDataset(url, window=9).left_out


EVENTS = "onset\tduration\ttrial_type\n4.0\t1\tface\n9.1\t1\thouse\n12.9\t1\tface\n40\t1\tface\n"


@pytest.fixture(scope="module")
def events_url(tmp_path_factory) -> str:
    """Three runs of 23 frames of 2 s; the second has other events, the third has none."""
    source = tmp_path_factory.mktemp("events")
    tables = {"a": EVENTS, "b": "onset\tduration\ttrial_type\n1\t1\thouse\n"}
    for seed, label in enumerate("abc"):
        folder = source / "bids" / f"sub-{label}" / "func"
        folder.mkdir(parents=True)
        (folder / f"sub-{label}_task-x_bold.nii").write_bytes(bold(seed))
        (folder / f"sub-{label}_task-x_bold.json").write_text('{"RepetitionTime": 2.0, "TaskName": "x"}')
        if label in tables:
            (folder / f"sub-{label}_task-x_events.tsv").write_text(tables[label])
    (source / "bids" / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    url = str(source / "dataset")
    fmristream.convert(str(source / "bids"), url, options=ConvertOptions(mask="none", split="none", space="MNI"))
    return url


def test_clips_begin_at_the_frame_nearest_to_an_event_and_its_delay(events_url):
    tr_s = fmristream.open(events_url).runs[0].tr_s
    with pytest.warns(UserWarning, match="events whose clip does not fit"):
        clips = StreamingDataset(events_url, window=5, events="trial_type == 'face'", delay_s=5.0)
    expected = [int(np.floor((onset + 5.0) / tr_s + 0.5)) for onset in (4.0, 12.9)]
    assert [clips.locate(number) for number in range(len(clips))] == [(clips.runs[0], start) for start in expected]
    assert clips.left_out == {
        "runs without events": 1,
        "runs without an event of this kind": 1,
        "events whose clip does not fit into their run": 1,
    }
    assert clips[0]["start"] == expected[0]


def test_events_enter_the_digest_and_unknown_columns_of_them_are_refused(events_url):
    with pytest.warns(UserWarning, match="left out of 3 selected runs"):
        digests = {
            StreamingDataset(events_url, window=5, events="trial_type == 'face'", delay_s=delay).selection_digest
            for delay in (0.0, 0.05, 5.0)
        }
    assert len(digests) == 2  # a twentieth of a second later they begin at the same frames
    with pytest.raises(UsageError, match="a column 'trial_typ'; did you mean 'trial_type'"):
        StreamingDataset(events_url, window=5, events="trial_typ == 'face'")


@pytest.fixture(scope="module")
def mixture(cohort_url) -> Mixture:
    return Mixture([(clips_of(cohort_url), 0.7), (clips_of(cohort_url, split="val", seed=2), 0.3)])


def test_a_mixture_keeps_its_shares_in_every_batch_on_any_world(mixture):
    expected = planned(mixture, 12, batch_size=10)
    assert all(sum(row[0] for row in batch) == 3 for batch in expected)
    for world in (2, 5):
        assert planned(mixture, 12, world=world, batch_size=10) == expected
    with StreamingLoader(mixture, batch_size=10) as loader:
        for rows, batch in zip(expected, loader, strict=False):
            assert batch.source.tolist() == [row[0] for row in rows]
            assert batch.run == [row[1] for row in rows]
            parts = {mixture.members[source].runs[0].split for source in batch.source.tolist()}
            assert parts == {"train", "val"}


def test_a_mixture_resumes_and_refuses_other_shares(cohort_url, mixture):
    with StreamingLoader(mixture, batch_size=10) as loader:
        for _, _batch in zip(range(2), loader, strict=False):
            pass
        state = json.loads(json.dumps(loader.state_dict()))
    with StreamingLoader(mixture, batch_size=10) as loader:
        loader.load_state_dict(state)
        found = next(iter(loader)).window.tolist()
    assert found == [row[-1] for row in planned(mixture, 1, start=20, batch_size=10)[0]]
    other = Mixture([(clips, weight) for clips, weight in zip(mixture.members, (0.6, 0.4), strict=True)])
    with StreamingLoader(other, batch_size=10) as loader, pytest.raises(ResumeError, match=r"mixture 7:3.* 3:2"):
        loader.load_state_dict(state)
    other = Mixture([(clips_of(cohort_url, where="age > 30"), 0.7), (mixture.members[1], 0.3)])
    with StreamingLoader(other, batch_size=10) as loader, pytest.raises(ResumeError, match="where of member 0 None"):
        loader.load_state_dict(state)


def test_members_that_do_not_fit_are_refused(cohort_url, tmp_path):
    one = clips_of(cohort_url)
    with pytest.raises(UsageError, match="has window 6, member 0 has 7"):
        Mixture([(one, 1), (clips_of(cohort_url, window=6), 1)])
    with pytest.raises(UsageError, match="has no seed"):
        Mixture([(one, 1), (clips_of(cohort_url, seed=None), 1)])
    other = convert_folder(tmp_path, FILES, table=TABLE, space="MNI")
    with pytest.raises(SpaceError, match="different grids"):
        Mixture([(one, 1), (clips_of(other, split=None), 1)])
    with pytest.raises(UsageError, match="a number above 0"):
        Mixture([(one, 0), (one, 1)])


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"where": "age > 30"}, ("where None", "age > 30")),
        ({"step": 2}, ("stride 7", "13")),
        ({"step": 2, "stride": 7}, ("step None", "2")),
        ({"random_phase": True}, ("random_phase None", "yes")),
        ({"views": "same-run"}, ("views None", "same-run")),
        ({"weights": "subject"}, ("weights None", "subject")),
        ({"locality": 4}, ("locality None", "4 windows")),
        ({"window": None}, ("window 7", "None")),
    ],
)
def test_a_state_of_another_selection_is_refused_with_both_values(cohort_url, changes, shown):
    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH) as loader:
        state = loader.state_dict()
    with (
        StreamingLoader(clips_of(cohort_url, **changes), batch_size=BATCH) as other,
        pytest.raises(ResumeError) as caught,
    ):
        other.load_state_dict(state)
    assert all(text in str(caught.value) for text in shown)


def test_a_state_of_the_first_release_goes_on(cohort_url):
    clips = clips_of(cohort_url)
    old = {"consumed": 12, "seed": 11, "window": 7, "stride": 7, "windows": clips.num_windows, "version": 1}
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        loader.load_state_dict({**old, "selection": clips.selection_digest})
        assert next(iter(loader)).position == 12
        with pytest.raises(ResumeError, match="selection of runs"):
            loader.load_state_dict({**old, "selection": "0" * 64})


def test_epochs_can_be_gone_to_and_the_present_one_is_not_begun_anew(cohort_url):
    clips = clips_of(cohort_url)
    with StreamingLoader(clips, batch_size=10) as loader:
        for epoch in range(3):
            loader.set_epoch(epoch)
            seen = [batch.position for batch in loader]
            assert seen[0] == -(-epoch * clips.num_windows // 10) * 10
        loader.set_epoch(1)
        assert next(iter(loader)).position == -(-clips.num_windows // 10) * 10
        loader.set_epoch(1)
        assert next(iter(loader)).position == -(-clips.num_windows // 10) * 10 + 10
        with pytest.raises(UsageError, match="epoch -1"):
            loader.set_epoch(-1)


def test_batches_without_end_go_from_epoch_to_epoch(cohort_url):
    clips = clips_of(cohort_url)
    with StreamingLoader(clips, batch_size=20) as loader:
        positions = [batch.position for _, batch in zip(range(8), loader.forever(), strict=False)]
    assert positions == list(range(0, 160, 20))
    with StreamingLoader(clips_of(cohort_url, seed=None), batch_size=20) as loader, pytest.raises(UsageError):
        next(loader.forever())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": "same-site"}, "expected 'same-run' or 'same-subject'"),
        ({"seed": None, "random_phase": True}, "give a seed"),
        ({"seed": None, "weights": "subject"}, "give a seed"),
        ({"window": None, "stride": 3}, "have no stride"),
        ({"window": None, "views": "same-run"}, "have no views"),
        ({"events": "onset > 3", "random_phase": True}, "have no random_phase"),
        ({"delay_s": 5.0}, "no events are asked for"),
        ({"weights": "sex"}, "expected 'subject', 'column:NAME'"),
        ({"weights": "column:sexx"}, "did you mean 'sex'"),
        ({"weights": [1.0, 2.0]}, "for each of the 12 runs"),
        ({"locality": 0}, "expected 1 or more each"),
        ({"step": 0}, "step 0"),
        ({"where": "agee > 3"}, "did you mean 'age'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(cohort_url, options, said):
    with pytest.raises(UsageError) as caught:
        clips_of(cohort_url, **options)
    assert said in str(caught.value)


def test_digests_of_the_first_release_are_still_what_they_were(cohort_url):
    """The order of every stream that was begun with it depends on them."""
    from fmristream.shards.digest import sha256_json

    clips = clips_of(cohort_url)
    window = {"length": 7, "stride": 7}
    assert clips.selection_digest == sha256_json({"runs": clips.runs.column("digest"), "window": window})
