"""The daemon on its network: TLS, the token and the lobby at its door, and the mDNS name by which it is found.

Knows nothing of requests or models.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import random
import re
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

import machine
from settings import SettingError, Settings

log = logging.getLogger("lumen.doors")

LOBBY_S = 20  # for a health check or a question to reflection, message and all
WATCHERS_MAX = 64  # of the standard health service


# --- who may come in --------------------------------------------------------------------------------------------


def tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """None for plaintext. Raises SettingError for files that are not a certificate, its key and a CA."""
    names = "lumen_tls_cert", "lumen_tls_key", "lumen_tls_client_ca"
    paths = {name: getattr(settings, name) for name in names}
    if not any(paths.values()):
        return None
    for name, other in (names[:2], names[1::-1], (names[2], names[0])):
        if paths[name] and not paths[other]:
            raise SettingError(f"{name.upper()}={paths[name]}: needs {other.upper()} as well")
    pem: dict[str, bytes | None] = dict.fromkeys(names)
    for name, path in paths.items():
        if path:
            pem[name] = _read_setting(name, path)
    try:  # gRPC itself takes anything, and then refuses every client
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(paths[names[0]], paths[names[1]])
    except (OSError, ValueError) as error:
        text = f"not a PEM certificate that {names[1].upper()} is the key of ({error})"
        raise SettingError(f"{names[0].upper()}={paths[names[0]]}: {text}") from error
    try:
        if paths[names[2]]:
            context.load_verify_locations(paths[names[2]])
    except (OSError, ValueError) as error:
        raise SettingError(f"{names[2].upper()}={paths[names[2]]}: not a PEM certificate ({error})") from error
    certificate, key, ca = (pem[name] for name in names)
    assert certificate and key
    return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=bool(ca))


def read_token(settings: Settings, host: str) -> bytes:
    """The bearer token that every call must carry, or b"". Raises SettingError."""
    path = settings.lumen_token_file
    if not path:
        return b""
    token = _read_setting("lumen_token_file", path).strip()
    if not re.fullmatch(rb"[!-~]{16,4096}", token):
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: allowed: one token of 16 printable ASCII characters or more")
    if not settings.lumen_tls_cert and not _is_loopback(host):
        text = "without LUMEN_TLS_CERT the token would travel in the clear; allowed then: --host 127.0.0.1"
        raise SettingError(f"LUMEN_TOKEN_FILE={path}: {text}")
    if Path(path).stat().st_mode & 0o077:
        log.warning("LUMEN_TOKEN_FILE=%s can be read by others on this machine; chmod 600", path)
    return token


def _read_setting(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{name.upper()}={path}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Doorkeeper(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Rejects calls without the token before they occupy anything. The standard health service stays open.

    The refusal reads no message: one that waited for it would let silent strangers hold threads.
    """

    def __init__(self, token: bytes, count_rejected: Callable[[str, str], None]) -> None:
        """`count_rejected` is called with the reason and the peer of each rejected call."""
        self._expected = b"Bearer " + token

        def refuse(_: Any, context: Any) -> None:
            count_rejected("no valid token", context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata authorization: allowed: Bearer and the token")

        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        known = any(hmac.compare_digest(str(value).encode(), self._expected) for value in sent)
        if known or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return continuation(details)
        return self._refusal


class Lobby:
    """Places for calls that wait for a message and should be over in a moment: standard health and reflection.

    gRPC gives them a thread each for as long as they like, and anyone may open them. Here the oldest leaves when the
    places are taken, and each after LOBBY_S.
    """

    def __init__(self, places: int) -> None:
        self._places, self._lock = places, threading.Lock()
        self._calls: dict[Any, float] = {}  # context -> when it came, by time.monotonic(); oldest first

    @contextmanager
    def seat(self, context: Any) -> Iterator[None]:
        with self._lock:
            oldest = next(iter(self._calls)) if len(self._calls) >= self._places else None
            if oldest:
                del self._calls[oldest]
            self._calls[context] = time.monotonic()
        if oldest:
            oldest.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._calls.pop(context, None)

    def check(self, now: float, patience: float | None = None) -> None:
        """Ends the calls that are older than `patience`, or LOBBY_S."""
        limit = LOBBY_S if patience is None else patience
        with self._lock:
            late = [context for context, since in self._calls.items() if now - since > limit]
        for context in late:
            context.cancel()


def discreet(behaviour: Callable[[Any, Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
    """An exception that escaped would be sent to the client with its text, which may be a path. The log gets it."""

    def told(messages: Any, context: Any) -> Iterator[Any]:
        try:
            yield from behaviour(messages, context)
        except grpc.RpcError:  # the call is over
            raise
        except Exception as error:
            if context.code():  # context.abort()'s own, which has its text from us
                raise
            text = internal_error(error)
            context.abort(grpc.StatusCode.INTERNAL, text)

    return told


def internal_error(error: BaseException) -> str:
    """What a client is told of an exception: a number, by which the log has the story."""
    number = uuid.uuid4().hex[:8]
    log.error("internal error %s", number, exc_info=error)
    return f"internal error {number}; the daemon's log says more"


UNREADABLE = object()  # in the place of a message


def readable(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A parser for gRPC's handlers that does not raise; what it cannot parse is UNREADABLE.

    Were it to raise, gRPC would end the call itself and then once more when the handler ends. Such a call is never
    over: its memory stays, and so does its place among the streams of its connection.
    """

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return UNREADABLE

    return read


def lobby_handlers(lobby: Lobby, servicer: health.HealthServicer, service: str) -> dict[str, dict[str, Any]]:
    """Standard health of `service`, and reflection: service's name -> its methods' handlers.

    They are streams to gRPC, though Check and Watch take one message: a thread is given to a unary call before its
    message has come, and nothing could end it.
    """
    watchers = threading.BoundedSemaphore(WATCHERS_MAX)

    def parsed(messages: Iterator[Any], context: Any) -> Iterator[Any]:
        for message in messages:
            if message is UNREADABLE:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bytes that are no message of this method's")
            yield message

    def asked(messages: Iterator[Any], context: Any) -> health_pb2.HealthCheckRequest:
        with lobby.seat(context):
            request = next(parsed(messages, context), None)
        if request is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call carried no request")
        assert request is not None
        if request.service not in ("", service):
            request.service = "unknown"  # the servicer remembers every name that it is asked for
        return request

    def check(messages: Iterator[Any], context: Any) -> Iterator[Any]:
        yield servicer.Check(asked(messages, context), context)

    def watch(messages: Iterator[Any], context: Any, send: Callable[[Any], None]) -> None:
        request = asked(messages, context)
        if not watchers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS_MAX} watch health already; try later")
        if context.add_callback(watchers.release):
            servicer.Watch(request, context, send)
        else:
            watchers.release()

    watch.experimental_non_blocking = True  # type: ignore[attr-defined]  # gRPC's own way to hold no thread

    mirror: Any = reflection.ReflectionServicer((service, health.SERVICE_NAME, reflection.SERVICE_NAME))

    def reflect(messages: Iterator[Any], context: Any) -> Iterator[Any]:
        with lobby.seat(context):
            yield from mirror.ServerReflectionInfo(parsed(messages, context), context)

    handler = grpc.stream_stream_rpc_method_handler
    ask, answer = readable(health_pb2.HealthCheckRequest.FromString), health_pb2.HealthCheckResponse.SerializeToString
    question = readable(reflection_pb2.ServerReflectionRequest.FromString)
    answers = reflection_pb2.ServerReflectionResponse
    return {
        health.SERVICE_NAME: {
            "Check": handler(discreet(check), ask, answer),
            "Watch": handler(watch, ask, answer),
        },
        reflection.SERVICE_NAME: {
            "ServerReflectionInfo": handler(discreet(reflect), question, answers.SerializeToString),
        },
    }


# --- being found ------------------------------------------------------------------------------------------------


READY_ONLY = "_lumen._tcp.local."
LOOK_S = 5.0  # between two looks at the network's state
PROBE_MS = 750  # in which whoever has a name says so (RFC 6762, 8.1)
CHECK_S = 60.0  # after a power cut daemons may start before the switch between them does
SETTLE_S = 1.25  # what was heard less than a second ago is not replaced by what comes now (RFC 6762, 10.2)
GOODBYE_S = 5.0
LINKS = Path("/sys/class/net")
# What leads to containers and virtual machines of this host, or through a VPN, whatever it looks like otherwise.
ELSEWHERE = re.compile(
    "docker|br-|veth|virbr|vnet|lxc|lxd|incus|podman|cni|cali|cilium|flannel|weave|kube|nodelocal|vmnet|vboxnet"
    "|tun|tap|utun|ppp|ipsec|wg|tailscale|zt|ham|nebula|nordlynx|proton|warp|CloudflareWARP"
)


def advertised_ip(host: str, links: Path = LINKS) -> str | None:
    """The one IPv4 address that the LAN reaches us at, or None. Nothing is sent, and no internet is needed."""
    if host not in ("0.0.0.0", "::"):
        try:
            own = ipaddress.ip_address(host)
        except ValueError:
            return None
        return None if own.version == 6 or own.is_loopback else host
    import ifaddr  # zeroconf's own

    on_lan = [
        (adapter.name, str(ip.ip))
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4 and not ipaddress.ip_address(str(ip.ip)).is_loopback and leads_to_lan(links / adapter.name)
    ]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("224.0.0.251", 5353))  # the mDNS group: the kernel names the interface it would use
            hint = str(probe.getsockname()[0])
        except OSError:  # no default route: the LAN is offline
            hint = ""

    def rank(name: str, address: str) -> tuple[bool, ...]:  # of interfaces alike, the one that the system has first
        link = links / name
        return _read(link / "operstate") == "down", address.startswith("169.254."), address != hint, not _is_real(link)

    return min(on_lan, key=lambda found: rank(*found), default=("", None))[1]


def leads_to_lan(link: Path) -> bool:
    """Whether an interface can be the LAN's, by its folder under /sys/class/net; by its name alone without one."""
    flags = int(_read(link / "flags") or "0", 16)
    strange = _read(link / "type") not in ("", "1", "32")  # Ethernet, Wi-Fi too, and InfiniBand
    if strange or flags & 0x98 or (link / "tun_flags").exists():  # loopback, point to point, or without ARP
        return False
    if (link / "bridge").exists():
        return _is_real(link)  # one that joins containers or virtual machines to nothing is Docker's or libvirt's
    return not ELSEWHERE.match(link.name)


def _is_real(link: Path) -> bool:
    """Whether there is hardware under it, be it by way of a bridge, a bond or a VLAN."""
    return (link / "device").exists() or any(map(_is_real, link.glob("lower_*")))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _listens(address: str, port: int) -> bool | None:
    """Whether somebody does there; None: there is no such machine."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True


class Beacon:
    """The mDNS advertisement, on a thread of its own; a network without mDNS costs a warning.

    It stands from the start with `status=loading`, for whoever asks before the models answer is told to come again;
    `_lumen._tcp` only while they answer: the photo app's releases with SDK 1.3 ask five times in 15 s, then never.
    The name is this daemon's for good (its uuid is kept), and another daemon's of the same name gets a longer one.
    """

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self._settings, self._host, self._port = settings, host, port
        self._runtime = ""  # while the models load
        self._zeroconf: Any = None
        self._address: str | None = ""  # of which is announced; None: there is none
        self._uuid = self._instance = self._server = ""
        self._told: dict[str, dict[str, str]] = {}  # service type -> its TXT
        self._told_at = self._checked_at = time.monotonic()
        self._contested = self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mdns", daemon=True)
        if settings.clip_mdns_type:
            self._thread.start()

    def serve(self, runtime: str) -> None:
        """From now on the models answer."""
        self._runtime = runtime
        self._wake.set()

    def close(self) -> None:
        """Says goodbye, so that clients forget us at once."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(GOODBYE_S)

    def _run(self) -> None:
        said = ""
        while not self._closing:
            try:
                self._look_around()
            except Exception as error:  # zeroconf raises its own kinds and OSError; none is worth the service
                text = f"{type(error).__name__}: {error}"
                if text != said:
                    log.warning("mDNS: not advertised (%s)", text)
                said = text
                self._withdraw()
                self._address = ""
            self._wake.wait(LOOK_S)
            self._wake.clear()
        self._withdraw()

    def _look_around(self) -> None:
        """Announces what has changed: the models' state, the name, or the address that the LAN reaches us at.

        Boards start before their network, cables are pulled, and routers give out new addresses.
        """
        address = self._settings.advertise_ip or advertised_ip(self._host)
        if address != self._address:
            self._withdraw()
            self._address = address
            if address is None:
                log.warning("mDNS: no address that others could reach; set ADVERTISE_IP to be found")
            else:
                self._open(address)
        if address and self._contested:
            self._contested = False
            self._defend(address)
        if address:
            self._tell(address)
            self._check()

    def _open(self, address: str) -> None:
        """Finds names that are nobody else's."""
        from zeroconf import InterfaceChoice, IPVersion, Zeroconf

        # An address that is not ours (a container's host, say) is announced on all interfaces.
        interfaces = [address] if is_own(address) else InterfaceChoice.All
        self._zeroconf = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        self._uuid = self._settings.clip_mdns_uuid or kept_uuid(self._settings.lumen_data_dir)
        time.sleep(random.uniform(0, 0.25))  # daemons that start together shall not all ask at once
        hosts = names = 0
        while True:
            self._server, self._instance = self._name(hosts, names)
            services, addresses = self._claims()
            if addresses:
                log.warning("mDNS: the daemon at %s has the uuid of this one; is its data folder a copy?", addresses[0])
                hosts += 1
            elif services:
                log.info("mDNS: %s is the name of another daemon", self._instance)
                names += 1
            else:
                break
        self._zeroconf.add_listener(_witness(self._hear), None)

    def _name(self, hosts: int, names: int) -> tuple[str, str]:
        """The names of the host and of the instance, after so many that were taken."""
        own = f"-{self._uuid[:8]}"
        host = f"lumen-clip{own}" + (f"-{hosts + 1}" if hosts else "")
        longer = (own if names else "") + (f"-{names}" if names > 1 else "")
        name = self._settings.clip_mdns_name.encode()[: 63 - len(longer.encode())].decode(errors="ignore")
        return f"{host}.local.".lower(), name + longer

    def _claims(self) -> tuple[list[tuple[str, int]], list[str]]:
        """Who else has our names: (host name, port) of the instance, addresses of the host.

        What others remember of our own life before this one is no claim.
        """
        from zeroconf import ServiceInfo

        zeroconf, kinds = self._zeroconf, self._settings.clip_mdns_type
        infos = [ServiceInfo(kind, f"{self._instance}.{kind}", server=self._server) for kind in kinds]

        async def ask() -> None:
            await asyncio.gather(*(info.async_request(zeroconf, PROBE_MS) for info in infos))

        asyncio.run_coroutine_threadsafe(ask(), zeroconf.loop).result(10)
        names = [self._server, *(info.name for info in infos)]
        records = [record for name in names for record in zeroconf.cache.entries_with_name(name) if record.ttl]
        services = {service for record in records if (service := _service(record)) and self._is_rival(*service)}
        addresses = {host for record in records if (host := _ipv4_of(record)) and host != self._address}
        return sorted(services), sorted(host for host in addresses if _listens(host, self._port) is not None)

    def _is_rival(self, server: str, port: int) -> bool:
        if server != self._server:
            return True
        return port != self._port and _listens(self._address or "", port) is True  # two with one data folder

    def _hear(self, record: Any) -> None:
        """Notes that somebody says other things of our names than we do; on zeroconf's thread."""
        instances = [f"{self._instance}.{kind}".lower() for kind in self._told]
        service, address = _service(record), _ipv4_of(record)
        if (record.key in instances and service not in (None, (self._server, self._port))) or (
            record.key == self._server and address not in ("", self._address)
        ):
            self._contested = True
            self._wake.set()

    def _check(self) -> None:
        """Asks now and then whether another has the name too; clients' questions are answered to them alone."""
        from zeroconf import DNSOutgoing, DNSQuestion  # type: ignore[attr-defined]

        if time.monotonic() - self._checked_at > CHECK_S:
            self._checked_at = time.monotonic()
            query = DNSOutgoing(0)
            for kind in self._told:
                query.add_question(DNSQuestion(f"{self._instance}.{kind}", 33, 1))  # SRV, IN
            self._zeroconf.send(query)

    def _defend(self, address: str) -> None:
        """Of two that took a name at the same moment, or met later, the one that sorts first keeps it."""
        services, addresses = self._claims()
        if (services and services[0] < (self._server, self._port)) or (addresses and addresses[0] < address):
            self._withdraw()
            self._open(address)
        self._told = {kind: {} for kind in self._told}  # to be told once more, over the other's words

    def _tell(self, address: str) -> None:
        from zeroconf import ServiceInfo

        settings, runtime = self._settings, self._runtime
        properties = {
            "uuid": self._uuid,
            "status": settings.clip_mdns_status if runtime else "loading",
            "version": settings.clip_mdns_version,
            "v": settings.clip_mdns_version,
            **({"runtime": runtime} if runtime else {}),
            **({"tls": "1"} if settings.lumen_tls_cert else {}),
        }
        if self._told:
            time.sleep(max(self._told_at + SETTLE_S - time.monotonic(), 0))
        for kind in settings.clip_mdns_type:
            if self._told.get(kind) == properties or (kind == READY_ONLY and not runtime):
                continue
            info = ServiceInfo(
                kind,
                f"{self._instance}.{kind}",
                port=self._port,
                properties=properties,
                server=self._server,
                addresses=[socket.inet_aton(address)],
            )
            if kind in self._told:
                self._zeroconf.update_service(info)
            else:
                self._zeroconf.register_service(info, cooperating_responders=True)  # nobody has the name: we asked
                log.info("mDNS: %s at %s:%d", info.name, address, self._port)
            self._told[kind], self._told_at = properties, time.monotonic()

    def _withdraw(self) -> None:
        if self._zeroconf:
            try:
                self._zeroconf.close()  # says goodbye
            except Exception as error:  # as above; the network may be gone
                log.warning("mDNS: no goodbye (%s: %s)", type(error).__name__, error)
            self._zeroconf, self._told = None, {}


def _service(record: Any) -> tuple[str, int] | None:
    """(host name, port) of an SRV record."""
    return (record.server.lower(), record.port) if hasattr(record, "port") else None


def _ipv4_of(record: Any) -> str:
    """The address of an A record, or ""."""
    packed = getattr(record, "address", b"")
    return socket.inet_ntoa(packed) if len(packed) == 4 else ""


def _witness(hear: Callable[[Any], None]) -> Any:
    from zeroconf import RecordUpdateListener

    class Witness(RecordUpdateListener):
        def async_update_records(self, zc: Any, now: float, records: list[Any]) -> None:
            for update in records:
                hear(update.new)

    return Witness()


def kept_uuid(data_dir: Path) -> str:
    """This node's name across restarts."""
    path = data_dir / "uuid"
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except (OSError, ValueError):
        fresh = str(uuid.uuid4())
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        machine.replace_file(path, f"{fresh}\n".encode())
    except OSError as error:
        log.warning("cannot keep the node's uuid in %s (%s)", path, error)
    return fresh
