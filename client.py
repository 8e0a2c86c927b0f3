"""The way in for people: a small client class and its command line.

    python client.py clip_classify photo.jpg --topk 3
    python client.py clip_embed "a red bicycle"
    python client.py clip_image_embed ~/Photos --out vectors.npz --discover

Runs with `grpcio`, `protobuf` and `gen/` alone, so it can be copied into another project. numpy (for .npz), tqdm (for
a progress bar) and zeroconf (for --discover) are imported where they are used. `LumenClient` talks to one daemon,
`infer_many` to several at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import json
import logging
import mimetypes
import os
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MESSAGE_BYTES_MAX = 65 << 20
CHUNK_THRESHOLD = 1 << 20  # a payload up to this travels as one message, as in the Lumen SDK
CHUNK_BYTES = 256 << 10
IN_FLIGHT, IN_FLIGHT_EACH = 32, 8  # unanswered requests of `infer_many`: of one daemon, of each of several
KEEPALIVE_MS = 10_000, 5_000  # a daemon whose cable was pulled says nothing, not even that it is gone
IMAGE_TASKS = (
    *("clip_classify", "bioclip_classify", "smart_classify"),
    *("clip_image_embed", "bioclip_image_embed", "semantic_image_embed"),
)
TEXT_TASKS = ("clip_embed", "bioclip_embed", "semantic_text_embed")
AS_TENSOR = {"lumen.output.kind": "tensor"}  # a fifth of the bytes of JSON; a server that knows it not sends JSON
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif")
NO_PICTURES = f"no pictures ({', '.join(IMAGE_SUFFIXES)}) in this folder"
NOT_A_FILE = "not a regular file"
SERVICE_TYPE, DISCOVERY_SECONDS = "_lumen._tcp.local.", 3.0
AHEAD = 1024  # requests that `infer_many` reads ahead of the answer that the caller gets next
HELD_BYTES_MAX = 256 << 20  # of unanswered payloads, which may have to be sent again
RETURN_SECONDS = 5.0  # after which a daemon that failed is tried again
HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")

log = logging.getLogger("lumen.client")


class LumenError(Exception):
    """A request failed. `code` is an ErrorCode or gRPC status in lower case, such as "invalid_argument"."""

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        super().__init__(f"{message} ({code})")
        self.code, self.message, self.detail = code, message, detail

    @classmethod
    def of_call(cls, error: grpc.RpcError) -> LumenError:
        """A gRPC failure as an error of ours."""
        call: Any = error  # grpc.RpcError is a Call too, which its type does not say
        return cls(call.code().name.lower(), call.details() or "the call failed")


@dataclass(frozen=True)
class Request:
    """What to ask: a task, its payload, and meta such as topk, labels, prompt_template or label_format."""

    task: str
    payload: bytes
    mime: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """An answer: `data` is the labels_v1 or embedding_v1 object, `meta` the response's own."""

    task: str
    mime: str
    data: dict[str, Any]
    meta: dict[str, str]


@dataclass(frozen=True)
class Door:
    """How to enter a daemon that does not stand open: PEM bytes, and the token. All of it is optional."""

    tls: bool = False
    ca: bytes | None = None  # who signed the daemon's certificate; None: whom the system trusts
    certificate: bytes | None = None  # our own, where the daemon asks for one, with its key
    key: bytes | None = None
    name: str = ""  # the certificate's, where it is not the address's
    token: str = ""


class LumenClient:
    """One channel to a daemon; safe to use from several threads. `timeout` is in seconds a call."""

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout: float = 60.0, door: Door | None = None) -> None:
        door = door or Door()
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS[0]),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS[1]),
        ]
        if door.name:
            options.append(("grpc.ssl_target_name_override", door.name))
        self.address, self.timeout = address, timeout
        self._metadata = (("authorization", f"Bearer {door.token}"),) if door.token else ()
        if door.tls:
            credentials = grpc.ssl_channel_credentials(door.ca, door.key, door.certificate)
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def __enter__(self) -> LumenClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def infer(self, task: str, payload: bytes, mime: str = "", meta: Mapping[str, str] | None = None) -> Result:
        """One request; chunked when its payload is over 1 MiB. Raises LumenError."""
        request = Request(task, payload, mime, meta or {})
        try:
            for response in self._stub.Infer(
                iter(_messages(request, "")), timeout=self.timeout, metadata=self._metadata
            ):
                return _result(task, response)
        except grpc.RpcError as error:
            raise LumenError.of_call(error) from error
        raise LumenError("internal", "the stream ended without an answer")

    def infer_many(self, requests: Iterable[Request]) -> Iterator[Result | LumenError]:
        """Many requests on one stream, answered in their order; one that fails yields its LumenError in its place.

        Requests are drawn by a thread, at most 34 ahead of the answers. Raises LumenError if the stream fails, and
        whatever `requests` raises.
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
            for number, response in enumerate(call):
                if response.correlation_id != str(number):
                    raise LumenError("internal", f"answer {number} carries the id {response.correlation_id!r}")
                yield _result_or_error(tasks.popleft(), response)
        except grpc.RpcError as error:
            raise LumenError.of_call(error) from error
        finally:
            call.cancel()

    def classify(
        self, image: bytes, task: str = "clip_classify", topk: int | None = None, labels: Sequence[str] | None = None
    ) -> list[tuple[str, float]]:
        """(label, probability) pairs, best first; `labels` are the caller's own (clip_classify). Raises LumenError."""
        meta = {} if topk is None else {"topk": str(topk)}
        if labels is not None:
            meta["labels"] = json.dumps(list(labels))
        rows = self.infer(task, image, meta=meta).data["labels"]
        return [(row["label"], row["score"]) for row in rows]

    def embed_image(self, image: bytes, task: str = "clip_image_embed") -> list[float]:
        """The picture's embedding: `dim` floats of unit length. Raises LumenError."""
        vector: list[float] = self.infer(task, image, meta=AS_TENSOR).data["vector"]
        return vector

    def embed_text(self, text: str, task: str = "clip_embed") -> list[float]:
        """The text's embedding, comparable with the same model's image embeddings. Raises LumenError."""
        vector: list[float] = self.infer(task, text.encode(), "text/plain", AS_TENSOR).data["vector"]
        return vector

    def capabilities(self) -> list[pb.Capability]:
        """One for each model. Raises LumenError."""
        try:
            return list(self._stub.StreamCapabilities(empty_pb2.Empty(), timeout=self.timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise LumenError.of_call(error) from error

    def models(self) -> dict[str, str]:
        """task -> the space of its vectors, or the model where none is told: what must be equal in one index.

        Raises LumenError.
        """
        found: dict[str, str] = {}
        for capability in self.capabilities():
            spaces = [value for key, value in sorted(capability.extra.items()) if key.endswith("_space")]
            found |= dict.fromkeys((task.name for task in capability.tasks), ", ".join(spaces or capability.model_ids))
        return found

    def health(self) -> str:
        """ "SERVING", "NOT_SERVING", ...: what the standard health service says. Raises LumenError.

        The reply is one varint field (number 1), read here so that no health package is needed.
        """
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        try:
            reply: bytes = check(b"", timeout=self.timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise LumenError.of_call(error) from error
        state = reply[1] if len(reply) == 2 and reply[0] == 0x08 else 0
        return HEALTH_STATES[state] if state < len(HEALTH_STATES) else "UNKNOWN"

    def degraded(self) -> list[str]:
        """What the daemon runs otherwise than its operator asked, such as images on the CPU. Raises LumenError."""
        try:
            _, call = self._stub.Health.with_call(empty_pb2.Empty(), timeout=self.timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise LumenError.of_call(error) from error
        return [str(value) for key, value in call.trailing_metadata() or () if key == "lumen-degraded"]


def infer_many(clients: Sequence[LumenClient], requests: Iterable[Request]) -> Iterator[Result | LumenError]:
    """Sends the requests to several daemons, each at its own pace; yields the answers in the order of the requests.

    A daemon whose model differs from the first daemon's is left out. When a daemon fails, the others get its unanswered
    requests, and it is used again once it is back. Each of these events is logged as a warning. Raises LumenError when
    no daemon is left, and whatever `requests` raises.
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
        self._window = IN_FLIGHT if len(clients) == 1 else IN_FLIGHT_EACH
        self._changed = threading.Condition()  # guards the daemons and everything below
        self._waiting: deque[tuple[int, Request]] = deque()
        self._answers: dict[int, Result | LumenError] = {}
        self._drawn = self._yielded = self._held = 0  # requests; answers; bytes of unanswered payloads
        self._models: dict[str, str] = {}  # task -> the model that every daemon must have
        self._drained = self._closed = False  # `requests` has ended; the caller wants no more answers
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

    def _next(self) -> Result | LumenError | None:
        def done() -> bool:
            return self._drained and self._yielded == self._drawn

        with self._changed:
            self._changed.wait_for(
                lambda: self._yielded in self._answers or done() or all(daemon.error for daemon in self._daemons)
            )
            answer = self._answers.pop(self._yielded, None)
            if answer:
                self._yielded += 1
                self._changed.notify_all()
            elif self._failure or not done():
                raise self._failure or self._last_error
            return answer

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
            self._drained = True
            self._changed.notify_all()

    def _run(self, daemon: _Daemon) -> None:
        """Uses the daemon, again and again if it fails."""
        while not (self._closed or daemon.refusal):
            try:
                self._use(daemon)
            except Exception as error:  # the thread must give its requests back, whatever happened
                failed = error if isinstance(error, LumenError) else LumenError("internal", repr(error))
                self._give_back(daemon, daemon.refusal or failed)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, RETURN_SECONDS)

    def _use(self, daemon: _Daemon) -> None:
        """Sends requests over one stream until it ends, and raises the reason."""
        models = daemon.client.models() if len(self._daemons) > 1 else {}
        taken: deque[tuple[int, Request]] = deque()
        with self._changed:
            daemon.models, daemon.taken, daemon.error = models, taken, None
            self._changed.notify_all()
        for answer in daemon.client._stream(iter(lambda: self._take(daemon, taken), None)):
            with self._changed:
                number, request = taken.popleft()
                self._answers[number] = answer
                self._held -= len(request.payload)
                self._changed.notify_all()
        raise LumenError("internal", "the daemon ended the stream")

    def _take(self, daemon: _Daemon, taken: deque[tuple[int, Request]]) -> Request | None:
        """The next request of the daemon's stream; None to end the stream."""

        def ended() -> bool:
            return self._closed or daemon.taken is not taken  # the stream has failed

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

    def _give_back(self, daemon: _Daemon, error: LumenError) -> None:
        with self._changed:
            if not (self._closed or daemon.error or len(self._daemons) == 1):
                again = f"; {len(daemon.taken)} unanswered requests go to the others" if daemon.taken else ""
                log.warning("%s: %s%s", daemon.client.address, error, again)
            self._waiting.extendleft(reversed(daemon.taken))
            daemon.taken, daemon.error, self._last_error = deque(), error, error
            self._changed.notify_all()


def _messages(request: Request, correlation_id: str) -> Iterator[pb.InferRequest]:
    shared: dict[str, Any] = {
        "correlation_id": correlation_id,
        "task": request.task,
        "payload_mime": request.mime,
        "meta": dict(request.meta),
    }
    payload = request.payload
    if len(payload) <= CHUNK_THRESHOLD:
        yield pb.InferRequest(payload=payload, **shared)
        return
    total = -(-len(payload) // CHUNK_BYTES)
    for seq in range(total):
        offset = seq * CHUNK_BYTES
        yield pb.InferRequest(
            payload=payload[offset : offset + CHUNK_BYTES], seq=seq, total=total, offset=offset, **shared
        )


def _result_or_error(task: str, response: pb.InferResponse) -> Result | LumenError:
    if response.error.message or response.error.code:
        code = response.error.code  # a newer server may have codes that are unknown here
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
    """A tensor answer, little-endian float32 `[1, dim]`, as the embedding_v1 object that it stands for."""
    values = array("f", payload)
    if sys.byteorder == "big":
        values.byteswap()
    return {"vector": values.tolist(), "dim": len(values), "model_id": meta.get("model_id", "")}


def _result(task: str, response: pb.InferResponse) -> Result:
    found = _result_or_error(task, response)
    if isinstance(found, LumenError):
        raise found
    return found


def discover(seconds: float = DISCOVERY_SECONDS, tls: bool = False) -> list[str]:
    """The addresses of all daemons that answer on mDNS within that time, in the order of their names.

    `LUMEN_MDNS_INTERFACE` is the IPv4 address of the interface to ask on; all by default. Those that speak TLS, or do
    not, unlike us, are left out with a warning. Raises LumenError if none is left.
    """
    try:
        from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, Zeroconf
    except ImportError:
        raise LumenError("unavailable", "--discover needs the zeroconf package") from None
    names: list[str] = []
    interface = os.environ.get("LUMEN_MDNS_INTERFACE")
    options: dict[str, Any] = {"interfaces": [interface]} if interface else {}
    browser = Zeroconf(ip_version=IPVersion.V4Only, **options)
    addresses = []
    try:
        ServiceBrowser(browser, SERVICE_TYPE, handlers=[lambda name, **_: names.append(name)])
        time.sleep(seconds)
        for name in sorted(set(names)):
            info = ServiceInfo(SERVICE_TYPE, name)  # most say everything at once
            if not (info.load_from_cache(browser) or info.request(browser, 1000)):
                continue
            address = f"{info.parsed_addresses(IPVersion.V4Only)[0]}:{info.port}"
            if (b"tls" in info.properties) == tls:
                addresses.append(address)
            else:
                log.warning("%s: left out: it speaks %s", address, "no TLS" if tls else "TLS; see --ca and --tls")
    finally:
        browser.close()
    if not addresses:
        raise LumenError("unavailable", f"no daemon answered on mDNS in {seconds:.0f} s")
    return list(dict.fromkeys(addresses))


# --- command line -----------------------------------------------------------------------------------------------


class UsageError(Exception):
    """The command cannot be run as it was given."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("client.py", description="Ask a lumen-clip daemon.")
    parser.add_argument("task", choices=(*IMAGE_TASKS, *TEXT_TASKS, "capabilities", "health"))
    parser.add_argument("inputs", nargs="*", help='files, folders or "-" (image tasks); texts (text tasks)')
    parser.add_argument("--address", action="append", metavar="HOST:PORT,...", help="of the daemon; several share work")
    parser.add_argument("--discover", action="store_true", help="find the daemons by mDNS")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of plain text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to .jsonl, or embeddings to .npz")
    parser.add_argument("--topk", metavar="K")
    parser.add_argument("--labels", metavar="A,B,...", help="own labels of clip_classify; @FILE has one a line")
    parser.add_argument("--label-set", metavar="NAME", help="a label set of the daemon's own, for clip_classify")
    parser.add_argument("--label-format", metavar="F", help="species as lineage, scientific or common")
    parser.add_argument("--rank", metavar="R", help="of species: kingdom to species, or auto")
    parser.add_argument("--within", metavar="A,B,...", help="the only taxa that count; @FILE has one a line")
    parser.add_argument("--min-score", metavar="P", help="leave labels under it out")
    parser.add_argument("--prompt-template", metavar="T", help='a text with one {}, such as "a photo of a {}"')
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--tls", action="store_true", help="the daemon speaks TLS; implied by the next four")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="who signed its certificate, or that certificate itself")
    parser.add_argument("--cert", type=Path, metavar="PEM", help="our own certificate, with --key")
    parser.add_argument("--key", type=Path, metavar="PEM")
    parser.add_argument("--server-name", default="", metavar="NAME", help="in its certificate, if not the address's")
    parser.add_argument("--token-file", type=Path, default=os.environ.get("LUMEN_TOKEN_FILE") or None, metavar="FILE")
    return parser


def find_daemons(options: argparse.Namespace) -> list[str]:
    """Their addresses, each once. Raises UsageError or LumenError."""
    if not options.discover:
        given = ",".join(options.address or [os.environ.get("LUMEN_ADDRESS") or DEFAULT_ADDRESS]).split(",")
        if "" in (addresses := [address.strip() for address in given]):
            raise UsageError(f"--address {','.join(given)}: allowed: HOST:PORT, several of them with commas")
        return list(dict.fromkeys(addresses))
    found = discover(tls=options.tls)
    print(f"client.py: found {', '.join(found)}", file=sys.stderr)
    return found


def door_of(options: argparse.Namespace, addresses: Sequence[str]) -> Door:
    """Raises UsageError, or OSError if a file cannot be read."""

    def content(path: Path | None) -> bytes | None:
        return path.read_bytes() if path else None

    if bool(options.cert) != bool(options.key):
        raise UsageError("--cert and --key: one without the other")
    token = read_utf8(options.token_file, "--token-file").strip() if options.token_file else ""
    for address in addresses if token and not options.tls else ():
        host = address.rpartition(":")[0].strip("[]")
        if not (host == "localhost" or host == "::1" or host.startswith("127.")):
            raise UsageError(f"--token-file: without --tls the token would travel in the clear to {address}")
    ca, certificate, key = map(content, (options.ca, options.cert, options.key))
    return Door(options.tls, ca, certificate, key, options.server_name, token)


def read_utf8(path: Path, option: str) -> str:
    """Raises UsageError if it is not UTF-8, OSError if it cannot be read."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{option}: {readable(str(path))} is not UTF-8") from None


def request_meta(options: argparse.Namespace) -> dict[str, str]:
    """The options as request meta. Raises UsageError for one that is not UTF-8, OSError for an unreadable file."""
    plain = ("topk", "label_format", "prompt_template", "label_set", "rank", "min_score")
    meta = {name: getattr(options, name) for name in plain}
    for name in ("labels", "within"):
        if text := getattr(options, name):
            file = Path(text[1:]) if text.startswith("@") else None
            own = read_utf8(file, f"--{name}").splitlines() if file else text.split(",")
            meta[name] = json.dumps([item.strip() for item in own if item.strip()], ensure_ascii=False)
    given = {key: value for key, value in meta.items() if value is not None}
    for name, value in given.items():
        if not is_text(value):
            raise UsageError(f"--{name.replace('_', '-')}: {readable(value)} is not UTF-8")
    return given | AS_TENSOR if options.task.endswith("_embed") else given


def is_text(name: str) -> bool:
    """Whether a command line argument or file name is UTF-8; Python keeps other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str) -> str:
    """A command line argument or file name as text that UTF-8 can encode: each byte that is not UTF-8 as `\\xNN`.

    It is what `os.fsencode(name).decode("utf-8", "backslashreplace")` gives on a system whose file names are UTF-8.
    """
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte; Windows allows them in file names
        return name.encode("utf-8", "backslashreplace").decode()


def image_paths(inputs: Sequence[str]) -> list[str]:
    """Files as they are, folders replaced by the pictures in them, sorted within a folder.

    What cannot be read stays in the list, so that it fails alone when its turn comes; `read_input` says why. Raises
    UsageError if no input is a file or a folder with pictures.
    """
    paths: list[str] = []
    wrong = []
    for name in inputs:
        path, found, reason = Path(name), [name], ""
        try:
            if name == "-":
                pass
            elif path.is_dir():
                found = pictures_in(name)
                if not found:
                    found, reason = [name], NO_PICTURES
            elif not path.is_file():
                reason = NOT_A_FILE if path.exists() else "no such file or folder"
        except OSError as error:
            reason = reason_of(error)
        paths += found
        if reason:
            wrong.append(f"{readable(name)}: {reason}")
    if wrong and len(wrong) == len(inputs):
        raise UsageError(wrong[0])
    return paths


def pictures_in(folder: str) -> list[str]:
    """The pictures in a folder and its subfolders, and the subfolders that cannot be read; sorted."""
    unreadable: list[str] = []
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=lambda error: unreadable.append(error.filename))
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    ]
    return list(map(str, sorted([*found, *map(Path, unreadable)])))


def read_input(task: str, name: str) -> bytes:
    """The payload of an input, "-" for standard input. Raises OSError or ValueError; the text says what is wrong."""
    if task in TEXT_TASKS:
        text = sys.stdin.read() if name == "-" else name
        if not is_text(text):
            raise ValueError("the text is not UTF-8")
        return text.encode()
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    if path.is_dir():
        raise OSError(errno.EISDIR, NO_PICTURES if os.access(name, os.R_OK | os.X_OK) else "Permission denied")
    if path.exists() and not path.is_file():  # reading a named pipe could wait for ever
        raise OSError(errno.EINVAL, NOT_A_FILE)
    return path.read_bytes()


def reason_of(error: Exception) -> str:
    """What is wrong with an input, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{'' if isinstance(error, OSError | ValueError) else type(error).__name__} {error}".split())


class Requests:
    """The requests for a list of inputs, each read when it is about to be sent.

    `rows` pairs the answers with the inputs. An input that cannot be read is not sent; it fails in its place.
    """

    def __init__(self, task: str, inputs: Iterable[str], meta: Mapping[str, str]) -> None:
        self._task, self._inputs, self._meta = task, inputs, meta
        self._drawn: deque[tuple[str, LumenError | None]] = deque()  # inputs without a row yet; their own errors

    def __iter__(self) -> Iterator[Request]:
        for name in self._inputs:
            try:
                payload = read_input(self._task, name)
                mime = "text/plain" if self._task in TEXT_TASKS else mimetypes.guess_type(name)[0]
            except Exception as error:  # whatever it is, it is this input's alone
                self._drawn.append((name, LumenError("invalid_argument", reason_of(error))))
                continue
            self._drawn.append((name, None))
            yield Request(self._task, payload, mime or "application/octet-stream", self._meta)

    def rows(self, answers: Iterable[Result | LumenError]) -> Iterator[tuple[str, Result | LumenError]]:
        """(input, its answer) in the order of the inputs."""
        for answer in answers:
            yield from self._failed()
            yield self._drawn.popleft()[0], answer
        yield from self._failed()

    def _failed(self) -> Iterator[tuple[str, LumenError]]:
        while self._drawn and (error := self._drawn[0][1]):
            yield self._drawn.popleft()[0], error


def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """A bar on the terminal for more than a handful, where tqdm is installed."""
    if total < 4:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Any] = tqdm(items, total=total, unit="photo")
    return bar


def as_text(data: Mapping[str, Any]) -> str:
    if "labels" in data:
        return "\n".join(f"{row['score']:7.2%}  {row['label']}" for row in data["labels"])
    first = ", ".join(f"{x:.4f}" for x in data["vector"][:6])
    return f"{data['model_id']}, {data['dim']} dimensions: [{first}, ...]"


def row_writer(options: argparse.Namespace, several: bool, stack: ExitStack) -> Callable[[dict[str, Any]], None]:
    """Where a result's row goes: plain text, JSON lines, or a file. Raises UsageError or OSError."""
    if options.out is None:
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a label is no reason to stop
            sys.stdout.reconfigure(errors="backslashreplace")

        def show(row: dict[str, Any]) -> None:
            if options.json:
                print(json.dumps(row, ensure_ascii=not utf8))
            elif "error" not in row:
                print((f"{row['input']}\n" if several else "") + as_text(row))

        return show
    name = readable(str(options.out))
    if options.out.suffix not in (".jsonl", ".npz"):
        raise UsageError(f"--out {name}: allowed: a name that ends in .jsonl or .npz")
    if options.out.suffix == ".npz" and options.task.endswith("classify"):
        raise UsageError(f"--out {name}: only embeddings go to .npz; allowed for {options.task}: .jsonl")
    if options.out.is_dir():
        raise UsageError(f"--out {name}: a folder; allowed: the name of a file")
    file = (NpzFile if options.out.suffix == ".npz" else JsonLinesFile)(options.out)
    stack.push(lambda kind, *_: file.close(complete=kind is None))
    return file.add


def create_partial(out: Path) -> tuple[Path, io.FileIO]:
    """A new file beside `out` for the rows of a run that has not ended; one of an earlier run is never overwritten.

    Raises OSError.
    """
    for number in itertools.count(1):
        path = out.with_name(f"{out.stem}.partial{f'-{number}' if number > 1 else ''}{out.suffix}")
        with suppress(FileExistsError):
            return path, path.open("xb", buffering=0)
    raise AssertionError


def report_partial(count: int, path: Path) -> None:
    print(f"client.py: {count} rows are in {readable(str(path))}", file=sys.stderr)


class JsonLinesFile:
    """Rows as JSON lines, each written as soon as it is known.

    They go to NAME.partial.jsonl, which is renamed to NAME.jsonl when the run is complete. A run that is interrupted
    leaves NAME.partial.jsonl with whole lines only, and does not touch an earlier NAME.jsonl.
    """

    def __init__(self, out: Path) -> None:
        """Raises OSError."""
        self._out = out
        self._path, self._file = create_partial(out)
        self._count = self._size = 0  # of whole lines

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OSError, such as on a full disk."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) :]
        self._size += len(line)
        self._count += 1

    def close(self, complete: bool) -> None:
        """Raises OSError."""
        with self._file, suppress(OSError):
            if not complete:
                self._file.truncate(self._size)  # a full disk or an interrupt may have cut the last line
        try:
            if complete:
                self._path.replace(self._out)
        finally:
            if self._path.exists():
                if self._count:
                    report_partial(self._count, self._path)
                else:
                    self._path.unlink()


class NpzFile:
    """Embeddings as an npz, written at the end: `paths` (text `[n]`), `vectors` (float32 `[n, dim]`) and `model_id`.

    Failed inputs are left out. A run that is interrupted leaves NAME.partial.npz, as `JsonLinesFile` does. If the file
    cannot be written, such as on a full disk, the folder for temporary files is tried.
    """

    def __init__(self, out: Path) -> None:
        """Raises UsageError without numpy, OSError if the folder cannot be written."""
        self._np = import_numpy()
        self._out = out
        path, file = create_partial(out)  # shows before the run whether a file can be created there at all
        file.close()
        path.unlink()
        self._paths: list[str] = []
        self._vectors: list[Any] = []
        self._model_id = ""

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises LumenError for a vector of another length, which would make the file unusable."""
        if "error" in row:
            return
        vector = self._np.array(row["vector"], self._np.float32)
        if self._vectors and vector.shape != self._vectors[0].shape:
            raise LumenError("internal", f"{row['input']}: {len(vector)} dimensions; before: {len(self._vectors[0])}")
        self._model_id = self._model_id or row["model_id"]
        self._vectors.append(vector)
        self._paths.append(row["input"])

    def close(self, complete: bool) -> None:
        """Raises OSError."""
        if not (complete or self._paths):
            return
        try:
            path = self._write(self._out)
        except OSError:
            report_partial(len(self._paths), self._write(Path(tempfile.gettempdir(), self._out.name)))
            raise
        try:
            if complete:
                path.replace(self._out)
        finally:
            if path.exists():
                report_partial(len(self._paths), path)

    def _write(self, out: Path) -> Path:
        """-> the new file beside `out`. Raises OSError and leaves nothing."""
        np = self._np
        vectors = np.stack(self._vectors) if self._vectors else np.array([], np.float32)
        path, file = create_partial(out)
        try:
            with io.BufferedWriter(file) as buffered:
                np.savez(buffered, paths=np.array(self._paths, dtype=str), vectors=vectors, model_id=self._model_id)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def import_numpy() -> Any:
    try:
        import numpy
    except ImportError:
        raise UsageError("--out: .npz needs the numpy package; .jsonl does not") from None
    return numpy


def run_task(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """Asks for every input; -> 1 if one failed. Raises LumenError, UsageError or OSError."""
    if not options.inputs:
        raise UsageError(
            f"{options.task}: name at least one {'text' if options.task in TEXT_TASKS else 'file or folder'}"
        )
    inputs = options.inputs if options.task in TEXT_TASKS else image_paths(options.inputs)
    failed = 0
    requests = Requests(options.task, inputs, request_meta(options))
    with ExitStack() as stack:
        write = row_writer(options, len(inputs) > 1, stack)
        answers = infer_many(clients, requests)
        for name, answer in progress(requests.rows(answers), len(inputs)):
            shown = readable(name)
            if isinstance(answer, LumenError):
                failed += 1
                print(f"client.py: {shown}: {answer.message}", file=sys.stderr)
                write({"input": shown, "error": answer.message})
            else:
                write({"input": shown, **answer.data})
    return 1 if failed else 0


def show_capabilities(client: LumenClient, as_json: bool) -> bool:
    for capability in client.capabilities():
        models, tasks = ", ".join(capability.model_ids), ", ".join(task.name for task in capability.tasks)
        if as_json:
            from google.protobuf.json_format import MessageToDict

            print(json.dumps(MessageToDict(capability, preserving_proto_field_name=True)))
        else:
            precisions = ", ".join(capability.precisions)
            print(f"{capability.service_name}: {models} on {capability.runtime} ({precisions})\n  {tasks}")
    return True


def show_health(client: LumenClient, as_json: bool) -> bool:
    state, degraded = client.health(), []
    try:
        degraded = client.degraded()
    except LumenError as error:
        if error.code != "unauthenticated":  # whether it serves is everybody's business; how, is not
            raise
    print(json.dumps({"status": state, "degraded": degraded}) if as_json else "\n".join([state, *degraded]))
    return state == "SERVING"


def show(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """What each daemon says of itself; -> 1 if one is not well."""
    well = True
    for client in clients:
        if len(clients) > 1 and not options.json:
            print(f"{client.address}:")
        try:
            well &= (show_health if options.task == "health" else show_capabilities)(client, options.json)
        except LumenError as error:
            print(f"client.py: {client.address}: {error}", file=sys.stderr)
            well = False
    return 0 if well else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    options.tls = any((options.tls, options.ca, options.cert, options.server_name))
    logging.basicConfig(level=logging.WARNING, format="client.py: %(message)s")
    addresses: list[str] = []
    try:
        addresses = find_daemons(options)
        door = door_of(options, addresses)
        with ExitStack() as stack:
            clients = [stack.enter_context(LumenClient(address, options.timeout, door)) for address in addresses]
            return (show if options.task in ("capabilities", "health") else run_task)(clients, options)
    except BrokenPipeError:
        # The reader of our output has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    except LumenError as error:
        print(f"client.py: {', '.join(addresses) or 'mDNS'}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"client.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
