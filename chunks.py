"""Joins the chunks of a stream to complete requests, within limits.

No limit here depends on a number that a client sent.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from errors import BadInput
from gen import ml_service_pb2 as pb
from machine import clock
from tasks import Request

CHUNKS_MAX = 65_536  # chunks of one request
OPEN_IDS_MAX = 64  # incomplete requests on one stream
CHUNKS_RESERVED = 1024  # chunks for which memory is reserved when a request begins
UNFINISHED_MAX = 2  # limit on the bytes of all incomplete requests on one stream, in maximum request sizes
ID_MAX = 1000  # characters of a correlation id
ENVELOPE_MAX = 4 << 20  # bytes of a message without its payload: 256 labels of 1,000 characters, and some reserve
META_MAX = 256  # entries of meta
CHUNK_COST = 512  # bytes that a stored chunk takes in addition to its payload


@dataclass
class Unfinished:
    """An incomplete request."""

    request: Request  # as in its first chunk; the payload is still empty
    total: int
    reserved: int  # bytes of the payload that the first chunk lets one expect
    since: float = field(default_factory=clock.now)
    size: int = 0  # bytes of the payload that have arrived
    parts: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # seq -> offset, payload

    def payload(self) -> int:
        """Bytes of the payload: those that have arrived or those that are expected, whichever is more."""
        return max(self.size, self.reserved)

    def held(self) -> int:
        """Bytes that are reserved for the request, the cost of its chunks included."""
        return self.request.held + self.payload() + max(len(self.parts), self.reserved_chunks()) * CHUNK_COST

    def reserved_chunks(self) -> int:
        return min(self.total, CHUNKS_RESERVED)


class Assembler:
    """Joins the chunks of one stream. The key is the literal correlation id, which may be empty.

    A request that fails is answered once. The rest of its chunks are ignored, until a chunk with seq 0 begins a new
    request with the same id.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[str, Unfinished] = {}
        self._failed: OrderedDict[str, None] = OrderedDict()

    def add(self, message: pb.InferRequest, payload: bytes) -> Request | None:
        """Adds a message, whose payload was moved to `payload`. Returns the request that it completes, or None.

        Raises BadInput.
        """
        key = message.correlation_id
        if len(key) > ID_MAX:
            raise BadInput(f"correlation_id: over {ID_MAX} characters")
        if key in self._failed:
            if message.seq > 0:
                return None
            del self._failed[key]
        try:
            return self._add(key, message, payload)
        except BadInput:
            self.drop(key)
            self._failed[key] = None
            if len(self._failed) > OPEN_IDS_MAX:
                self._failed.popitem(last=False)
            raise

    def unfinished(self) -> list[str]:
        return list(self._open)

    def since(self) -> float:
        """When the oldest incomplete request began, by `machine.clock`; infinity if there is none."""
        return min((request.since for request in list(self._open.values())), default=math.inf)

    def held(self) -> int:
        """Bytes that are reserved for incomplete requests."""
        return sum(request.held() for request in self._open.values())

    def room_for(self, message: pb.InferRequest, payload: bytes) -> tuple[int, bool]:
        """(bytes to reserve before a message is added, whether it belongs to a request that has begun).

        With its first chunk, a request reserves what the whole needs if all chunks are as large as the first. So
        uploads that have begun do not wait for each other.
        """
        if waiting := self._open.get(message.correlation_id):
            chunk = CHUNK_COST if len(waiting.parts) >= waiting.reserved_chunks() else 0
            return chunk + max(0, waiting.size + len(payload) - waiting.payload()), True
        chunks = max(1, min(int(message.total), CHUNKS_RESERVED))
        beside: int = message.ByteSize() + CHUNK_COST * chunks
        return beside + max(len(payload), self._expected(message, payload)), False

    def _expected(self, message: pb.InferRequest, payload: bytes) -> int:
        """Bytes of the whole payload, if all chunks are as large as the first one."""
        return min(len(payload) * min(int(message.total), CHUNKS_MAX), self._max_bytes)

    def drop(self, key: str) -> None:
        self._open.pop(key, None)

    def _add(self, key: str, message: pb.InferRequest, payload: bytes) -> Request | None:
        envelope = self._check_envelope(message)
        if key not in self._open and message.total <= 1:
            if message.seq or message.offset:
                raise BadInput(
                    f"total: {message.total} with seq {message.seq} and offset {message.offset}; "
                    "allowed: the number of chunks on each of them"
                )
            self._check_size(len(payload))
            return self._request(message, payload, envelope)
        self._check_chunk(message)
        if key not in self._open:
            if len(self._open) >= OPEN_IDS_MAX:
                raise BadInput(f"correlation_id: more than {OPEN_IDS_MAX} unfinished requests on one stream")
            reserved, most = self._expected(message, payload), UNFINISHED_MAX * self._max_bytes
            if sum(request.payload() for request in self._open.values()) + reserved > most:
                raise BadInput(f"payload: more than {most} bytes of unfinished requests on one stream")
            self._open[key] = Unfinished(self._request(message, b"", envelope), message.total, reserved)
        waiting = self._open[key]
        self._check_same(waiting, message)
        waiting.parts[message.seq] = message.offset, payload
        waiting.size += len(payload)
        self._check_size(waiting.size)
        if len(waiting.parts) < waiting.total:
            return None
        parts = [waiting.parts[seq] for seq in range(waiting.total)]
        self._check_offsets(parts)
        self.drop(key)
        waiting.request.payload = b"".join(payload for _, payload in parts)
        waiting.request.held += waiting.size
        return waiting.request

    @staticmethod
    def _request(first: pb.InferRequest, payload: bytes, envelope: int) -> Request:
        held = len(payload) + envelope
        return Request(first.correlation_id, first.task, first.payload_mime, dict(first.meta), payload, held)

    @staticmethod
    def _check_envelope(message: pb.InferRequest) -> int:
        """Returns the bytes of all fields but the payload."""
        size: int = message.ByteSize()
        if size > ENVELOPE_MAX:
            raise BadInput(f"meta: {size} bytes beside the payload; allowed: {ENVELOPE_MAX}")
        if len(message.meta) > META_MAX:
            raise BadInput(f"meta: {len(message.meta)} entries; allowed: {META_MAX}")
        return size

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BadInput(f"payload: over {self._max_bytes} bytes, the most that a request may have")

    @staticmethod
    def _check_chunk(message: pb.InferRequest) -> None:
        if message.total > CHUNKS_MAX:
            raise BadInput(f"total: {message.total}; allowed: up to {CHUNKS_MAX} chunks")
        if message.seq >= message.total:
            raise BadInput(f"seq: {message.seq} of total {message.total}; allowed: 0 to total - 1")

    @staticmethod
    def _check_same(waiting: Unfinished, message: pb.InferRequest) -> None:
        if message.seq in waiting.parts:
            raise BadInput(f"seq: {message.seq} was sent twice")
        first = waiting.request
        for name, told, now in (
            ("total", waiting.total, message.total),
            ("task", first.task, message.task),
            ("payload_mime", first.mime, message.payload_mime),
            ("meta", first.meta, dict(message.meta)),
        ):
            if told != now:
                raise BadInput(f"{name}: it differs between the chunks of one request")

    @staticmethod
    def _check_offsets(parts: Sequence[tuple[int, bytes]]) -> None:
        if not any(offset for offset, _ in parts):  # some clients leave it at 0
            return
        length = 0
        for seq, (offset, payload) in enumerate(parts):
            if offset != length:
                raise BadInput(f"offset: {offset} on chunk {seq}; the chunks before it have {length} bytes")
            length += len(payload)
