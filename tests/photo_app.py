"""A client with the connection rules of the photo app's SDK, which are written in Go.

The rules, of Lumen SDK 1.4 (`lumen_balancer.go`, `pool.go`):

- One connection for each node, plaintext, kept connected: when it is idle, it connects again.
- Each time that the connection becomes ready, `StreamCapabilities` is read once, over a connection of its own that is
  closed afterwards, with a limit of 3 s; after an error again in 1, 2, 4, 8, 8, ... s. It is not read at other times.
- A node receives only calls of tasks that it listed. A task that no node lists fails at once.
- A call is one stream: the request in one message or in chunks, then the end of the client's side, then the answer.
- Nothing is retried.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc
from google.protobuf.empty_pb2 import Empty

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

OPTIONS = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 3000)]
OWN = ("grpc.use_local_subchannel_pool", 1)  # a connection that no other channel shares


class PhotoApp:
    """One node of the app."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, [*OPTIONS, OWN])
        self.stub = pb_grpc.InferenceStub(self._channel)
        self.services: dict[str, str] = {}  # task -> service name, as last read
        self.connections = 0  # how often the connection became ready
        self._closed = threading.Event()
        self._channel.subscribe(self._state_changed, try_to_connect=True)

    def close(self) -> None:
        self._closed.set()
        self._channel.unsubscribe(self._state_changed)
        self._channel.close()

    def call(self, task: str, *chunks: pb.InferRequest) -> pb.InferResponse:
        """Raises LookupError if the node does not list the task, and grpc.RpcError."""
        if task not in self.services:
            raise LookupError(f"no node supports task {task!r}")
        for chunk in chunks:
            chunk.task = task
            chunk.meta["service"] = self.services[task]
        [response] = self.stub.Infer(iter(chunks), timeout=60)
        return response

    def _state_changed(self, state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            self.connections += 1
            threading.Thread(target=self._read_capabilities, args=(self.connections,), daemon=True).start()
        elif state is grpc.ChannelConnectivity.IDLE and not self._closed.is_set():
            threading.Thread(target=self._connect, daemon=True).start()

    def _connect(self) -> None:
        if not self._closed.is_set():
            grpc.channel_ready_future(self._channel)  # which connects

    def _read_capabilities(self, connection: int) -> None:
        delays = iter([1, 2, 4])
        while connection == self.connections and not self._closed.is_set():
            try:
                with grpc.insecure_channel(self._address, [*OPTIONS, OWN]) as channel:
                    capabilities = list(pb_grpc.InferenceStub(channel).StreamCapabilities(Empty(), timeout=3))
            except grpc.RpcError:
                self._closed.wait(next(delays, 8))
            else:
                self.services = services_of(capabilities)
                return


def services_of(capabilities: Sequence[pb.Capability]) -> dict[str, str]:
    assert capabilities and all(c.protocol_version.startswith("1.") and c.service_name for c in capabilities)
    return {task.name: c.service_name for c in reversed(capabilities) for task in c.tasks}
