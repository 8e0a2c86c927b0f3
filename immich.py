"""The port for immich: smart search over HTTP, with the requests of immich's own machine-learning service.

One thread runs an event loop, in which nothing blocks. It reads forms, submits jobs to the intake, which gRPC requests
use as well, and waits for their answers. Requests that the daemon does not support are forwarded to
LUMEN_IMMICH_FALLBACK.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.message import Message
from functools import partial
from typing import Any

import aiohttp
import orjson
from aiohttp import hdrs, web

from errors import BadInput, NotReady, Overload
from intake import Intake
from security import internal_error
from service import HTTP_CONNECTIONS_MAX, Daemon
from tasks import Models, Request

log = logging.getLogger("lumen.immich")

# Counts and times that nobody needs to change. immich's server has a few connections, each with one request.
REQUESTS_MAX = 64  # whole requests in progress; one more is answered with 503
FORWARDED_MAX = 16  # the same of forwarded requests
IDLE_S = 60  # time without a request; immich's HTTP client closes a connection after 4 s
UPLOAD_S = 20  # time for the body of a request; the same limit as for an upload over gRPC
ROOM_S = 10  # time that a body waits for memory
SEND_S = 20  # time in which the client reads nothing of a forwarded answer
FORWARD_S = 300  # time without a byte from the fallback; it may have to load a model. immich waits as long
CONNECT_S = 5  # time to connect to the fallback
CHECK_S = 0.5  # time between two checks of the idle connections; a tenth of it between two checks for free memory
RETRY_AFTER_S = 5
ENTRIES_WITHIN = 1 << 16  # bytes at the start of a form in which `entries` ends, if the rest is to be streamed
FORM_EXTRA = 1 << 16  # bytes of a form in addition to the image
PART_HEADERS_MAX = 1024  # bytes of the headers of a part
BOUNDARY_MAX = 70  # characters; RFC 2046
REASON_MAX = 200  # characters of an error in the status line, which immich writes into its log

CLIP = "clip"  # immich's name of smart search
# immich's type of a CLIP request -> the field with its input, and our task
KINDS = {"visual": ("image", "clip_image_embed"), "textual": ("text", "clip_embed")}
# The outcome and the status of a request that fails with an error of the task.
FAILURES: dict[type[Any], tuple[str, int]] = {BadInput: ("invalid_argument", 400), NotReady: ("unavailable", 503)}
EXAMPLE = 'allowed: {"clip": {"visual": {"modelName": NAME}}}, or textual in place of visual'
# Headers that belong to one connection (RFC 9110, 7.6.1).
HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
HOP_BY_HOP |= {"transfer-encoding", "upgrade", "proxy-connection", "host", "expect"}


class _Refused(Exception):
    """A response that is not a success. The text is one line for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status

    def response(self) -> web.Response:
        text = str(self)
        reason = text.encode("ascii", "replace").decode()[:REASON_MAX]
        headers = {hdrs.RETRY_AFTER: str(RETRY_AFTER_S)} if self.status == 503 else {}
        detail = {"detail": text.encode("utf-8", "replace").decode()}
        return web.json_bytes_response(detail, dumps=orjson.dumps, status=self.status, reason=reason, headers=headers)


# --- forms ------------------------------------------------------------------------------------------------------


def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart form, with the dashes before it. Raises _Refused."""
    header = Message()
    header[hdrs.CONTENT_TYPE] = content_type
    boundary = header.get_boundary("")
    if header.get_content_type() != "multipart/form-data" or not 0 < len(boundary) <= BOUNDARY_MAX:
        raise _Refused(422, "Content-Type: allowed: multipart/form-data with a boundary")
    return b"--" + boundary.encode("utf-8", "surrogateescape")


def parts(body: bytes | bytearray, boundary: bytes, begin: int = 0) -> Iterator[tuple[str, slice]]:
    """(name, content) of each complete part of a form that may be cut off. The name may be "".

    `begin`: 0, or 2 more than the end of the content of an earlier part.
    """
    at = body.find(boundary, begin)  # a preamble is allowed
    while at >= 0:
        headers = at + len(boundary)
        start = body.find(b"\r\n\r\n", headers, headers + PART_HEADERS_MAX)
        end = body.find(b"\r\n" + boundary, start + 4)
        if start < 0 or end < 0:
            return
        name = re.search(rb'form-data;(?:[^\r\n]*;)? ?name="([^"\r\n]*)"', body[headers:start])
        yield name[1].decode("utf-8", "replace") if name else "", slice(start + 4, end)
        at = end + 2


def read_entries(text: bytes | bytearray) -> tuple[str, str, str]:
    """What the field `entries` asks for: (task, kind, model). Raises _Refused.

    Kind ("visual" or "textual") and model are empty unless the task is CLIP.
    """
    try:
        tasks = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _Refused(422, f"entries: not JSON; {EXAMPLE}") from None
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(kinds, dict) for kinds in tasks.values()):
        raise _Refused(422, f"entries: {EXAMPLE}")
    if len(tasks) > 1 or len(tasks.get(CLIP, ())) > 1:
        raise _Refused(501, "entries: several tasks in one request; allowed: one")
    [(task, kinds)] = tasks.items()
    if task != CLIP:
        return task, "", ""
    kind, options = next(iter(kinds.items()), ("", None))
    model = options.get("modelName") if isinstance(options, dict) else None
    if kind not in KINDS or not isinstance(model, str):
        raise _Refused(422, f"entries: {EXAMPLE}")
    return task, kind, model


def immich_name(model: str) -> str:
    """immich's name of a model: `ViT-B-32__openai` of `ViT-B-32:openai` or of `immich-app/ViT-B-32__openai`.

    An int8 export has the name of its source, because immich has no other.
    """
    name = model.rpartition("/")[2].replace("::", "__").removesuffix("-int8")
    architecture, _, tag = name.partition(":")
    return f"{architecture}__{tag.replace('_', '-')}" if tag else name


class Upload:
    """The form of a request as it arrives. Its bytes are taken from the budget of payloads."""

    def __init__(self, request: web.Request, intake: Intake) -> None:
        """Raises _Refused if the headers are not those of a form, or announce too much."""
        if request.headers.get(hdrs.CONTENT_ENCODING):
            raise _Refused(415, "Content-Encoding: allowed: none")
        self.request, self.boundary = request, boundary_of(request.headers.get(hdrs.CONTENT_TYPE, ""))
        self._budget, self._size_max = intake.payloads, intake.request_bytes_max + FORM_EXTRA
        self._seen = 0  # bytes that have arrived
        self.held = 0  # bytes taken from the budget
        self.body = bytearray()
        self.ended = False
        self.check_size()

    def check_size(self) -> None:
        """Raises _Refused if the form is too large."""
        if max(self._seen, self.request.content_length or 0) > self._size_max:
            raise _Refused(413, f"the form has over {self._size_max} bytes, the most that is allowed")

    async def entry(self) -> tuple[str, str, str]:
        """Reads the form until `entries` is complete, and returns what it says; see `read_entries`. Raises _Refused."""
        at = 0  # where the first part that is not complete begins
        while True:
            before = len(self.body)
            await self.keep()
            if before < ENTRIES_WITHIN or self.ended:  # not again for each chunk of a large form
                for name, content in parts(self.body, self.boundary, at):
                    if name == "entries":
                        return read_entries(self.body[content])
                    at = content.stop + 2
            if self.ended:
                raise _Refused(422, f"entries: missing; {EXAMPLE}")

    async def keep(self) -> None:
        """Reads the next bytes, and appends them to the body as soon as there is memory for them. Raises Overload."""
        chunk = await self._read()
        deadline = time.monotonic() + ROOM_S
        while True:
            try:
                self._budget.take(len(chunk), gone=lambda: True, has_begun=self.held > 0)  # without waiting
                break
            except Overload:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(CHECK_S / 10)
        self.held += len(chunk)
        self.body += chunk

    async def whole(self) -> AsyncIterator[bytes]:
        """The whole form: what has been read, then the rest as it arrives. Raises _Refused or TimeoutError."""
        yield bytes(self.body)
        self.release()
        deadline = asyncio.get_running_loop().time() + UPLOAD_S
        while not self.ended:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await self._read()
            except TimeoutError:
                self.request.protocol.force_close()
                raise
            if chunk:
                yield chunk

    def release(self) -> None:
        self._budget.give(self.held)
        self.held = 0
        self.body.clear()

    async def _read(self) -> bytes:
        """The next bytes; b"" at the end. Raises _Refused, and ConnectionError if the client has left."""
        try:
            chunk = await self.request.content.readany()
        except RuntimeError as error:  # as aiohttp says it if the client left before the first read
            raise ConnectionResetError("the client has left") from error
        self.ended, self._seen = not chunk, self._seen + len(chunk)
        self.check_size()
        return chunk


# --- the server -------------------------------------------------------------------------------------------------


class ImmichServer:
    """The HTTP server. Its coroutines run on its own thread; `drain` is for the main thread."""

    def __init__(self, daemon: Daemon, host: str, port: int) -> None:
        """Binds the port and starts the server. Raises OSError if the port cannot be bound."""
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # connections wait until the loop runs
        log.info("immich's requests on %s port %d", host, bound.getsockname()[1])
        self._daemon = daemon
        self._waiting: dict[web.RequestHandler, float] = {}  # connections that wait for their client -> since when
        self._in_progress = 0  # whole requests
        self._forwarded = 0
        self._session: Any = None  # of the fallback
        # A request that comes back with this has been forwarded in a circle.
        self._via = f"1.1 lumen-clip-{uuid.uuid4().hex[:8]}"
        threading.Thread(target=lambda: asyncio.run(self._run(bound)), name="immich", daemon=True).start()

    def drain(self, seconds: float) -> None:
        """Waits up to `seconds` until the requests in progress are answered."""
        deadline = time.monotonic() + seconds
        while self._in_progress + self._forwarded and time.monotonic() < deadline:
            time.sleep(0.02)

    async def _run(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: log.debug("%s", context))
        app = web.Application(middlewares=[self._guard])
        app.add_routes([web.get("/", _root), web.get("/ping", self._ping), web.post("/predict", self._predict)])
        # What the library logs are errors of clients, each with a traceback. `_guard` logs what is ours.
        quiet = logging.getLogger("lumen.immich.http")
        quiet.setLevel(logging.CRITICAL)
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=quiet,
            handler_cancellation=True,  # if a client disconnects, its job is cancelled
            auto_decompress=False,
            read_bufsize=1 << 16,
        )
        await runner.setup()
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_connect=CONNECT_S, sock_read=FORWARD_S)
        async with aiohttp.ClientSession(
            timeout=timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=FORWARDED_MAX),
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
        ) as self._session:
            await loop.create_server(partial(self._connect, runner.server), sock=bound)
            while True:
                await asyncio.sleep(CHECK_S)
                self._end_idle_connections()

    # Connections

    def _connect(self, server: Any) -> asyncio.Protocol:
        """The protocol of a new connection. If there are too many, the one that has waited for longest is ended."""
        if len(self._waiting) + self._in_progress + self._forwarded >= HTTP_CONNECTIONS_MAX:
            self._end_connection(min(self._waiting, key=lambda connection: self._waiting[connection]))
        connection: web.RequestHandler = server()
        self._waiting[connection] = time.monotonic()
        return connection

    def _end_connection(self, connection: web.RequestHandler) -> None:
        del self._waiting[connection]
        connection.force_close()

    def _end_idle_connections(self) -> None:
        """Ends the connections that have waited for IDLE_S, and forgets those that are closed."""
        now = time.monotonic()
        for connection, since in list(self._waiting.items()):
            if now - since > (CHECK_S if connection.transport is None else IDLE_S):
                self._end_connection(connection)

    # Requests

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Turns errors into responses without a traceback or a path."""
        connection = request.protocol
        self._waiting[connection] = time.monotonic()  # for the body
        try:
            return await handler(request)
        except _Refused as error:
            return error.response()
        except Overload:
            self._daemon.traffic.count_rejected("too many bytes over HTTP", str(request.remote))
            return _Refused(503, "too many bytes of requests are waiting; try later").response()
        except TimeoutError:
            return _Refused(408, f"the request did not arrive within {UPLOAD_S} s").response()
        except (web.HTTPException, ConnectionError, aiohttp.ClientPayloadError):
            raise  # of the router, or the client has left
        except Exception as error:
            return _Refused(500, internal_error(error)).response()
        finally:
            if connection.transport is not None:
                self._waiting[connection] = time.monotonic()

    async def _ping(self, request: web.Request) -> web.Response:
        self._models()
        return web.Response(text="pong")

    async def _predict(self, request: web.Request) -> web.StreamResponse:
        self._models()
        upload = Upload(request, self._daemon.intake)
        try:
            async with asyncio.timeout(UPLOAD_S):
                task, kind, model = await upload.entry()
                while task == CLIP and not upload.ended:
                    await upload.keep()
            if task == CLIP:
                return await self._embed(upload, kind, model)
            return await self._forward(upload, task)
        finally:
            upload.release()

    async def _embed(self, upload: Upload, kind: str, model: str) -> web.Response:
        """Answers a request of smart search. Raises _Refused."""
        models, request, (field, task) = self._models(), upload.request, KINDS[kind]
        self._check_model(models, model)
        fields = dict(parts(upload.body, upload.boundary))
        if field not in fields:
            raise _Refused(400, f"{field}: missing, or the form is cut off")
        if self._in_progress >= REQUESTS_MAX:
            self._daemon.traffic.count_rejected("too many requests over HTTP", str(request.remote))
            raise _Refused(503, f"{REQUESTS_MAX} requests are in progress; try later")
        asked = Request("immich", task, "", {}, bytes(upload.body[fields[field]]), upload.held)
        upload.held, upload.body = 0, bytearray()
        # All connections from one address are one client, so that immich's share does not grow with their number.
        job = self._daemon.intake.job(asked, (f"http {request.remote}", id(request.protocol)))
        self._waiting.pop(request.protocol, None)
        self._in_progress += 1
        outcome = "cancelled"
        try:
            self._daemon.intake.begin(job, asked, models, alone=True)  # REQUESTS_MAX bounds the prepared pictures
            answer = await asyncio.wrap_future(job.answer)
            outcome = "ok"
        except Exception as error:
            outcome, status = FAILURES.get(type(error), ("internal", 500))
            text = internal_error(error) if status == 500 else str(error).replace("payload: ", f"{field}: ", 1)
            raise _Refused(status, text) from None
        finally:
            self._in_progress -= 1
            self._daemon.intake.finished(job, outcome)
        assert isinstance(answer.content, dict), task
        # The vector is a JSON array in a string: immich passes it to its database as it is.
        vector = orjson.dumps(answer.content["vector"], option=orjson.OPT_SERIALIZE_NUMPY).decode()
        width, height = asked.image_size
        sizes = {"imageHeight": height, "imageWidth": width} if width else {}
        return web.json_bytes_response({CLIP: vector, **sizes}, dumps=orjson.dumps)

    def _models(self) -> Models:
        models = self._daemon.serving()
        if models is None:
            raise _Refused(503, "the models are loading, or the daemon is stopping")
        return models

    def _check_model(self, models: Models, wanted: str) -> None:
        """Raises _Refused if immich asks for another model than the one that is served."""
        served = immich_name(models.loaded[CLIP].backend.model_id)
        if immich_name(wanted) == served:
            return
        log.warning(
            "immich asks for the model %(wanted)a, and this daemon serves %(served)a: set the CLIP model to %(served)a "
            "in immich's settings of smart search, or CLIP_MODEL to a form of %(wanted)a here",
            {"wanted": wanted[:80], "served": served},
        )
        raise _Refused(400, f"modelName: {wanted[:80]!a} is not served here; allowed: {served!a}")

    # What the daemon does not do

    async def _forward(self, upload: Upload, task: str) -> web.StreamResponse:
        """Passes a request to the fallback unchanged, and its response back. Both are streamed. Raises _Refused."""
        fallback, request, task = self._daemon.settings.lumen_immich_fallback, upload.request, f"{task[:40]!a}"
        if not fallback:
            raise _Refused(501, f"entries: {task} is not done here; set LUMEN_IMMICH_FALLBACK to a server that does it")
        if any(self._via in value for value in request.headers.getall(hdrs.VIA, ())):
            raise _Refused(508, "LUMEN_IMMICH_FALLBACK leads back to this daemon")
        if self._forwarded >= FORWARDED_MAX:
            raise _Refused(503, f"{FORWARDED_MAX} requests are being forwarded; try later")
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        headers.append((hdrs.VIA, self._via))
        self._waiting.pop(request.protocol, None)
        self._forwarded += 1
        try:
            async with self._session.post(
                f"{fallback}/predict", data=upload.whole(), headers=headers, allow_redirects=False
            ) as answer:
                return await _pass_on(request, answer)
        except (aiohttp.ClientError, OSError) as error:
            upload.check_size()
            text = "LUMEN_IMMICH_FALLBACK=%s: a request for %s could not be forwarded (%s)"
            log.warning(text, fallback, task, type(error).__name__)
            raise _Refused(502, f"{task} could not be forwarded to LUMEN_IMMICH_FALLBACK") from None
        finally:
            self._forwarded -= 1


async def _root(request: web.Request) -> web.Response:
    return web.json_bytes_response({"message": "Immich ML"}, dumps=orjson.dumps)


async def _pass_on(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Streams the fallback's response to the client."""
    headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP]
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            async with asyncio.timeout(SEND_S):
                await response.write(chunk)
        await response.write_eof()
    except (aiohttp.ClientError, OSError) as error:
        log.warning("a response of LUMEN_IMMICH_FALLBACK was cut off (%s)", type(error).__name__)
        request.protocol.force_close()  # the client would take a second status line for a part of the response
    return response
