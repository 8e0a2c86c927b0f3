"""TLS, the access token, and admission of calls that wait for their request message."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from engine import forget_frames
from errors import SettingError
from settings import Settings

log = logging.getLogger("lumen.security")

SHORT_CALLS_MAX = 16  # health checks and reflection calls at the same time
SHORT_CALL_TIMEOUT_S = 20  # for the whole call, its request message included
LIVENESS = "liveness"  # the name under which the standard health service says whether the process should be ended
# The states of the standard health service: whether requests are answered, or the process is alive.
STATES = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}
HEALTH_WATCHES_MAX = 64  # open Watch calls of the standard health service; they occupy no thread


def tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """None for plaintext. Raises SettingError if the files are not a certificate, its key and a CA certificate."""
    cert, key, ca = "LUMEN_TLS_CERT", "LUMEN_TLS_KEY", "LUMEN_TLS_CLIENT_CA"
    paths = {name: getattr(settings, name.lower()) for name in (cert, key, ca)}
    if not any(paths.values()):
        return None
    for name, required in ((cert, key), (key, cert), (ca, cert)):
        if paths[name] and not paths[required]:
            raise SettingError(f"{name}={paths[name]}: needs {required} as well")
    pem = {name: _read_file(name, path) for name, path in paths.items() if path}
    try:  # gRPC does not validate the files; with invalid ones it would reject every client
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(paths[cert], paths[key])
    except (OSError, ValueError) as error:
        raise SettingError(f"{cert}={paths[cert]}: not a PEM certificate that {key} is the key of ({error})") from error
    try:
        if paths[ca]:
            context.load_verify_locations(paths[ca])
    except (OSError, ValueError) as error:
        raise SettingError(f"{ca}={paths[ca]}: not a PEM certificate ({error})") from error
    return grpc.ssl_server_credentials([(pem[key], pem[cert])], pem.get(ca), require_client_auth=ca in pem)


def read_token(settings: Settings, host: str) -> bytes:
    """The bearer token that every call must carry, or b"" if none is configured. Raises SettingError."""
    path = settings.lumen_token_file
    if not path:
        return b""
    token = _read_file("LUMEN_TOKEN_FILE", path).strip()
    if not re.fullmatch(rb"[!-~]{16,4096}", token):
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: allowed: one token of 16 printable ASCII characters or more")
    if not settings.lumen_tls_cert and not _is_loopback(host):
        text = "without LUMEN_TLS_CERT the token would be sent unencrypted; allowed then: --host 127.0.0.1"
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: {text}")
    if Path(path).stat().st_mode & 0o077:
        log.warning("LUMEN_TOKEN_FILE=%s can be read by others on this machine; chmod 600", path)
    return token


def check_immich_port(settings: Settings, host: str) -> None:
    """Raises SettingError if the port for immich would bypass TLS or the token: immich's server sends no token."""
    for name in ("LUMEN_TLS_CERT", "LUMEN_TOKEN_FILE"):
        if settings.lumen_immich_port and getattr(settings, name.lower()) and not _is_loopback(host):
            text = f"{name} is set, and the port for immich has neither TLS nor a token; allowed then: --host 127.0.0.1"
            raise SettingError(f"LUMEN_IMMICH_PORT={settings.lumen_immich_port}: {text}")


def _read_file(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{setting}={path}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Rejects calls without the token. The standard health service stays open.

    A call is rejected before its request message is read. Waiting for the message would let unauthenticated clients
    occupy threads.
    """

    def __init__(self, token: bytes, on_rejected: Callable[[str, str], None]) -> None:
        """`on_rejected` is called with the reason and the peer."""
        self._expected = b"Bearer " + token

        def reject(_: Any, context: Any) -> None:
            on_rejected("no valid token", context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata authorization: allowed: Bearer and the token")

        self._rejection = grpc.stream_stream_rpc_method_handler(reject)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        values = [value for key, value in details.invocation_metadata if key == "authorization"]
        authorized = any(hmac.compare_digest(str(value).encode(), self._expected) for value in values)
        if authorized or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return continuation(details)
        return self._rejection


def internal_error(error: BaseException) -> str:
    """Logs the exception under a number and forgets its frames; -> the text for the client, with only the number."""
    number = uuid.uuid4().hex[:8]
    log.error("internal error %s", number, exc_info=error)
    forget_frames(error)
    return f"internal error {number}; the daemon's log says more"


def stream_handler(behaviour: Callable[..., Any], request: type[Message], response: type[Message]) -> Any:
    """A handler for gRPC that receives MALFORMED for bytes that are no `request`.

    The text of unexpected exceptions goes to the log instead of the client, because it may contain a path.
    """

    def wrapped(messages: Any, context: Any) -> Iterator[Any]:
        try:
            yield from behaviour(messages, context)
        except Exception as error:
            # An RpcError: the call is over. With a code: raised by context.abort(), whose text is ours.
            if isinstance(error, grpc.RpcError) or context.code():
                raise
            context.abort(grpc.StatusCode.INTERNAL, internal_error(error))

    return grpc.stream_stream_rpc_method_handler(wrapped, partial(_parse, request), response.SerializeToString)


MALFORMED = object()  # in place of a message that could not be parsed


def _parse(request: type[Message], data: bytes) -> Any:
    """A message, or MALFORMED.

    If a deserializer raises, gRPC ends the call at once and again when the handler returns. Such a call is never
    released: it keeps its memory and its place among the streams of its connection.
    """
    try:
        return request.FromString(data)
    except DecodeError:
        return MALFORMED


def _valid(messages: Iterator[Any], context: Any) -> Iterator[Any]:
    for message in messages:
        if message is MALFORMED:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message is not valid for this method")
        yield message


class ShortCalls:
    """Standard health and reflection, whose calls wait for a request message and should end soon.

    Each occupies a thread meanwhile, gRPC sets no deadline for them, and anyone may open them. If there are more than
    SHORT_CALLS_MAX, the oldest one is cancelled. Each is cancelled after SHORT_CALL_TIMEOUT_S.

    Check and Watch take one message, but are registered as streams. For a unary call gRPC occupies a thread before the
    message has arrived, and that wait cannot be ended.
    """

    def __init__(self, service: str, alive: Callable[[], bool]) -> None:
        """`alive` answers a Check of LIVENESS, a name that Watch does not know. It is asked for each Check, so that the
        answer is right even if the main thread hangs."""
        self._service, self._alive = service, alive
        self.health = health.HealthServicer()
        self.set_serving(False)
        self._watches = threading.BoundedSemaphore(HEALTH_WATCHES_MAX)
        self._lock = threading.Lock()
        self._waiting: dict[Any, float] = {}  # context -> start by time.monotonic(); oldest first

    def set_serving(self, serving: bool) -> None:
        for name in ("", self._service):
            self.health.set(name, STATES[serving])

    def cancel_expired(self, timeout_s: float = SHORT_CALL_TIMEOUT_S) -> None:
        """Cancels the calls that are older than `timeout_s`."""
        for context, since in self._waiting.copy().items():
            if time.monotonic() - since > timeout_s:
                context.cancel()

    def handlers(self) -> dict[str, dict[str, Any]]:
        """Service name -> method name -> handler."""
        request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        question, answer = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        reflector: Any = reflection.ReflectionServicer((self._service, health.SERVICE_NAME, reflection.SERVICE_NAME))

        def reflect(messages: Iterator[Any], context: Any) -> Iterator[Any]:
            with self._admitted(context):
                yield from reflector.ServerReflectionInfo(_valid(messages, context), context)

        watch = grpc.stream_stream_rpc_method_handler(self._watch, partial(_parse, request), response.SerializeToString)
        return {
            health.SERVICE_NAME: {"Check": stream_handler(self._check, request, response), "Watch": watch},
            reflection.SERVICE_NAME: {"ServerReflectionInfo": stream_handler(reflect, question, answer)},
        }

    @contextmanager
    def _admitted(self, context: Any) -> Iterator[None]:
        with self._lock:
            if len(self._waiting) >= SHORT_CALLS_MAX:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                oldest.cancel()
            self._waiting[context] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(context, None)

    def _request(self, messages: Iterator[Any], context: Any) -> health_pb2.HealthCheckRequest:
        with self._admitted(context):
            request = next(_valid(messages, context), None)
        if request is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call carried no request")
        assert request is not None
        if request.service not in ("", self._service, LIVENESS):
            request.service = "unknown"  # the servicer keeps every name that it is asked for
        return request

    def _check(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        request = self._request(messages, context)
        if request.service == LIVENESS:
            yield health_pb2.HealthCheckResponse(status=STATES[self._alive()])
        else:
            yield self.health.Check(request, context)

    def _watch(self, messages: Iterator[Any], context: Any, send: Callable[[Any], None]) -> None:
        request = self._request(messages, context)
        if not self._watches.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{HEALTH_WATCHES_MAX} watch health already; try later")
        if context.add_callback(self._watches.release):
            self.health.Watch(request, context, send)
        else:
            self._watches.release()

    _watch.experimental_non_blocking = True  # type: ignore[attr-defined]  # gRPC then occupies no thread
