"""The engine: which work may run when, and what it learns from batches that fail."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import engine
import errors
from engine import Answer, Engine, Job, Stage, Steps
from tests.kit import LIMIT_S, wait_until

Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an engine with the given stages."""
    engines: list[Engine] = []

    def begin(*stages: Stage, **options: Any) -> Engine:
        made = Engine(**options)
        for stage in stages:
            made.add(stage)
        made.start()
        engines.append(made)
        return made

    yield begin
    for made in engines:
        made.stop()


def submit(to: Engine, stage: Stage, items: Sequence[Any], client: str = "a") -> Job:
    """A request of these items, whose answer says what they became."""

    def steps() -> Steps:
        return Answer("", "\n".join(map(str, (yield stage, items))).encode(), {})

    job = Job("", "", 0, (client, 1))
    to.expect(job)
    job.steps = steps()
    to.submit(job)
    return job


def background(to: Engine, stage: Stage, items: Sequence[Any]) -> Job:
    def steps() -> Steps:
        yield stage, items
        return Answer("", b"", {})

    job = Job("", "", 0)
    job.steps = steps()
    to.submit(job)
    return job


class Timed:
    """Runs a batch by sleeping, and notes when each batch ran."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ran: list[tuple[float, float, int]] = []  # from, to, items

    def __call__(self, items: list[Any]) -> list[Any]:
        began = time.monotonic()
        time.sleep(self.seconds * len(items))
        self.ran.append((began, time.monotonic(), len(items)))
        return items


@pytest.mark.parametrize("spread", [False, True], ids=["inference thread", "workers"])
def test_a_build_gets_a_small_part_of_the_time_while_requests_wait(start: Start, spread: bool) -> None:
    """An import would lose up to three quarters of its speed for the days in which species are built; and a build
    that never ran beside requests would never end on a busy daemon."""
    pictures, prompts = Timed(0.002), Timed(0.005)
    image = Stage("image", pictures, 4, Stage.BULK, spread)
    prompt = Stage("prompts", prompts, 4, Stage.BACKGROUND)
    to = start(image, prompt, workers=2)
    build = background(to, prompt, range(10_000))
    wait_until(lambda: len(prompts.ran) > 3)
    assert max(items for _, _, items in prompts.ran) == 4  # alone, it runs in full batches
    in_progress = Job("", "", 0, ("a", 1))  # so that a request is, even while this thread has to wait for a core
    to.expect(in_progress)
    jobs = [submit(to, image, [0]) for _ in range(16)]
    before = len(prompts.ran) + 1  # the batch that runs now began before the requests came
    for _ in range(50_000):
        jobs.pop(0).answer.result(LIMIT_S)
        jobs.append(submit(to, image, [0]))
        if len(prompts.ran) > before + 20:
            break
    during = prompts.ran[before : before + 21]
    assert len(during) == 21  # it does go on
    share = sum(ended - begin for begin, ended, _ in during[1:]) / (during[-1][1] - during[0][1])
    print(f"the build had {100 * share:.1f} % of the time")
    assert share < 0.2  # alone it has all of it
    assert {items for _, _, items in during} == {1}
    in_progress.answer.cancel()
    build.answer.cancel()


def test_a_build_pauses_between_the_requests_of_one_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that sends one picture after another would find the model busy with the build each time: at a quarter of
    its speed, for days."""
    monkeypatch.setattr(engine, "IDLE_S", 600.0)  # no pause of a busy machine is as long
    pictures, prompts = Timed(0.01), Timed(0.01)
    image, prompt = Stage("image", pictures, 4, Stage.BULK), Stage("prompts", prompts, 4, Stage.BACKGROUND)
    to = start(image, prompt)
    background(to, prompt, range(10_000))
    submit(to, image, [0]).answer.result(LIMIT_S)
    wait_until(lambda: to._idle_from > time.monotonic())
    before = len(prompts.ran) + 1  # one full batch may be running
    wait_until(lambda: len(prompts.ran) > before + 3)  # the build goes on, but in batches of one
    for _ in range(50):
        submit(to, image, [0]).answer.result(LIMIT_S)
        time.sleep(0.002)
    assert {items for _, _, items in prompts.ran[before:]} == {1}
    monkeypatch.setattr(engine, "IDLE_S", 0.01)
    submit(to, image, [0]).answer.result(LIMIT_S)
    wait_until(lambda: prompts.ran[-1][2] == 4)  # nobody asks any more, so that full batches run again


def test_a_build_pauses_while_a_picture_is_still_being_decoded(start: Start) -> None:
    """Each picture of a slow import would find the model busy with the build."""
    prompts = Timed(0.01)
    prompt = Stage("prompts", prompts, 4, Stage.BACKGROUND)
    to = start(prompt)
    background(to, prompt, range(10_000))
    wait_until(lambda: len(prompts.ran) > 3)
    request = Job("", "", 0, ("a", 1))
    to.expect(request)
    before, began = len(prompts.ran), time.monotonic()
    wait_until(lambda: len(prompts.ran) > before + 5)  # the batch that was running, and then a little at a time
    during, until = prompts.ran[before + 1 : before + 6], time.monotonic()
    assert {items for _, _, items in during} == {1}
    assert sum(ended - begin for begin, ended, _ in during) < 0.2 * (until - began)
    request.answer.cancel()  # or answered
    ran = len(prompts.ran)
    wait_until(lambda: len(prompts.ran) > ran + 5)


def test_a_callers_own_labels_keep_their_turn(start: Start) -> None:
    """The labels that come with a picture would wait until nobody else asks for anything."""
    pictures, prompts = Timed(0.005), Timed(0.005)
    image, prompt = Stage("image", pictures, 4, Stage.BULK), Stage("prompts", prompts, 4, Stage.BULK)
    to = start(image, prompt)
    imports = [submit(to, image, [0], "import") for _ in range(200)]
    labels = submit(to, prompt, range(4), "person")
    went_first: list[int] = []
    labels.answer.add_done_callback(lambda _: went_first.append(sum(items for *_, items in pictures.ran)))
    labels.answer.result(LIMIT_S)
    wait_until(lambda: bool(went_first))
    assert went_first[0] < 40  # of 200
    for job in imports:
        job.answer.cancel()


class Memory:
    """A model that has memory for so many items at once."""

    def __init__(self, fits: int) -> None:
        self.fits, self.sizes = fits, list[int]()
        self.activations: list[weakref.ref[Any]] = []

    def __call__(self, items: list[Any]) -> list[Any]:
        self.sizes.append(len(items))
        activations = np.ones((len(items), 1000))
        self.activations.append(weakref.ref(activations))
        if len(items) > self.fits or "bad" in items:
            raise MemoryError(f"no memory for {len(items)}")
        return items

    def kept(self) -> int:
        """Sets of activations that are still in memory."""
        return sum(activations() is not None for activations in self.activations)


def test_a_free_worker_leaves_pictures_for_the_others(start: Start) -> None:
    """Lost otherwise: half of the cores of a large machine, which wait while one worker has all pictures."""
    gate, sizes = threading.Semaphore(0), list[int]()

    def run(items: list[Any]) -> list[Any]:
        sizes.append(len(items))
        assert gate.acquire(timeout=LIMIT_S)
        return items

    image = Stage("image", run, 8, Stage.BULK, spread=True)
    to = start(image, workers=4)
    for count in range(1, 5):
        submit(to, image, ["running"])
        wait_until(lambda: len(sizes) == count)  # noqa: B023
    waiting = [submit(to, image, ["queued"]) for _ in range(4)]
    wait_until(lambda: image.queue.length == 4)
    gate.release()
    wait_until(lambda: len(sizes) == 5)
    assert sizes == [1, 1, 1, 1, 2]  # its share of the seven that are in progress
    gate.release(20)
    for job in waiting:
        job.answer.result(LIMIT_S)


def test_waiting_for_a_pause_ends_beside_a_client_that_makes_none(start: Start) -> None:
    """Lost otherwise: a picture on all cores, to a photo app that sends one request after another from the start on."""
    to, job = start(), Job("", "", 0, ("a", 1))
    to.expect(job)
    began = time.monotonic()
    to.wait_for_a_pause(0.3)
    assert time.monotonic() - began >= 0.3 and not job.answer.done()
    job.answer.cancel()


def gathered(to: Engine, stage: Stage, count: int, first: str = "first") -> list[Job]:
    """So many requests that are taken as one batch: submitted while the engine cannot look."""
    with to._changed:
        jobs = []
        for number in range(count):
            job = submit(to, stage, [number or first])
            jobs.append(job)
    return jobs


def test_a_batch_that_is_too_large_is_halved_and_the_size_remembered(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without memory every batch would fail first and then run one by one, for ever."""
    model = Memory(fits=3)
    stage = Stage("image", model, 8, Stage.BULK)
    to = start(stage)
    assert all(job.answer.result(LIMIT_S) for job in gathered(to, stage, 8))
    assert model.sizes == [8, 4, 2, 2, 4, 2, 2]
    model.sizes.clear()
    assert all(job.answer.result(LIMIT_S) for job in gathered(to, stage, 8))
    assert model.sizes == [2, 2, 2, 2]
    monkeypatch.setattr(engine, "SMALLER_S", 0.0)  # for the next one
    model.fits = 8  # memory is there again
    model.sizes.clear()
    stage._fits_until = 0.0
    assert all(job.answer.result(LIMIT_S) for job in gathered(to, stage, 8))
    assert model.sizes == [8]


def test_an_item_that_fails_alone_does_not_make_batches_smaller(start: Start) -> None:
    """One picture that the model cannot take would make all others slow for five minutes."""
    model = Memory(fits=8)
    stage = Stage("image", model, 8, Stage.BULK)
    to = start(stage)
    bad, *good = gathered(to, stage, 8, "bad")
    assert isinstance(bad.answer.exception(LIMIT_S), MemoryError) and all(job.answer.result(LIMIT_S) for job in good)
    assert model.sizes == [8, 4, 2, 1, 1, 2, 4] and stage.size_limit() == 8


def test_failed_batches_keep_nothing_in_memory(start: Start) -> None:
    """Eight exceptions would keep eight sets of activations: a shortage of memory that makes itself worse."""
    model = Memory(fits=0)
    stage = Stage("image", model, 8, Stage.BULK)
    to = start(stage)
    gc.disable()  # the exceptions themselves must not hold anything
    try:
        jobs = gathered(to, stage, 8)
        errors = [job.answer.exception(LIMIT_S) for job in jobs]
        assert all(isinstance(error, MemoryError) for error in errors) and len(model.activations) == 15
        assert model.kept() == 0
    finally:
        gc.enable()


def test_failures_are_counted_for_each_tower(start: Start) -> None:
    """A model that fails on everything would never be noticed while another one works."""
    broken = Stage("clip image", Memory(fits=0), 4, Stage.BULK, tower="clip image")
    works = Stage("bioclip image", Memory(fits=4), 4, Stage.BULK, tower="bioclip image")
    to = start(broken, works)
    for _ in range(3):
        assert submit(to, works, [1]).answer.result(LIMIT_S)
        assert submit(to, broken, [1]).answer.exception(LIMIT_S)
    wait_until(lambda: to.failures["clip image"] == 3)
    assert to.failures["bioclip image"] == 0


def test_a_stall_is_not_charged_to_the_client_whose_batch_it_was(start: Start) -> None:
    """After `docker pause` the client that was served at that moment would get nothing for as long as the pause was,
    while others are served."""
    pictures = Timed(0.001)
    stage = Stage("image", pictures, 4, Stage.BULK)
    to = start(stage)
    for _ in range(20):
        submit(to, stage, [0], "a").answer.result(60)
    pictures.seconds = 3.0  # what the batch seems to have taken
    submit(to, stage, [0], "a").answer.result(60)
    pictures.seconds = 0.02
    others = [submit(to, stage, [0], "b") for _ in range(200)]
    mine = submit(to, stage, [0], "a")
    mine.answer.result(60)
    assert sum(job.answer.done() for job in others) < 100  # of which each takes 20 ms
    for job in others:
        job.answer.cancel()


def test_background_work_does_not_wait_for_a_request_that_just_ended() -> None:
    """Lost otherwise: minutes in which a board could compute its species, for a picture that was damaged."""
    running = Engine()
    stage = running.add(Stage("background", list, 4, Stage.BACKGROUND))
    stage.queue.push(("", ""), (Job("", "", 0), 0))
    running._background_from = time.monotonic() + 100
    request = Job("", "", 0)
    running.expect(request)
    assert running._choose() is None  # the request is in progress
    request.finish(errors.BadInput("damaged"))
    wait = running._until_next()
    assert wait is not None and wait <= engine.IDLE_S
