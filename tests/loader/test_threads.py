"""One Loader and several threads: batches come in order and whole, or an error says why they cannot."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy

REMEDY = "Make one Loader per thread, .* in a queue"


def make(files, **options):
    defaults = {"batch_size": 4, "size": 64, "dtype": "uint8", "policy": MosaicPolicy(p_mined=1), "context_length": 16}
    return Loader(files.dataset, files.negatives, **{**defaults, **options})


@pytest.fixture(scope="module")
def epochs(files):
    """Plans and pixels of epochs 0 and 1."""
    loader = make(files)
    return [list(loader), list(loader)]


def same(batches, expected):
    return len(batches) == len(expected) and all(
        np.array_equal(one.plan, other.plan) and bool((one.image == other.image).all())
        for one, other in zip(batches, expected, strict=True)
    )


def in_thread(call, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result()


def test_two_threads_that_iterate_lose_nothing_in_silence(files):
    loader, start = make(files), threading.Barrier(2)
    found, errors = [[], []], [[], []]

    def train(index):
        start.wait()
        for _ in range(10):
            try:
                for batch in loader:
                    found[index].append(batch.plan["position"][0])
                    time.sleep(0.001)
            except NemoError as error:
                errors[index].append(str(error))
                return

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(errors) and all("Make one Loader per thread" in text for texts in errors for text in texts)
    for positions, error in zip(found, errors, strict=True):
        steps = np.array(positions) // 4  # whatever a thread saw, it saw in order and from an epoch's beginning
        assert (np.diff(steps)[np.diff(steps) != 1] == -11).all() and (not len(steps) or steps[0] == 0)
        assert error or len(steps) == 120
    last, fresh = list(loader), make(files)
    fresh.set_epoch(loader.epoch - 1)
    assert same(last, list(fresh))


def test_an_older_pass_does_not_go_on_beside_another_threads_newer_one(files, epochs):
    loader = make(files)
    old = iter(loader)
    begun = [next(old), next(old)]
    new = in_thread(iter, loader)
    with pytest.raises(NemoError, match=f"newer pass .* {REMEDY}"):
        next(old)
    assert same(begun, epochs[0][:2])
    assert same(in_thread(list, new), epochs[0])
    assert loader.epoch == 1 and same(list(loader), epochs[1])


def test_a_pass_that_was_given_up_is_begun_anew_in_another_thread(files, epochs):
    loader = make(files)
    for _ in loader:
        break
    assert same(in_thread(list, loader), epochs[0])
    assert same(list(loader), epochs[1])


def test_a_pass_that_ended_in_one_thread_ends_in_silence_beside_a_newer_one(files, epochs):
    loader = make(files)
    passes = iter(loader)
    shown = [next(passes) for _ in range(len(loader))]
    newer = in_thread(iter, loader)
    assert list(passes) == [] and same(shown, epochs[0])
    assert len(in_thread(list, newer)) == 12


def test_a_pass_may_go_from_thread_to_thread(files, epochs):
    loader = make(files)
    passes = iter(loader)
    shown = [next(passes), *(in_thread(next, passes) for _ in range(3)), next(passes)]
    assert same([*shown, *passes], epochs[0])


def test_a_thread_that_prefetches_is_welcome(files, epochs):
    loader = make(files)
    ahead = queue.Queue(3)

    def fetch(passes):
        for batch in passes:
            ahead.put(batch)
        ahead.put(None)

    for epoch in epochs:
        passes = iter(loader)
        thread = threading.Thread(target=fetch, args=(passes,))
        thread.start()
        assert same(list(iter(ahead.get, None)), epoch)
        thread.join()
    assert loader.epoch == 2


@pytest.mark.parametrize("shared", ["a pass", "a Loader"])
def test_two_threads_do_not_wait_at_the_same_time(files, epochs, monkeypatch, shared):
    loader = make(files)
    passes = iter(loader)
    shown = [next(passes)]
    other = passes if shared == "a pass" else iter(loader)
    if shared == "a Loader":
        shown, passes = [], other
    inside, done = threading.Event(), threading.Event()
    step = loader._prefetcher.step

    def slow(*arguments):
        inside.set()
        assert done.wait(60)
        return step(*arguments)

    monkeypatch.setattr(loader._prefetcher, "step", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, passes)
        assert inside.wait(60)
        try:
            with pytest.raises(NemoError, match=f"Another thread is waiting .* {REMEDY}"):
                next(other)
        finally:
            done.set()
        shown.append(waiting.result())
    monkeypatch.undo()
    assert same([*shown, *passes], epochs[0])


def test_a_new_pass_waits_for_the_last_step_of_one_that_was_given_up(files, epochs, monkeypatch):
    loader = make(files)
    passes, inside = iter(loader), threading.Event()
    step = loader._prefetcher.step

    def slow(*arguments):
        inside.set()
        time.sleep(0.3)
        return step(*arguments)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(loader._prefetcher, "step", slow)
        waiting = pool.submit(next, passes)
        assert inside.wait(60)
        patch.setattr("nemo_dali.loader._position.PATIENCE_S", 0.01)
        with pytest.raises(NemoError, match=REMEDY):
            iter(loader)
        patch.setattr("nemo_dali.loader._position.PATIENCE_S", 60)
        newer = iter(loader)
        assert waiting.done() or waiting.result() is not None
    assert same(list(newer), epochs[0])


def test_a_close_waits_for_another_threads_step(files, epochs, monkeypatch):
    loader = make(files)
    passes, inside, done = iter(loader), threading.Event(), threading.Event()
    shown = [next(passes)]
    settled = loader._prefetcher._pipeline.wait

    def slow():
        inside.set()
        assert done.wait(60)
        return settled()

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(loader._prefetcher._pipeline, "wait", slow)
        waiting = pool.submit(next, passes)
        assert inside.wait(60)
        try:
            with (
                monkeypatch.context() as patch,
                pytest.raises(NemoError, match=r"Another .* before close\(\) is called"),
            ):
                patch.setattr("nemo_dali.loader._position.PATIENCE_S", 0.01)
                loader.close()
            closing = pool.submit(loader.close)
            time.sleep(0.1)
            assert not closing.done()
        finally:
            done.set()
        shown.append(waiting.result())
        closing.result()
    assert loader._prefetcher.in_flight == 0
    assert same([*shown, *passes], epochs[0])  # by a new pipeline
    loader.close()


def test_a_loader_can_be_closed_inside_its_own_pass(files, epochs):
    loader, shown = make(files), []
    for batch in loader:
        shown.append(batch)
        loader.close()
    assert same(shown, epochs[0])


def test_an_interrupted_step_keeps_nobody_out(files, epochs, monkeypatch):
    loader = make(files)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loader._prefetcher, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
    assert same(in_thread(list, loader), epochs[0])
