"""Joins the chunks of a stream to complete requests, within limits.

No limit here depends on a number that a client sent.
"""

from __future__ import annotations

import math
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

    def payload(self, more: int = 0) -> int:
        """Bytes of the payload: those that have arrived, and `more`, or those that are expected if they are more."""
        return max(self.size + more, self.reserved)

    def held(self, more: int = 0, chunks: int = 0) -> int:
        """Bytes to reserve for the request and its chunks, if `more` bytes of the payload arrive in `chunks`."""
        chunks = max(len(self.parts) + chunks, min(self.total, CHUNKS_RESERVED))
        return self.request.held + self.payload(more) + chunks * CHUNK_COST

    def add(self, message: pb.InferRequest, payload: bytes) -> None:
        """Adds a chunk. Raises BadInput if it does not fit the others."""
        if message.seq in self.parts:
            raise BadInput(f"seq: {message.seq} was sent twice")
        for name, told, now in (
            ("total", self.total, message.total),
            ("task", self.request.task, message.task),
            ("payload_mime", self.request.mime, message.payload_mime),
            ("meta", self.request.meta, dict(message.meta)),
        ):
            if told != now:
                raise BadInput(f"{name}: it differs between the chunks of one request")
        self.parts[message.seq] = message.offset, payload
        self.size += len(payload)

    def joined(self) -> Request:
        """The request with its whole payload. Raises BadInput if the offsets of the chunks are wrong."""
        parts = [self.parts[seq] for seq in range(self.total)]
        if any(offset for offset, _ in parts):  # some clients leave it at 0
            length = 0
            for seq, (offset, payload) in enumerate(parts):
                if offset != length:
                    raise BadInput(f"offset: {offset} on chunk {seq}; the chunks before it have {length} bytes")
                length += len(payload)
        self.request.payload = b"".join(payload for _, payload in parts)
        self.request.held += self.size
        return self.request


class Assembler:
    """Joins the chunks of one stream. The key is the literal correlation id, which may be empty.

    A request that fails is answered once. The rest of its chunks are ignored, until a chunk with seq 0 begins a new
    request with the same id.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[str, Unfinished] = {}
        self._failed: dict[str, None] = {}  # ids, the oldest first

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
            self._open.pop(key, None)
            self._failed[key] = None
            if len(self._failed) > OPEN_IDS_MAX:
                del self._failed[next(iter(self._failed))]
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
            return waiting.held(len(payload), 1) - waiting.held(), True
        chunks = max(1, min(int(message.total), CHUNKS_RESERVED))
        beside: int = message.ByteSize() + CHUNK_COST * chunks
        return beside + max(len(payload), self._expected(message, payload)), False

    def _expected(self, message: pb.InferRequest, payload: bytes) -> int:
        """Bytes of the whole payload, if all chunks are as large as the first one."""
        return min(len(payload) * min(int(message.total), CHUNKS_MAX), self._max_bytes)

    def _add(self, key: str, message: pb.InferRequest, payload: bytes) -> Request | None:
        envelope = message.ByteSize()
        if envelope > ENVELOPE_MAX:
            raise BadInput(f"meta: {envelope} bytes beside the payload; allowed: {ENVELOPE_MAX}")
        if len(message.meta) > META_MAX:
            raise BadInput(f"meta: {len(message.meta)} entries; allowed: {META_MAX}")
        waiting = self._open.get(key)
        if len(payload) + (waiting.size if waiting else 0) > self._max_bytes:
            raise BadInput(f"payload: over {self._max_bytes} bytes, the most that a request may have")
        if not waiting and message.total <= 1:
            if message.seq or message.offset:
                raise BadInput(
                    f"total: {message.total} with seq {message.seq} and offset {message.offset}; "
                    "allowed: the number of chunks on each of them"
                )
            return _request(message, payload, envelope)
        if message.total > CHUNKS_MAX:
            raise BadInput(f"total: {message.total}; allowed: up to {CHUNKS_MAX} chunks")
        if message.seq >= message.total:
            raise BadInput(f"seq: {message.seq} of total {message.total}; allowed: 0 to total - 1")
        if not waiting:
            if len(self._open) >= OPEN_IDS_MAX:
                raise BadInput(f"correlation_id: more than {OPEN_IDS_MAX} unfinished requests on one stream")
            reserved, most = self._expected(message, payload), UNFINISHED_MAX * self._max_bytes
            if sum(request.payload() for request in self._open.values()) + reserved > most:
                raise BadInput(f"payload: more than {most} bytes of unfinished requests on one stream")
            waiting = self._open[key] = Unfinished(_request(message, b"", envelope), message.total, reserved)
        waiting.add(message, payload)
        if len(waiting.parts) < waiting.total:
            return None
        request = waiting.joined()
        del self._open[key]
        return request


def _request(first: pb.InferRequest, payload: bytes, envelope: int) -> Request:
    held = len(payload) + envelope
    return Request(first.correlation_id, first.task, first.payload_mime, dict(first.meta), payload, held)
