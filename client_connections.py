"""Connections to daemons: addresses, credentials, requests and answers, and the sharing of requests among several."""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import math
import re
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import empty_pb2

from client_files import UsageError, is_text, readable
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

DEFAULT_PORT = 50051
DEFAULT_ADDRESS = "127.0.0.1:50051"
MESSAGE_BYTES_MAX = 65 << 20
# Larger payloads are sent in chunks of this size, at the least core time: for 3 MB, client and daemon together take 2.8
# core ms with chunks of 1 MiB, 4.3 with 256 KiB, and 5.1 with one message.
CHUNK_BYTES = 1 << 20
KEEPALIVE_MS = 10_000, 5_000  # interval and timeout: detects a daemon that has lost its network
AS_TENSOR = {"lumen.output.kind": "tensor"}  # a fifth of JSON's size; servers without support for it send JSON
HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
IN_FLIGHT_EACH = 8  # unanswered requests of a daemon, if there are several. A single one limits them itself.
AHEAD = 1024  # requests that `infer_many` reads ahead of the answer that the caller gets next
HELD_BYTES_MAX = 256 << 20  # of unanswered payloads, which may have to be sent again
RETURN_SECONDS = 5.0  # after which a daemon that failed is tried again
# Seconds for which a stream to a balancer takes requests. The next stream may go to a daemon that has come back, or was
# added. Shorter times cost more, because a stream that ends has fewer requests in flight.
STREAM_SECONDS = 20.0
# Seconds without an answer after which a run gives up if all streams to a balancer fail. A reload of the balancer and a
# restart of the daemons, with models that are at hand, take less.
PATIENCE_SECONDS = 60.0
GRPC_TARGET = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):(?!\d+$)")  # such as unix:/run/lumen.sock

log = logging.getLogger("lumen.client")


class LumenError(Exception):
    """A request failed. `code` is an ErrorCode or gRPC status in lower case, such as "invalid_argument"."""

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        super().__init__(f"{message} ({code})")
        self.code, self.message, self.detail = code, message, detail


@dataclass(frozen=True)
class Request:
    """A task, its payload, and meta such as topk, labels, prompt_template or label_format."""

    task: str
    payload: bytes
    mime: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """An answer. `data` is the labels_v1 or embedding_v1 object, `meta` is that of the response."""

    task: str
    mime: str
    data: dict[str, Any]
    meta: dict[str, str]


def full_address(text: str) -> str:
    """HOST:PORT, with DEFAULT_PORT if the port is missing, and with IPv6 in brackets. Raises UsageError.

    Addresses in one of gRPC's own forms are not changed.
    """
    if GRPC_TARGET.match(text):
        return text
    bracketed = text.startswith("[") and text.endswith("]")
    if is_ipv6(bare := text[1:-1] if bracketed else text) and "]" not in bare:
        return f"[{bare}]:{DEFAULT_PORT}"
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(DEFAULT_PORT))
    known = is_ipv6(host[1:-1]) if host.startswith("[") else is_text(host) and re.fullmatch(r"[^][:/\s]+", host)
    if known and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536:
        return f"{host}:{port}"
    raise UsageError(f"--address {readable(text)}: allowed: HOST, HOST:PORT or [IPV6]:PORT, several with commas")


def is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Credentials:
    """What a daemon with TLS or a token asks for. Certificates and keys are PEM.

    Error messages name the options of the command line: --tls, --ca, --cert, --key, --server-name and --token-file.
    """

    tls: bool = False
    ca: bytes | None = None  # the CA that signed the daemon's certificate; None: the CAs that gRPC trusts
    certificate: bytes | None = None  # the client's certificate with its key, if the daemon asks for one
    key: bytes | None = None
    name: str = ""  # the name in the daemon's certificate, if it differs from the address
    token: str = ""

    @property
    def uses_tls(self) -> bool:
        return bool(self.tls or self.ca or self.certificate or self.name)

    def check(self, address: str) -> None:
        """Raises UsageError if the token would be sent to another machine without TLS, or cannot be sent at all."""
        host = address.rpartition(":")[0].strip("[]")
        if self.token and not (self.uses_tls or host in ("localhost", "::1") or host.startswith("127.")):
            raise UsageError(f"--token-file: without --tls the token would be sent unencrypted to {address}")
        if not re.fullmatch("[!-~]*", self.token.strip()):
            raise UsageError("--token-file: allowed: printable ASCII characters without spaces")


def read_credentials(options: argparse.Namespace, addresses: Sequence[str]) -> Credentials:
    """Raises UsageError."""
    if bool(options.cert) != bool(options.key):
        raise UsageError("--cert and --key: only one of them is given; allowed: both")
    contents: dict[str, bytes | None] = {}
    for name in ("token_file", "ca", "cert", "key"):
        path = getattr(options, name)
        try:
            contents[name] = path.read_bytes() if path else None
        except OSError as error:
            raise UsageError(f"--{name.replace('_', '-')} {readable(str(path))}: {error.strerror or error}") from None
    try:
        token = (contents.pop("token_file") or b"").decode().strip()
    except UnicodeDecodeError:
        raise UsageError(f"--token-file: {readable(str(options.token_file))} is not UTF-8") from None
    ca, certificate, key = contents.values()
    credentials = Credentials(options.tls, ca, certificate, key, options.server_name, token)
    for address in addresses:
        credentials.check(address)
    return credentials


def explain(code: str, details: str, address: str, given: Credentials) -> str:
    """What to do about a call that failed, or gRPC's own text if that is not known.

    `code` is the gRPC status in lower case, `details` is its text.
    """
    if code == "unauthenticated":
        asked = "does not accept the token in" if given.token else "asks for a token; give"
        return f"the daemon {asked} --token-file FILE"
    if code == "unavailable" and details.startswith("not ready: "):
        return f"the daemon is still loading ({details.removeprefix('not ready: ')}); try again in a minute"
    if re.search("http2 header with status: 50[234]", details):  # from a balancer
        return f"no daemon behind {address} is ready; try again in a minute"
    if re.match("errors resolving|DNS resolution failed", details):
        return f"the host name in {address} cannot be resolved; check the name"
    if not details.startswith(("failed to connect to all addresses", "connections to all backends failing")):
        lost = re.search("Stream removed|Socket closed|Connection reset|GOAWAY", details)
        return f"the daemon closed the connection during the call ({details}); try again" if lost else details
    name = given.name or address.rpartition(":")[0].strip("[]")
    if given.ca:
        unsigned = "the daemon's certificate is not signed by the CA in --ca FILE; give the CA that signed it"
    else:
        unsigned = "the daemon's certificate is not signed by a CA that this computer trusts; give --ca FILE"
    if given.uses_tls:
        closed = "if it asks for a client certificate, give --cert FILE and --key FILE that its CA has signed"
    else:
        closed = "if it uses TLS, give --ca FILE"
    for pattern, advice in (
        ("Connection refused", f"nothing answers at {address}; is the daemon running?"),
        ("WRONG_VERSION_NUMBER", "the daemon does not use TLS; leave out --tls, --ca, --cert, --key and --server-name"),
        ("certificate has expired", "the daemon's certificate has expired; make a new one"),
        ("CERTIFICATE_VERIFY_FAILED", unsigned),
        ("Hostname Verification", f"the daemon's certificate is not for {name}; give a name in it: --server-name NAME"),
        ("security handshaker", "a file of --ca, --cert or --key cannot be used; allowed: PEM"),
        ("Socket closed|Connection reset", f"the daemon closed the connection; {closed}"),
        ("No route|unreachable|[Tt]imed? ?out", f"{address} does not answer; check the address and the network"),
    ):
        if re.search(pattern, details):
            return advice
    return details


class LumenClient:
    """A connection to one daemon, or to a balancer. It can be used from several threads. The default port is 50051.

    `timeout`: seconds for each call except `infer_many`, which has no limit. `spread`: if the address is a name with
    several IP addresses, connect to all of them, and let each call use the next. Raises UsageError, a ValueError, for
    an invalid address, and for a token that would be sent unencrypted.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        timeout: float = 60.0,
        credentials: Credentials | None = None,
        spread: bool = False,
    ) -> None:
        self._credentials = given = credentials or Credentials()
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS[0]),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS[1]),
            ("grpc.max_reconnect_backoff_ms", int(1000 * RETURN_SECONDS)),  # gRPC's own limit is two minutes
            ("grpc.use_local_subchannel_pool", 1),  # otherwise clients with equal options would share a connection
            ("grpc.lb_policy_name", "round_robin" if spread else "pick_first"),
        ]
        if given.name:
            options.append(("grpc.ssl_target_name_override", given.name))
        self.address, self.timeout = full_address(address), timeout
        given.check(self.address)
        self._metadata = (("authorization", f"Bearer {given.token.strip()}"),) if given.token else ()
        if given.uses_tls:
            tls = grpc.ssl_channel_credentials(given.ca, given.key, given.certificate)
            self._channel = grpc.secure_channel(self.address, tls, options)
        else:
            self._channel = grpc.insecure_channel(self.address, options)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def __enter__(self) -> LumenClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    @contextmanager
    def _rpc_errors(self) -> Iterator[None]:
        """Raises a gRPC failure as a LumenError that says what to do. Its `detail` is what gRPC says."""
        try:
            yield
        except grpc.RpcError as error:
            call: Any = error  # grpc.RpcError is a Call too, which its type does not say
            code, details = call.code().name.lower(), call.details() or "the call failed"
            raise LumenError(code, explain(code, details, self.address, self._credentials), details) from error

    def infer(self, task: str, payload: bytes, mime: str = "", meta: Mapping[str, str] | None = None) -> Result:
        """Sends one request and returns its answer. Raises LumenError."""
        messages = _messages(Request(task, payload, mime, meta or {}), "")
        with self._rpc_errors():
            for response in self._stub.Infer(messages, timeout=self.timeout, metadata=self._metadata):
                answer = _answer(task, response)
                if isinstance(answer, LumenError):
                    raise answer
                return answer
        raise LumenError("internal", "the stream ended without an answer")

    def infer_many(self, requests: Iterable[Request]) -> Iterator[Result | LumenError]:
        """Sends the requests over one stream; yields the answers in their order, a LumenError for each that failed.

        A thread reads `requests`, as many ahead of the answers as the daemon takes. Raises LumenError if the stream
        fails, and whatever `requests` raises.
        """
        return infer_many([self], requests)

    def _stream(self, requests: Iterable[Request]) -> Iterator[Result | LumenError]:
        tasks: deque[str] = deque()

        def send() -> Iterator[pb.InferRequest]:
            for number, request in enumerate(requests):
                tasks.append(request.task)
                yield from _messages(request, str(number))

        call = self._stub.Infer(send(), metadata=self._metadata)
        try:
            with self._rpc_errors():
                for number, response in enumerate(call):
                    if response.correlation_id != str(number):
                        raise LumenError("internal", f"answer {number} has the id {response.correlation_id!r}")
                    yield _answer(tasks.popleft(), response)
        finally:
            call.cancel()

    def classify(
        self,
        image: bytes,
        task: str = "clip_classify",
        topk: int | None = None,
        labels: Sequence[str] | None = None,
        label_set: str | None = None,
        min_score: float | None = None,
    ) -> list[tuple[str, float]]:
        """(label, probability) pairs, best first; none if no label fits or reaches `min_score`. Raises LumenError.

        For clip_classify only: `labels`, which are the caller's own, or `label_set`, the name of one of the daemon's.
        """
        given = {"topk": topk, "label_set": label_set, "min_score": min_score}
        meta = {key: str(value) for key, value in given.items() if value is not None}
        if labels is not None:
            meta["labels"] = json.dumps(list(labels))
        rows = self.infer(task, image, meta=meta).data["labels"]
        return [(row["label"], row["score"]) for row in rows]

    def embed_image(self, image: bytes, task: str = "clip_image_embed") -> list[float]:
        """The embedding of a picture: `dim` floats of unit length. Raises LumenError."""
        vector: list[float] = self.infer(task, image, meta=AS_TENSOR).data["vector"]
        return vector

    def embed_text(self, text: str, task: str = "clip_embed") -> list[float]:
        """The embedding of a text, comparable with image embeddings of the same model. Raises LumenError."""
        vector: list[float] = self.infer(task, text.encode(), "text/plain", AS_TENSOR).data["vector"]
        return vector

    def capabilities(self) -> list[pb.Capability]:
        """One capability for each model. Raises LumenError."""
        with self._rpc_errors():
            return list(self._stub.StreamCapabilities(empty_pb2.Empty(), timeout=self.timeout, metadata=self._metadata))

    def models(self) -> dict[str, str]:
        """task -> the `space` of its vectors, or the model if the daemon does not report one. Raises LumenError.

        Vectors belong into one index only if these are equal.
        """
        found: dict[str, str] = {}
        for capability in self.capabilities():
            spaces = [value for key, value in sorted(capability.extra.items()) if key.endswith("_space")]
            found |= dict.fromkeys((task.name for task in capability.tasks), ", ".join(spaces or capability.model_ids))
        return found

    def health(self) -> str:
        """The state that the standard health service reports, such as "SERVING". Raises LumenError.

        The reply is one varint field with number 1. It is parsed here, so that no health package is needed.
        """
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        with self._rpc_errors():
            reply: bytes = check(b"", timeout=self.timeout, metadata=self._metadata)
        state = reply[1] if len(reply) == 2 and reply[0] == 0x08 else 0
        return HEALTH_STATES[state] if state < len(HEALTH_STATES) else "UNKNOWN"

    def degraded(self) -> list[str]:
        """Where the daemon differs from its settings, for example images on the CPU. Raises LumenError."""
        with self._rpc_errors():
            _, call = self._stub.Health.with_call(empty_pb2.Empty(), timeout=self.timeout, metadata=self._metadata)
        return [str(value) for key, value in call.trailing_metadata() or () if key == "lumen-degraded"]


def infer_many(clients: Sequence[LumenClient], requests: Iterable[Request]) -> Iterator[Result | LumenError]:
    """Sends the requests to several daemons, each at its own pace; yields the answers in the order of the requests.

    A daemon whose model differs from the first daemon's is left out. When a daemon fails, the others get its unanswered
    requests, and it is used again once it is back. Each of these events is logged as a warning. Raises LumenError when
    no daemon is left, and whatever `requests` raises.

    Several clients of one address are connections to a balancer. Then models are not compared, since each call may go
    to another daemon: compare `meta["space"]` of the results. If all connections fail after the first answer, they are
    tried again for PATIENCE_SECONDS.
    """
    return _PullQueue(clients, requests).answers()


@dataclass
class _Daemon:
    client: LumenClient
    models: dict[str, str] | None = None  # None until the daemon has answered; empty if it is the only daemon
    taken: deque[tuple[int, Request]] = field(default_factory=deque)  # its unanswered requests, with their numbers
    error: LumenError | None = None  # why it is not in use
    refusal: LumenError | None = None  # why it will not be used again


class _PullQueue:
    """One `infer_many`. Each daemon has a stream and takes the next request when it has answered one.

    One thread reads `requests`, one thread for each daemon reads its answers, and the caller's thread yields them.
    """

    def __init__(self, clients: Sequence[LumenClient], requests: Iterable[Request]) -> None:
        self._requests, self._daemons = requests, [_Daemon(client) for client in clients]
        self._window = AHEAD if len(clients) == 1 else IN_FLIGHT_EACH
        self._balanced = len(clients) > 1 and len({client.address for client in clients}) == 1
        self._changed = threading.Condition()  # guards the daemons and everything below
        self._waiting: deque[tuple[int, Request]] = deque()
        self._answers: dict[int, Result | LumenError | None] = {}  # None marks the end
        self._drawn = self._yielded = self._held = 0  # requests; answers; bytes of unanswered payloads
        self._models: dict[str, str] = {}  # task -> the model that every daemon must have
        self._closed = False  # the caller wants no more answers
        self._answered_at = -math.inf  # when the last answer arrived, by time.monotonic()
        self._failure: Exception | None = None  # raised by `requests`
        self._last_error = LumenError("invalid_argument", "no daemon is given")

    def answers(self) -> Iterator[Result | LumenError]:
        threading.Thread(target=self._draw, daemon=True).start()
        for daemon in self._daemons:
            threading.Thread(target=self._run, args=(daemon,), daemon=True).start()
        try:
            while answer := self._next():
                yield answer
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
        if self._failure:
            raise self._failure

    def _next(self) -> Result | LumenError | None:
        def lost() -> bool:  # looked at whenever a daemon has failed again
            waited = time.monotonic() - self._answered_at > PATIENCE_SECONDS
            return all(daemon.error for daemon in self._daemons) and (waited or not self._balanced)

        with self._changed:
            self._changed.wait_for(lambda: self._yielded in self._answers or lost())
            if self._yielded not in self._answers:
                raise self._last_error
            self._yielded += 1
            self._changed.notify_all()
            return self._answers.pop(self._yielded - 1)

    def _draw(self) -> None:
        def room() -> bool:
            near = self._drawn - self._yielded < AHEAD and self._held < HELD_BYTES_MAX
            return self._closed or (near and len(self._waiting) < 2 * len(self._daemons))

        try:
            for request in self._requests:
                with self._changed:
                    self._waiting.append((self._drawn, request))
                    self._drawn += 1
                    self._held += len(request.payload)
                    self._changed.notify_all()
                    self._changed.wait_for(room)
                    if self._closed:
                        return
        except Exception as error:  # the caller gets it after the answers
            self._failure = error
        with self._changed:
            self._answers[self._drawn] = None
            self._changed.notify_all()

    def _run(self, daemon: _Daemon) -> None:
        """Uses the daemon. If it fails, returns its requests to the queue and tries it again later."""
        while not (self._closed or daemon.refusal):
            try:
                self._use(daemon)
                continue
            except Exception as raised:  # the requests must be returned, whatever happened
                failed = raised if isinstance(raised, LumenError) else LumenError("internal", repr(raised))
                error = daemon.refusal or failed
            with self._changed:
                if not (self._closed or daemon.error or len(self._daemons) == 1):
                    again = f"; {len(daemon.taken)} unanswered requests go to the others" if daemon.taken else ""
                    log.warning("%s: %s%s", daemon.client.address, error, again)
                self._waiting.extendleft(reversed(daemon.taken))
                daemon.taken, daemon.error, self._last_error = deque(), error, error
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, RETURN_SECONDS)

    def _use(self, daemon: _Daemon) -> None:
        """Sends requests over one stream until it ends. Returns if another is due, otherwise raises the reason."""
        models = daemon.client.models() if len(self._daemons) > 1 else {}
        taken: deque[tuple[int, Request]] = deque()
        until = time.monotonic() + STREAM_SECONDS if self._balanced else math.inf
        with self._changed:
            daemon.models, daemon.taken, daemon.error = {} if self._balanced else models, taken, None
            self._changed.notify_all()
        for answer in daemon.client._stream(iter(lambda: self._take(daemon, taken, until), None)):
            with self._changed:
                number, request = taken.popleft()
                self._answers[number] = answer
                self._answered_at = time.monotonic()
                self._held -= len(request.payload)
                self._changed.notify_all()
        if taken or time.monotonic() < until:
            raise LumenError("internal", "the daemon ended the stream")

    def _take(self, daemon: _Daemon, taken: deque[tuple[int, Request]], until: float) -> Request | None:
        """The next request of the daemon's stream; None to end the stream, as after `until` by time.monotonic()."""

        def ended() -> bool:  # the stream has failed if its requests are not the daemon's any more
            return self._closed or daemon.taken is not taken or time.monotonic() > until

        def ready() -> bool:  # the first daemon sets the model, even if it is slow to answer
            known = all(other.error or other.models is not None for other in self._daemons)
            return known and bool(self._waiting) and len(taken) < self._window

        with self._changed:
            self._changed.wait_for(lambda: ended() or ready())
            if ended():
                return None
            number, request = self._waiting[0]
            models = [other.models for other in self._daemons if other.models and request.task in other.models]
            expected = self._models.setdefault(request.task, models[0][request.task] if models else "missing")
            model = (daemon.models or {}).get(request.task, "missing")
            if model != expected:
                text = f"left out: its model for {request.task} is {model}, the first daemon's {expected}"
                daemon.refusal = LumenError("failed_precondition", text)
                return None
            self._waiting.popleft()
            taken.append((number, request))
            self._changed.notify_all()
            return request


def _messages(request: Request, correlation_id: str) -> Iterator[pb.InferRequest]:
    shared: dict[str, Any] = {"correlation_id": correlation_id, "task": request.task, "payload_mime": request.mime}
    shared["meta"], payload = dict(request.meta), request.payload
    if len(payload) <= CHUNK_BYTES:
        yield pb.InferRequest(payload=payload, **shared)
        return
    total = -(-len(payload) // CHUNK_BYTES)
    for seq in range(total):
        offset = seq * CHUNK_BYTES
        part = payload[offset : offset + CHUNK_BYTES]
        yield pb.InferRequest(payload=part, seq=seq, total=total, offset=offset, **shared)


def _answer(task: str, response: pb.InferResponse) -> Result | LumenError:
    if response.error.message or response.error.code:
        code = response.error.code  # a newer server may send codes that are unknown here
        name = pb.ErrorCode.Name(code) if code in pb.ErrorCode.values() else f"code_{code}"
        return LumenError(name.removeprefix("ERROR_CODE_").lower(), response.error.message, response.error.detail)
    meta = dict(response.meta)
    try:
        tensor = meta.get("lumen.output.kind") == "tensor"
        data = _vector(response.result, meta) if tensor else json.loads(response.result)
    except ValueError as error:
        return LumenError("internal", f"the answer cannot be read ({error})")
    return Result(task, response.result_mime, data, meta)


def _vector(payload: bytes, meta: Mapping[str, str]) -> dict[str, Any]:
    """The embedding_v1 object of a tensor answer, which is little-endian float32 `[1, dim]`."""
    values = array("f", payload)
    if sys.byteorder == "big":
        values.byteswap()
    return {"vector": values.tolist(), "dim": len(values), "model_id": meta.get("model_id", "")}
