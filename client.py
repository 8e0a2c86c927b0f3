"""The client: a Python class for programs, and a command line for people.

    python client.py clip_classify photo.jpg --topk 3
    python client.py clip_embed "a red bicycle"
    python client.py clip_image_embed ~/Photos --out vectors.npz --discover

`LumenClient` talks to one daemon, `infer_many` shares work among several, `discover` finds them by mDNS. To use the
client in another project, copy this file, `client_files.py` and `gen/`. It needs `grpcio` and `protobuf`. numpy (for
.npz), tqdm (for the progress bar) and zeroconf (for --discover) are imported where they are used.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

if __name__ == "__main__":  # gRPC reads this at import; its log must not appear beside the client's messages
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if importlib.util.find_spec("grpc") is None:  # usually another Python than intended
        print(f"client.py: grpcio is not installed for {sys.executable}; run .venv/bin/python", file=sys.stderr)
        sys.exit(2)

import grpc
from google.protobuf import empty_pb2

import client_files as files
from client_files import Credentials as Credentials
from client_files import OutputError, UsageError
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MESSAGE_BYTES_MAX = 65 << 20
# Larger payloads are sent in chunks of this size, at the least core time: for 3 MB, client and daemon together take 2.8
# core ms with chunks of 1 MiB, 4.3 with 256 KiB, and 5.1 with one message.
CHUNK_BYTES = 1 << 20
IN_FLIGHT_EACH = 8  # unanswered requests of each of several daemons. A single one limits them itself.
KEEPALIVE_MS = 10_000, 5_000  # interval and timeout: detects a daemon that has lost its network
AS_TENSOR = {"lumen.output.kind": "tensor"}  # a fifth of JSON's size; servers without support for it send JSON
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


class LumenClient:
    """A connection to one daemon. It can be used from several threads. The default port is 50051.

    `timeout`: seconds for each call except `infer_many`, which has no limit. Raises UsageError, a ValueError, for an
    invalid address, and for a token that would be sent unencrypted.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, timeout: float = 60.0, credentials: Credentials | None = None
    ) -> None:
        self._credentials = given = credentials or Credentials()
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS[0]),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS[1]),
        ]
        if given.name:
            options.append(("grpc.ssl_target_name_override", given.name))
        self.address, self.timeout = files.full_address(address), timeout
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
            raise LumenError(code, files.explain(code, details, self.address, self._credentials), details) from error

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
        self._changed = threading.Condition()  # guards the daemons and everything below
        self._waiting: deque[tuple[int, Request]] = deque()
        self._answers: dict[int, Result | LumenError | None] = {}  # None marks the end
        self._drawn = self._yielded = self._held = 0  # requests; answers; bytes of unanswered payloads
        self._models: dict[str, str] = {}  # task -> the model that every daemon must have
        self._closed = False  # the caller wants no more answers
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
        with self._changed:
            self._changed.wait_for(lambda: self._yielded in self._answers or all(d.error for d in self._daemons))
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

    def _use(self, daemon: _Daemon) -> NoReturn:
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


def discover(seconds: float = DISCOVERY_SECONDS, tls: bool = False) -> list[str]:
    """The addresses of all daemons that answer on mDNS within `seconds`, in the order of their names.

    `LUMEN_MDNS_INTERFACE` is the IPv4 address of the interface to search on; the default is all. Daemons whose use of
    TLS differs from `tls` are left out with a warning. Raises LumenError if none is left.
    """
    try:
        from zeroconf import IPVersion, ServiceBrowser, Zeroconf
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
            if not (info := browser.get_service_info(SERVICE_TYPE, name, 1000)):
                continue
            address = f"{info.parsed_addresses(IPVersion.V4Only)[0]}:{info.port}"
            if (b"tls" in info.properties) == tls:
                addresses.append(address)
            else:
                log.warning("%s: left out: it uses %s", address, "no TLS" if tls else "TLS; see --ca and --tls")
    finally:
        browser.close()
    if not addresses:
        advice = "start one, or give --address"
        raise LumenError("unavailable", f"no daemon answered on mDNS within {seconds:.0f} s; {advice}")
    return list(dict.fromkeys(addresses))


# --- command line -----------------------------------------------------------------------------------------------


def find_daemons(options: argparse.Namespace) -> list[str]:
    """The addresses of the daemons, without duplicates. Raises UsageError or LumenError."""
    if not options.discover:
        given = ",".join(options.address or [os.environ.get("LUMEN_ADDRESS") or DEFAULT_ADDRESS]).split(",")
        return list(dict.fromkeys(files.full_address(address.strip()) for address in given))
    found = discover(tls=options.tls)
    print(f"client.py: found {', '.join(found)}", file=sys.stderr)
    return found


def ask(
    clients: Sequence[LumenClient],
    task: str,
    inputs: Iterable[str],
    meta: Mapping[str, str],
    read: Callable[[str, str], tuple[bytes, str]] = files.read_input,
) -> Iterator[tuple[str, Result | LumenError]]:
    """Sends the inputs; yields (input, its answer) in their order.

    A thread reads each input when it is about to be sent. An input that cannot be read gets an error as its answer.
    """
    drawn: deque[tuple[str, LumenError | None]] = deque()  # inputs that have no answer yet; why they cannot be read

    def requests() -> Iterator[Request]:
        for name in inputs:
            try:
                payload, mime = read(task, name)
            except Exception as error:  # any error here concerns this input only
                drawn.append((name, LumenError("invalid_argument", files.reason_of(error))))
            else:
                drawn.append((name, None))
                yield Request(task, payload, mime, meta)

    def unread() -> Iterator[tuple[str, LumenError]]:
        while drawn and (error := drawn[0][1]):
            yield drawn.popleft()[0], error

    for answer in infer_many(clients, requests()):
        yield from unread()
        yield drawn.popleft()[0], answer
    yield from unread()


def take_heic(clients: Sequence[LumenClient], task: str) -> bool:
    """Whether every daemon that answers takes HEIC pictures. Raises LumenError if none answers."""
    taken: list[bool] = []
    failed = None
    for client in clients:
        try:
            taken.append(files.reads_heic(client.capabilities(), task))
        except LumenError as error:
            failed = error
    if failed and not taken:
        raise failed
    return all(taken)


def run_task(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """Sends every input and writes the answers; returns 1 if one failed. Raises LumenError, UsageError or OSError."""
    inputs, skipped = options.inputs, 0
    if options.task in files.TEXT_TASKS:
        files.warn_of_pictures(options.task, inputs)
    else:
        inputs, skipped = files.image_paths(inputs, lambda: take_heic(clients, options.task))
    meta, failed = files.request_meta(options), 0
    if options.task.endswith("_embed"):
        meta |= AS_TENSOR
    with files.open_output(options.out, options.task, options.json, len(inputs) > 1) as output:
        for name, answer in files.progress(ask(clients, options.task, inputs, meta), len(inputs)):
            shown = files.readable(name)
            if isinstance(answer, LumenError):
                failed += 1
                print(f"client.py: {shown}: {answer.message}", file=sys.stderr)
                output.add({"input": shown, "error": answer.message})
            else:
                output.add(files.row_of(shown, answer.data, answer.meta))
    if skipped:
        print(f"client.py: {files.heic_note(skipped)}", file=sys.stderr)
    return 1 if failed else 0


def report(error: LumenError, sources: Sequence[str]) -> None:
    """One line that names the daemons, unless the error does so itself."""
    named = any(source in error.message for source in sources)
    print(f"client.py: {'' if named else ', '.join(sources) + ': '}{error}", file=sys.stderr)


def show_health(client: LumenClient, as_json: bool) -> bool:
    """Prints the state of the daemon; returns whether it is serving. Raises LumenError."""
    state, degraded = client.health(), []
    try:
        degraded = client.degraded()
    except LumenError as error:
        if error.code != "unauthenticated":  # without the token, only the state is public
            raise
    files.print_health(state, degraded, as_json)
    return state == "SERVING"


def show(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """Prints the state or the capabilities of each daemon; returns 1 if one fails or is not serving."""
    well = True
    for client in clients:
        if len(clients) > 1 and not options.json:
            print(f"{client.address}:")
        try:
            if options.task == "health":
                well &= show_health(client, options.json)
            else:
                for capability in client.capabilities():
                    files.print_capability(capability, options.json)
        except LumenError as error:
            report(error, [client.address])
            well = False
    return 0 if well else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = files.build_parser().parse_intermixed_args(arguments)
    options.tls = any((options.tls, options.ca, options.cert, options.server_name))
    logging.basicConfig(level=logging.WARNING, format="client.py: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not stop the run
        sys.stdout.reconfigure(errors="backslashreplace")
    addresses: list[str] = []
    try:
        files.check_options(options)
        addresses = find_daemons(options)
        credentials = files.read_credentials(options, addresses)
        with ExitStack() as stack:
            clients = [stack.enter_context(LumenClient(address, options.timeout, credentials)) for address in addresses]
            return (show if options.task in ("capabilities", "health") else run_task)(clients, options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit, which must not fail
        return 1
    except UsageError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    except LumenError as error:
        report(error, addresses or ["mDNS"])
    except (OSError, OutputError) as error:
        print(f"client.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
