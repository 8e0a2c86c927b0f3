"""The daemon on its network: TLS and the token at its door, and the mDNS name by which it is found.

Knows nothing of requests or models.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import socket
import ssl
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

import machine
from settings import SettingError, Settings

log = logging.getLogger("lumen.doors")


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
    """Turns away calls without the token, before they hold anything. The standard health service stays open.

    The refusal reads no message: one that waited for it would let silent strangers hold threads.
    """

    def __init__(self, token: bytes) -> None:
        self._expected = b"Bearer " + token

        def refuse(_: Any, context: Any) -> None:
            log.info("turned away %s: no valid token", context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata authorization: allowed: Bearer and the token")

        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        known = any(hmac.compare_digest(str(value).encode(), self._expected) for value in sent)
        if known or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return continuation(details)
        return self._refusal


# --- being found ------------------------------------------------------------------------------------------------


def advertised_ip(host: str) -> str | None:
    """The one IPv4 address that the LAN reaches us at, or None. Nothing is sent, and no internet is needed."""
    if host not in ("0.0.0.0", "::"):
        try:
            own = ipaddress.ip_address(host)
        except ValueError:
            return None
        return None if own.version == 6 or own.is_loopback else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("224.0.0.251", 5353))  # the mDNS group: the kernel names the interface it would use
            found = str(probe.getsockname()[0])
        except OSError:
            return None
    return None if ipaddress.ip_address(found).is_loopback else found


def is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


class Beacon:
    """The mDNS advertisement. It stands only while the models answer; a network without mDNS costs a warning."""

    def __init__(self, settings: Settings, host: str, port: int, runtime: str) -> None:
        self._settings, self._host, self._port = settings, host, port
        self._runtime = runtime
        self._zeroconf: Any = None
        self._address: str | None = ""  # of which is announced; None: there is none
        self.look_around()

    def look_around(self) -> None:
        """Announces the address that the LAN reaches us at, if it is another one than before.

        Boards start before their network, cables are pulled, and routers give out new addresses.
        """
        if not self._settings.clip_mdns_type:
            return
        address = self._settings.advertise_ip or advertised_ip(self._host)
        if address == self._address:
            return
        self.close()
        self._address = address
        if address is None:
            log.warning("mDNS: no address that others could reach; set ADVERTISE_IP to be found")
            return
        try:
            self._announce(address)
        except Exception as error:  # zeroconf raises its own kinds and OSError; none is worth the service
            log.warning("mDNS: not advertised (%s: %s)", type(error).__name__, error)

    def _announce(self, address: str) -> None:
        from zeroconf import InterfaceChoice, IPVersion, ServiceInfo, Zeroconf

        settings = self._settings
        properties = {
            "uuid": settings.clip_mdns_uuid or kept_uuid(settings.lumen_data_dir),
            "status": settings.clip_mdns_status,
            "version": settings.clip_mdns_version,
            "v": settings.clip_mdns_version,
            "runtime": self._runtime,
            **({"tls": "1"} if settings.lumen_tls_cert else {}),
        }
        # An address that is not ours (a container's host, say) is announced on all interfaces.
        interfaces = [address] if is_own(address) else InterfaceChoice.All
        zeroconf = self._zeroconf = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        for kind in settings.clip_mdns_type:
            info = ServiceInfo(
                kind,
                f"{settings.clip_mdns_name}.{kind}",
                port=self._port,
                properties=properties,
                server=f"lumen-clip-{properties['uuid'][:8]}.local.",
                addresses=[socket.inet_aton(address)],
            )
            zeroconf.register_service(info, allow_name_change=True)
            log.info("mDNS: %s at %s:%d", info.name, address, self._port)

    def close(self) -> None:
        """Says goodbye, so that clients forget us at once."""
        if self._zeroconf:
            try:
                self._zeroconf.unregister_all_services()
                self._zeroconf.close()
            except Exception as error:  # as above; the network may be gone
                log.warning("mDNS: no goodbye (%s: %s)", type(error).__name__, error)
            self._zeroconf = None


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
