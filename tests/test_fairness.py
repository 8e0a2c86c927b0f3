"""Whose work runs next: no client waits for the queue of another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

import intake
from fair_queue import ACCOUNTS_MAX, FairQueue, Flow, Shares
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import GREEN, LIMIT_S, RED, Turnstile, encoded, picture, wait_until

BATCH, WINDOW = 8, 32  # of the `watched` daemon; requests of a stream in progress


@contextlib.contextmanager
def import_of(address: str, streams: int) -> Iterator[Any]:
    """A connection with so many streams, each of which sends 200 pictures."""
    request = pb.InferRequest(task="clip_image_embed", payload=encoded(picture(RED, (64, 64))))
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        calls = [stub.Infer(iter([request] * 200), timeout=LIMIT_S) for _ in range(streams)]
        yield stub
        for call in calls:
            call.cancel()


def queued_jobs(daemon: Any) -> list[str]:
    """Correlation ids of all that waits for a batch; [] if that changes while one looks."""
    with contextlib.suppress(RuntimeError):
        queues = [stage.queue._queued for stage in daemon.engine._stages]
        return [
            job.correlation_id
            for queue in queues
            for streams in list(queue.values())
            for entries in list(streams.values())
            for job, _ in list(entries)
        ]
    return []


def answers(stub: Any, requests: list[pb.InferRequest]) -> list[pb.InferResponse]:
    return list(stub.Infer(iter(requests), timeout=LIMIT_S))


@pytest.mark.parametrize(
    ("connections", "streams", "shared", "memory"),
    [(1, 1, False, 1000), (4, 1, False, 1000), (1, 20, False, 1000), (1, 4, True, 1000), (3, 4, False, 40)],
    ids=["one import", "four imports", "twenty streams", "one connection for all", "no memory left"],
)
def test_a_single_picture_is_answered_within_two_batches(
    watched: Any, connections: int, streams: int, shared: bool, memory: int
) -> None:
    """A person who opens one photograph would wait for all that others have queued: with a model that makes two
    pictures a second, 7 s behind one import, and longer behind an app that opens many streams."""
    backend, stub = watched
    daemon = backend.daemon
    daemon.intake.prepared = intake.Budget(memory * 224 * 224 * 3)
    backend.gate = turnstile = Turnstile()
    with futures.ThreadPoolExecutor(1) as person, contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(import_of(backend.address, streams)) for _ in range(connections)]
        try:
            least = min(connections * streams * WINDOW, memory) - BATCH
            wait_until(lambda: len(queued_jobs(daemon)) >= least)
            time.sleep(0.5)  # the batch has been running for a while when the person comes
            for number in range(3):
                photo = encoded(picture(GREEN, (64, 64), number))
                request = pb.InferRequest(task="clip_image_embed", correlation_id="single", payload=photo)
                single = person.submit(answers, stubs[0] if shared else stub, [request])
                wait_until(lambda: "single" in queued_jobs(daemon))
                turnstile.release(2)  # ends the batch that runs, and the next one
                [response] = single.result(LIMIT_S)
                assert response.result
        finally:
            turnstile.set()


def drawn(queue: FairQueue[str], cost: dict[str, float], count: int) -> str:
    """The flows of the next items, in order, each of which takes the core seconds of its flow."""
    order = ""
    for _ in range(count):
        flow, name = queue.head()
        queue.pop(flow, cost[name])
        queue._shares.end(flow, cost[name], cost[name])
        order += name
    return order


def filled(*flows: tuple[str, Flow], count: int = 100) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(Shares())
    for name, flow in flows:
        for _ in range(count):
            queue.push(flow, name)
    return queue


def test_two_clients_get_the_same_work_whatever_their_pictures_cost() -> None:
    """Phone pictures would wait for the large files of a camera, three to one."""
    order = drawn(filled(("a", ("x", 1)), ("b", ("y", 1))), {"a": 3.0, "b": 1.0}, 40)
    assert order.count("a") == 10 and order.count("b") == 30
    assert all(abs(order[:end].count("b") - 3 * order[:end].count("a")) <= 4 for end in range(1, 40))


def test_many_streams_of_one_connection_count_as_one_client() -> None:
    """An app that opens twenty streams would get twenty times the share of one that opens one."""
    flows = [("a", ("x", stream)) for stream in range(20)]
    order = drawn(filled(*flows, ("b", ("y", 1))), {"a": 1.0, "b": 1.0}, 80)
    assert order.count("b") == 40


def test_clients_behind_one_proxy_share_its_part() -> None:
    """Behind a proxy, which has one connection to the daemon, one import would keep everybody waiting."""
    order = drawn(filled(("a", ("x", 1)), ("b", ("x", 2)), ("c", ("x", 3))), {"a": 1.0, "b": 1.0, "c": 1.0}, 60)
    assert [order.count(name) for name in "abc"] == [20, 20, 20]


def test_idle_time_gives_no_priority() -> None:
    """A client that was idle for an hour would then have the daemon to itself for an hour."""
    queue = filled(("a", ("x", 1)))
    assert drawn(queue, {"a": 1.0}, 50) == 50 * "a"
    for _ in range(50):
        queue.push(("y", 1), "b")
    order = drawn(queue, {"a": 1.0, "b": 1.0}, 40)
    assert order[:2].count("b") >= 1 and 19 <= order.count("b") <= 21


def test_a_client_that_joins_does_not_pay_for_an_expectation_that_was_wrong() -> None:
    """After one slow batch, a single picture would wait for several batches of an import."""
    queue = filled(("a", ("x", 1)))
    for _ in range(8):
        queue.pop(("x", 1), 5.0)  # expected to take five seconds each
    queue.push(("y", 1), "b")
    for _ in range(8):
        queue._shares.end(("x", 1), 5.0, 0.1)  # and they took a tenth
    assert drawn(queue, {"a": 0.1, "b": 0.1}, 2) == "ba"


def test_accounts_of_clients_that_left_are_dropped() -> None:
    """A daemon would grow with each connection that anybody ever opened."""
    shares = Shares()
    queue: FairQueue[int] = FairQueue(shares)
    for number in range(2 * ACCOUNTS_MAX):
        queue.push((number, number), number)
        queue.pop((number, number), 0.1)
        shares.end((number, number), 0.1, 0.1)
    assert len(shares._accounts) <= ACCOUNTS_MAX and queue.length == 0 and not queue._queued
