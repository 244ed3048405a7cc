"""An interrupt (Ctrl-C in a notebook, a handler of SIGTERM that raises) loses no batch and damages none, wherever it comes."""

import sys
from itertools import islice

import torch

from fmristream.stream import loader as loader_module
from fmristream.stream.batch import Batch
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader

BATCHES = 8
# Parts of the loader that run in the caller's thread.
PARTS = ("_next", "_begin_planning", "_finish_planning")


class InterruptAt:
    """Raises KeyboardInterrupt before a line of the loader's own parts, counted from the start; where Python would."""

    def __init__(self, line: int, parts=PARTS) -> None:
        self.left, self.parts = line, parts

    def __call__(self, frame, event, arg):
        code = frame.f_code
        is_part = code.co_filename == loader_module.__file__ and code.co_name in self.parts
        return self._line if is_part else None

    def _line(self, frame, event, arg):
        # The last line hands out: what comes behind it is the caller's.
        if event == "line" and not (frame.f_code.co_name == "_next" and _is_last(frame)):
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def _is_last(frame) -> bool:
    lines = sorted({line for *_, line in frame.f_code.co_lines() if line is not None})
    return frame.f_lineno == lines[-1]


def told(batch: Batch) -> tuple[list[int], torch.Tensor]:
    return batch.sample.tolist(), batch.packed.clone()


def interrupted(clips: StreamingDataset, line: int) -> tuple[list, bool]:
    """(batches of a loop that was interrupted at a line and taken up again, whether the line was reached)."""
    with StreamingLoader(clips, batch_size=4, prefetch_batches=1) as loader:
        found, tracer = [], InterruptAt(line)
        sys.settrace(tracer)
        try:
            for batch in loader.forever():
                found.append(told(batch))
                if len(found) == BATCHES // 2:
                    break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert loader.state_dict()["consumed"] == 4 * len(found)
        found += [told(batch) for batch in islice(loader.forever(), BATCHES - len(found))]
        return found, tracer.left <= 0


def test_an_interrupt_anywhere_loses_and_damages_no_batch(cohort_url):
    clips = StreamingDataset(cohort_url, window=7, seed=3)
    with StreamingLoader(clips, batch_size=4) as loader:
        expected = [told(batch) for batch in islice(loader.forever(), BATCHES)]
    lines, is_reached = range(1, 2000), 0
    for line in lines:
        found, was_reached = interrupted(clips, line)
        assert [samples for samples, _ in found] == [samples for samples, _ in expected], f"line {line}"
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True)), (
            f"line {line}"
        )
        if not was_reached:
            break
        is_reached += 1
    assert is_reached > 20


def test_an_interrupt_amid_a_restart_leaves_a_loader_that_goes_on(cohort_url):
    clips = StreamingDataset(cohort_url, window=7, seed=3)
    with StreamingLoader(clips, batch_size=4) as loader:
        expected = [told(batch)[0] for batch in islice(loader.forever(), BATCHES)]
    is_reached = True
    for line in range(1, 200):
        with StreamingLoader(clips, batch_size=4) as loader:
            found = [told(batch)[0] for batch in islice(loader.forever(), 3)]
            tracer = InterruptAt(line, parts=("_restart",))
            sys.settrace(tracer)
            try:
                loader.load_state_dict(loader.state_dict())
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            found += [told(batch)[0] for batch in islice(loader.forever(), BATCHES - 3)]
            is_reached = tracer.left <= 0
        assert found == expected, line
        if not is_reached:
            break
    assert line > 10
    assert not is_reached


def test_an_interrupt_that_breaks_off_the_restart_after_another_one_loses_no_batch(cohort_url):
    clips = StreamingDataset(cohort_url, window=7, seed=3)
    with StreamingLoader(clips, batch_size=4) as loader:
        expected = [told(batch)[0] for batch in islice(loader.forever(), BATCHES)]
    with StreamingLoader(clips, batch_size=4) as loader:
        found = [told(batch)[0] for batch in islice(loader.forever(), 3)]
        loader._finish_planning()
        loader._ahead.popleft()  # the next batch was taken, and never handed out
        found += [told(batch)[0] for batch in islice(loader.forever(), BATCHES - 3)]
    assert found == expected
