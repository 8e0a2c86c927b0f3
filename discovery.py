"""mDNS: advertises the daemon on the local network, with one IPv4 address and a name that survives restarts.

Conflict detection is zeroconf's. It probes for a name before it takes it, and never afterwards.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import machine
from settings import Settings

log = logging.getLogger("lumen.discovery")

MDNS_VERSION = "1.0.0"  # TXT `version` and `v`, which apps show; upstream's own value
READY_ONLY_TYPE = "_lumen._tcp.local."
NETWORK_CHECK_S = 5.0  # between two checks for another address
UPDATE_INTERVAL_S = 1.25  # receivers keep records that are less than a second old beside new ones (RFC 6762, 10.2)
PROBE_TIMEOUT_S, QUERY_TIMEOUT_MS = 20, 750
GOODBYE_TIMEOUT_S = 5.0
INTERFACES = Path("/sys/class/net")
# Interfaces of containers, virtual machines and VPNs, which the local network cannot reach.
VIRTUAL_NAMES = re.compile(
    "docker|br-|veth|virbr|vnet|lxc|lxd|incus|podman|cni|cali|cilium|flannel|weave|kube|nodelocal|vmnet|vboxnet"
    "|tun|tap|utun|ppp|ipsec|wg|tailscale|zt|ham|nebula|nordlynx|proton|warp|CloudflareWARP"
)


class Advertiser:
    """Keeps the mDNS advertisement up to date, on its own thread. A network without mDNS costs only a warning.

    The advertisement starts with `status=loading`. `_lumen._tcp` is added when the models are ready, because the photo
    app's releases with SDK 1.3 query a new node five times in 15 s and then never again.
    """

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self._settings, self._host, self._port = settings, host, port
        self._runtime = ""  # empty while the models load
        self._zeroconf: Any = None  # a zeroconf.Zeroconf, while there is an address to advertise
        self._address: str | None = ""  # the advertised one; None if there is none to advertise
        self._uuid = self._instance = ""
        self._published: dict[str, dict[str, str]] = {}  # service type -> TXT properties
        self._published_at = time.monotonic()
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mdns", daemon=True)
        if settings.clip_mdns_type:
            self._thread.start()

    def set_ready(self, runtime: str) -> None:
        """Advertises the daemon as ready, with the runtime of its models."""
        self._runtime = runtime
        self._wake.set()

    def close(self) -> None:
        """Withdraws the advertisement, so that clients forget the daemon at once."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(GOODBYE_TIMEOUT_S)

    def _run(self) -> None:
        last_warning = ""
        while not self._closing:
            try:
                self._update()
            except Exception as error:  # zeroconf's exceptions and OSError; the service goes on without mDNS
                warning = f"{type(error).__name__}: {error}"
                if warning != last_warning:
                    log.warning("mDNS: not advertised (%s)", warning)
                last_warning = warning
                self._withdraw()
                self._address = ""
            self._wake.wait(NETWORK_CHECK_S)
            self._wake.clear()
        self._withdraw()

    def _update(self) -> None:
        """Publishes what has changed: the state of the models, or the address, which a router may renew or which
        exists only when the network has started."""
        address = self._settings.advertise_ip or advertised_ip(self._host)
        if address != self._address:
            self._withdraw()
            self._address = address
            if address is None:
                log.warning("mDNS: no address that others could reach; set ADVERTISE_IP to be found")
            else:
                self._open(address)
        if address:
            self._publish(address)

    def _open(self, address: str) -> None:
        from zeroconf import InterfaceChoice, IPVersion, Zeroconf

        # An address of another machine (the host of a container, for example) is advertised on all interfaces.
        interfaces = [address] if is_local_address(address) else InterfaceChoice.All
        self._zeroconf = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        self._uuid = self._settings.clip_mdns_uuid or kept_uuid(self._settings.lumen_data_dir)
        self._instance = self._settings.clip_mdns_name
        if self._is_taken():
            log.info("mDNS: another daemon has the name %s", self._instance)
            suffix = f"-{self._uuid[:8]}"
            shortened = self._instance.encode()[: 63 - len(suffix.encode())].decode(errors="ignore")
            self._instance = shortened + suffix

    def _is_taken(self) -> bool:
        """Whether another daemon has the instance name, with any of the service types. zeroconf does the probing."""
        from zeroconf import NonUniqueNameException, ServiceInfo

        infos = [ServiceInfo(kind, f"{self._instance}.{kind}") for kind in self._settings.clip_mdns_type]
        checks = [self._zeroconf.async_check_service(info, allow_name_change=False) for info in infos]
        probes = [asyncio.run_coroutine_threadsafe(check, self._zeroconf.loop) for check in checks]
        for info, probe in zip(infos, probes, strict=True):
            try:
                probe.result(PROBE_TIMEOUT_S)
            except NonUniqueNameException:
                # After a crash, a sleep proxy or an mDNS reflector may still answer with this daemon's old records.
                info.request(self._zeroconf, QUERY_TIMEOUT_MS)
                if info.properties.get(b"uuid") != self._uuid.encode():
                    return True
        return False

    def _publish(self, address: str) -> None:
        """Registers the service types that are not registered yet, and updates those whose properties have changed."""
        from zeroconf import ServiceInfo

        settings, runtime = self._settings, self._runtime
        properties = {
            "uuid": self._uuid,
            "status": "ready" if runtime else "loading",
            "version": MDNS_VERSION,
            "v": MDNS_VERSION,
            **({"runtime": runtime} if runtime else {}),
            **({"tls": "1"} if settings.lumen_tls_cert else {}),
        }
        if self._published:
            time.sleep(max(self._published_at + UPDATE_INTERVAL_S - time.monotonic(), 0))
        for kind in settings.clip_mdns_type:
            if self._published.get(kind) == properties or (kind == READY_ONLY_TYPE and not runtime):
                continue
            info = ServiceInfo(
                kind,
                f"{self._instance}.{kind}",
                port=self._port,
                properties=properties,
                server=f"lumen-clip-{self._uuid[:8]}.local.".lower(),
                addresses=[socket.inet_aton(address)],
            )
            if kind in self._published:
                self._zeroconf.update_service(info)
            else:
                self._zeroconf.register_service(info, cooperating_responders=True)  # _is_taken has probed already
                log.info("mDNS: %s at %s:%d", info.name, address, self._port)
            self._published[kind], self._published_at = properties, time.monotonic()

    def _withdraw(self) -> None:
        if self._zeroconf:
            try:
                self._zeroconf.close()  # sends the goodbye
            except Exception as error:  # the network may be gone
                log.warning("mDNS: no goodbye (%s: %s)", type(error).__name__, error)
            self._zeroconf, self._published = None, {}


# --- the address ------------------------------------------------------------------------------------------------


def advertised_ip(host: str, interfaces: Path = INTERFACES) -> str | None:
    """The one IPv4 address at which the local network reaches the daemon, or None. Sends nothing."""
    if host not in ("0.0.0.0", "::"):
        try:
            bound = ipaddress.ip_address(host)
        except ValueError:
            return None
        return None if bound.version == 6 or bound.is_loopback else host
    import ifaddr  # a dependency of zeroconf

    candidates = [
        (adapter.name, str(ip.ip))
        for adapter in ifaddr.get_adapters()
        if is_lan_interface(interfaces / adapter.name)
        for ip in adapter.ips
        if ip.is_IPv4 and not ipaddress.ip_address(str(ip.ip)).is_loopback
    ]
    preferred = ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):  # there may be no route
        probe.connect(("224.0.0.251", 5353))  # the mDNS group: the kernel chooses the interface that it would use
        preferred = str(probe.getsockname()[0])

    def rank(name: str, address: str) -> tuple[bool, ...]:  # equal ranks: the interface that the system lists first
        path = interfaces / name
        is_down, is_link_local = _read(path / "operstate") == "down", address.startswith("169.254.")
        return is_down, is_link_local, address != preferred, not _is_physical(path)

    return min(candidates, key=lambda candidate: rank(*candidate), default=("", None))[1]


def is_lan_interface(path: Path) -> bool:
    """Whether an interface can be the local network's, judged by its folder under /sys/class/net.

    Systems without /sys are judged by the interface's name alone.
    """
    flags = int(_read(path / "flags") or "0", 16)
    other_type = _read(path / "type") not in ("", "1", "32")  # neither Ethernet (Wi-Fi included) nor InfiniBand
    if other_type or flags & 0x98 or (path / "tun_flags").exists():  # loopback, point-to-point or no ARP
        return False
    if (path / "bridge").exists():
        return _is_physical(path)  # a bridge without hardware connects only containers or virtual machines
    return not VIRTUAL_NAMES.match(path.name)


def _is_physical(path: Path) -> bool:
    """Whether there is hardware under the interface, also below a bridge, a bond or a VLAN."""
    return (path / "device").exists() or any(map(_is_physical, path.glob("lower_*")))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_local_address(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def kept_uuid(data_dir: Path) -> str:
    """The uuid of this daemon, which is kept in the data folder across restarts."""
    path = data_dir / "uuid"
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except (OSError, ValueError):
        new = str(uuid.uuid4())
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        machine.replace_file(path, f"{new}\n".encode())
    except OSError as error:
        log.warning("cannot keep the node's uuid in %s (%s)", path, error)
    return new
