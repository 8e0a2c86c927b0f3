"""mDNS discovery, with real Avahi and real network namespaces."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import discovery
from tests.kit import LIMIT_S, ROOT, Node, run_client, write_labels
from tests.lan import MDNS_TYPES, Lan, Machine, until

BUS = """<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"""


@dataclasses.dataclass(frozen=True)
class Sighting:
    name: str
    kind: str
    host: str
    address: str
    port: int
    text: dict[str, str]


class Avahi:
    """An Avahi browser on one machine of the LAN."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        bus, configuration = folder / "bus", folder / "bus.xml"
        configuration.write_text(BUS.format(bus))
        (folder / "avahi.conf").write_text("[server]\nuse-ipv6=no\n[publish]\ndisable-publishing=yes\n")
        self.environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={bus}"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": self.environment}
        machine.start("dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", **quiet)
        until(bus.exists)
        run = f"mount -t tmpfs none /run && exec avahi-daemon -f {folder}/avahi.conf --no-drop-root --no-chroot"
        machine.start("sh", "-c", run, **quiet)
        until(lambda: self._browse(MDNS_TYPES[0]).returncode == 0)

    def _browse(self, kind: str) -> subprocess.CompletedProcess[str]:
        command = ["avahi-browse", "--resolve", "--parsable", "--terminate", "--no-db-lookup", kind]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=LIMIT_S)

    def sees(self, kind: str) -> list[Sighting]:
        found = []
        for line in self._browse(kind).stdout.splitlines():
            if line.startswith("="):
                _, _, _, name, _, _, host, address, port, text = line.split(";", 9)
                words = dict(word.split("=", 1) for word in re.findall(r'"([^"]*)"', text))
                found.append(Sighting(name, kind, host, address, int(port), words))
        return sorted(found, key=lambda sighting: sighting.name)


@pytest.fixture
def avahi(lan: Lan) -> Iterator[Avahi]:
    tools = "avahi-daemon", "avahi-browse", "dbus-daemon"
    if not all(map(shutil.which, tools)):
        pytest.skip(f"needs {', '.join(tools)} (Debian: avahi-daemon, avahi-utils, dbus)")
    with tempfile.TemporaryDirectory() as folder:  # short, for a socket's path
        yield Avahi(lan.machine("10.77.0.250"), Path(folder))


@pytest.mark.lan
def test_avahi_sees_the_daemon_load_serve_crash_and_leave(lan: Lan, avahi: Avahi, tmp_path: Path) -> None:
    """If this fails, clients that use Avahi do not find the daemon, or see a wrong `status` or an old port."""
    board, (early, late) = lan.machine("10.77.0.1"), MDNS_TYPES
    os.mkfifo(tmp_path / "names.json")  # the daemon keeps loading until the test writes to it
    node = board.daemon(tmp_path)
    port = int(node.wait_for(r"port (\d+); loading")[1])
    [seen] = until(lambda: avahi.sees(early))
    kept = (tmp_path / "uuid").read_text().strip()
    known = {"uuid": kept, "version": "1.0.0", "v": "1.0.0"}
    assert seen == Sighting(
        "CLIP-Image-Processor", early, f"lumen-clip-{kept[:8]}.local", "10.77.0.1", port, {**known, "status": "loading"}
    )
    assert avahi.sees(late) == []  # announced only when the models are ready
    (tmp_path / "names.json").write_text('["a fox"]')
    node.wait_for("ready: ")
    ready = {**known, "status": "ready", "runtime": "onnxrt"}

    def both_say(port: int) -> bool:
        expected = [dataclasses.replace(seen, kind=kind, text=ready, port=port) for kind in MDNS_TYPES]
        return [sighting for kind in MDNS_TYPES for sighting in avahi.sees(kind)] == expected

    until(lambda: both_say(port))
    node.process.kill()  # no goodbye: its records stay in avahi for minutes
    node.process.wait()
    (tmp_path / "names.json").unlink()
    node = board.daemon(tmp_path)
    node.wait_for("ready: ")
    again = int(node.wait_for(r"port (\d+); loading")[1])
    assert again != port
    until(lambda: both_say(again))
    assert node.stop() == 0
    until(lambda: not any(map(avahi.sees, MDNS_TYPES)))


ASK = """
import socket, sys, time
asked = []
for packet in sys.argv[2:]:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind((sys.argv[1], 0))
    one.sendto(bytes.fromhex(packet), ("224.0.0.251", 5353))
    asked.append(one)
for one in asked:
    one.settimeout(60)
    packet, source = one.recvfrom(9000)
    print(source[0], source[1], packet.hex())
"""


def dns_name(packet: bytes, at: int) -> tuple[str, int]:
    """(the name there, where it ends)"""
    labels, end = [], 0
    while size := packet[at]:
        if size >= 0xC0:
            end, at = end or at + 2, int.from_bytes(packet[at : at + 2], "big") & 0x3FFF
        else:
            labels.append(packet[at + 1 : at + 1 + size].decode())
            at += 1 + size
    return ".".join([*labels, ""]), end or at + 1


def dns_parts(packet: bytes) -> tuple[int, int, list[bytes], dict[int, list[Any]]]:
    """(id, flags, questions, type -> (owner, data)), the data of PTR and SRV as where it stands in the packet."""
    number, flags, asked, *counts = (int.from_bytes(packet[i : i + 2], "big") for i in range(0, 12, 2))
    at, questions, records = 12, [], collections.defaultdict(list)
    for _ in range(asked):
        end = dns_name(packet, at)[1] + 4
        questions.append(packet[at:end])
        at = end
    for _ in range(sum(counts)):
        owner, at = dns_name(packet, at)
        kind, size = (int.from_bytes(packet[at + i : at + i + 2], "big") for i in (0, 8))
        data = packet[at + 10 : at + 10 + size] if kind in (1, 16) else at + 10
        records[kind].append((owner, data))
        at += 10 + size
    assert at == len(packet)
    return number, flags, questions, records


@pytest.mark.lan
@pytest.mark.parametrize("form", ["QU", "legacy"])
def test_both_forms_of_the_apps_question_are_answered_to_its_own_port(lan: Lan, tmp_path: Path, form: str) -> None:
    """If this fails, the photo app, which queries from an ephemeral port and listens only there, finds no daemon."""
    board, phone = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    node = board.daemon(tmp_path)
    port = int(node.wait_for(r"port (\d+); loading")[1])
    node.wait_for(r"mDNS: .*_lumen")
    numbers, of_class = (("0000", "0000"), "8001") if form == "QU" else (("1234", "abcd"), "0001")
    question = b"\x06_lumen\x04_tcp\x05local\x00\x00\x0c" + bytes.fromhex(of_class)
    packets = [f"{number}00000001000000000000{question.hex()}" for number in numbers]
    command = [*phone.inside, sys.executable, "-c", ASK, phone.address, *packets]
    replies = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout.splitlines()
    for number, reply in zip(numbers, replies, strict=True):  # the SDK queries from each interface at once
        address, source, answer = reply.split()
        packet = bytes.fromhex(answer)
        echoed, flags, questions, records = dns_parts(packet)
        assert (address, source, echoed) == (board.address, "5353", int(number, 16)) and flags & 0x8000
        if form == "legacy":
            assert questions == [question]
        [(owner, at)], [(name, where)] = records[12], records[33]
        assert owner == "_lumen._tcp.local." and dns_name(packet, at)[0] == name == f"CLIP-Image-Processor.{owner}"
        target = dns_name(packet, where + 6)[0]
        assert int.from_bytes(packet[where + 4 : where + 6], "big") == port
        assert records[1] == [(target, socket.inet_aton(board.address))] and 28 not in records
        [(owner, text)] = records[16]
        assert owner == name and b"\x0cstatus=ready" in text
    assert node.stop() == 0


WHERE = """
import sys, discovery
while sys.stdin.readline():
    print(discovery.advertised_ip("0.0.0.0"), flush=True)
"""


@pytest.mark.lan
def test_nothing_but_the_lans_address_is_announced(lan: Lan) -> None:
    """If this fails, the photo app is given an address that it cannot reach, and it tries no other one."""
    board = lan.machine()
    eye = board.start(sys.executable, "-c", WHERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)

    def announced() -> str:
        assert eye.stdin and eye.stdout
        eye.stdin.write("\n")
        eye.stdin.flush()
        return eye.stdout.readline().strip()

    def up(name: str, address: str, *kind: str) -> None:
        if kind:
            board.ip("link", "add", name, "type", *kind)
        board.ip("link", "set", name, "up")
        board.ip("address", "add", address, "dev", name)

    up("lo", "10.99.0.1/32")
    up("docker0", "172.17.0.1/16", "bridge")
    up("br-5f2a1c9d8e7f", "172.18.0.1/16", "bridge")
    up("home", "172.20.0.1/16", "bridge")  # recognised by its members, whatever its name
    up("veth1a2b3c4", "172.19.0.1/16", "veth", "peer", "inside")
    board.ip("link", "set", "inside", "master", "home", "up")
    for name in ("tun0", "tap0"):
        board.ip("tuntap", "add", name, "mode", name[:3])
    up("tun0", "10.8.0.2/24")
    up("tap0", "10.8.1.2/24")
    up("wg0", "10.9.0.2/24", "veth", "peer", "wg-peer")
    up("tailscale0", "100.64.0.7/32", "veth", "peer", "ts-peer")
    for end in ("wg-peer", "ts-peer"):
        board.ip("link", "set", end, "up")
    board.ip("route", "add", "default", "via", "10.9.0.1")
    assert announced() == "None"
    board.plug("192.168.77.1")
    route = subprocess.run([*board.inside, "ip", "route", "get", "224.0.0.251"], capture_output=True, text=True)
    assert "dev wg0" in route.stdout and announced() == "192.168.77.1"  # all routes go through the VPN
    board.ip("link", "del", "wg0")
    assert announced() == "192.168.77.1"  # a LAN without a default route
    board.plug("192.168.78.1", "eth1")
    board.ip("route", "add", "default", "via", "192.168.78.254")
    assert announced() == "192.168.78.1"  # of two, the one with the route
    board.ip("link", "set", "eth1", "down")
    assert announced() == "192.168.77.1"
    board.ip("address", "flush", "dev", "eth0")
    board.ip("address", "add", "169.254.3.4/16", "dev", "eth0")
    assert announced() == "169.254.3.4"  # a cable between two machines, and no router


def test_a_bridge_with_hardware_in_it_counts_as_lan(tmp_path: Path) -> None:
    """If this fails, the daemon is not found on hosts whose only LAN address is on a bridge, such as Proxmox."""
    for path in (
        "eth0/device",
        "bond0/lower_eth0/device",
        "bond0.7/lower_bond0/lower_eth0/device",
        "br-lan/bridge",
        "br-lan/lower_eth0/device",
        "vmbr0/bridge",
        "vmbr0/lower_bond0/lower_eth0/device",
        "virbr0/bridge",
        "virbr0/lower_vnet1",
        "wwan0/device",
        "zt7nnig26/tun_flags",
    ):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "wwan0" / "type").write_text("519\n")
    (tmp_path / "eth0" / "type").write_text("1\n")
    (tmp_path / "eth0" / "flags").write_text("0x1003\n")
    found = {path.name for path in tmp_path.iterdir() if discovery.is_lan_interface(path)}
    assert found == {"eth0", "bond0", "bond0.7", "br-lan", "vmbr0"}
    # Without /sys (macOS) the name decides.
    assert discovery.is_lan_interface(tmp_path / "en0") and not discovery.is_lan_interface(tmp_path / "utun3")


ADVERTISER = """
import logging, sys
import discovery, settings
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
chosen = settings.Settings.from_environment({"LUMEN_DATA_DIR": sys.argv[1]})
advertiser = discovery.Advertiser(chosen, "0.0.0.0", 50051)
advertiser.set_ready("torch")
sys.stdin.read()
advertiser.close()
"""


@pytest.mark.lan
@pytest.mark.measure
def test_two_daemons_get_different_names_and_keep_them(lan: Lan, avahi: Avahi, tmp_path: Path, measuring: bool) -> None:
    """If this fails, one of two daemons is hidden, or they exchange their names when one of them restarts."""
    if not measuring:
        pytest.skip("daemons must answer mDNS probes within 750 ms; on a quiet machine: python -m pytest -m measure")

    def advertise(machine: Machine, data: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{data}.log").open("a") as file:
            streams = {"stdin": subprocess.PIPE, "stdout": file, "cwd": ROOT}
            return machine.start(sys.executable, "-c", ADVERTISER, str(tmp_path / data), **streams)

    def seen() -> dict[str, str]:
        """address -> instance name; the same for both service types."""
        by_type = [{s.address: s.name for s in avahi.sees(kind)} for kind in MDNS_TYPES]
        return by_type[0] if by_type[0] == by_type[1] else {}

    one, two = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    first = advertise(one, "a")
    until(lambda: seen() == {one.address: "CLIP-Image-Processor"})
    second = advertise(two, "b")
    until((tmp_path / "b" / "uuid").exists)
    suffix = (tmp_path / "b" / "uuid").read_text()[:8]
    both = {one.address: "CLIP-Image-Processor", two.address: f"CLIP-Image-Processor-{suffix}"}
    until(lambda: seen() == both)
    for process, machine, data in ((first, one, "a"), (second, two, "b")):
        process.kill()
        process.wait()
        log = tmp_path / f"{data}.log"
        log.unlink()
        advertise(machine, data)
        until(lambda log=log: "_lumen._tcp" in log.read_text())  # type: ignore[misc]
        assert seen() == both


RESPONDER = """
import socket, sys, zeroconf
own_address, host, address, node_uuid = sys.argv[1:5]
responder = zeroconf.Zeroconf(interfaces=[own_address], ip_version=zeroconf.IPVersion.V4Only)
for kind in sys.argv[5:]:
    record = {"addresses": [socket.inet_aton(address)], "port": 40404, "server": host}
    record["properties"] = {"uuid": node_uuid}
    responder.register_service(zeroconf.ServiceInfo(kind, "CLIP-Image-Processor." + kind, **record))
print("there", flush=True)
sys.stdin.read()
"""


def start_responder(machine: Machine, node_uuid: str, address: str, *kinds: str) -> None:
    """Answers with records of a daemon with this uuid at this address."""
    host = f"lumen-clip-{node_uuid[:8]}.local."
    command = [sys.executable, "-c", RESPONDER, machine.address, host, address, node_uuid, *kinds]
    process = machine.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "there\n"


@pytest.mark.lan
@pytest.mark.parametrize("where", ["its own address", "an earlier address"])
def test_a_daemon_keeps_its_name_if_a_proxy_still_answers_with_its_old_records(
    lan: Lan, tmp_path: Path, where: str
) -> None:
    """If this fails, a daemon that crashed changes its name on networks with a sleep proxy or an mDNS reflector."""
    board, proxy = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    old = board.address if where == "its own address" else "10.77.0.99"
    start_responder(proxy, discovery.kept_uuid(tmp_path), old, *(f"{kind}.local." for kind in MDNS_TYPES))
    node = board.daemon(tmp_path)
    port = node.wait_for(r"port (\d+); loading")[1]
    node.wait_for(rf"mDNS: CLIP-Image-Processor\._lumen\._tcp\.local\. at 10\.77\.0\.1:{port}\n")
    assert node.stop() == 0
    assert "another daemon has the name" not in node.log


@pytest.mark.lan
def test_a_name_that_is_taken_with_one_service_type_is_given_up_for_both(lan: Lan, tmp_path: Path) -> None:
    """If this fails, a client that reads both service types takes one daemon for two."""
    board, other = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    start_responder(other, "5f0c2a4e-other", other.address, f"{MDNS_TYPES[1]}.local.")
    node = board.daemon(tmp_path)
    suffix = discovery.kept_uuid(tmp_path)[:8]
    for kind in MDNS_TYPES:
        node.wait_for(rf"mDNS: CLIP-Image-Processor-{suffix}\.{kind}\.local\. at 10\.77\.0\.1:")
    assert node.stop() == 0
    assert "CLIP-Image-Processor._" not in node.log


def test_mdns_finds_the_daemon_while_it_serves(tmp_path: Path, tiny_onnx: Path) -> None:
    """If this fails, clients without a configured address do not find the daemon, or find one that has stopped."""
    settings = {
        "CLIP_BACKEND": "onnxrt",
        "BIOCLIP_BACKEND": "none",
        "CLIP_MODEL": tiny_onnx,
        "ADVERTISE_IP": "127.0.0.1",
    }
    types = "_homenative-node._tcp.local.,_lumen._tcp.local."
    name = f"lumen-test-{os.getpid()}"
    found = []
    for _ in range(2):
        node = Node(write_labels(tmp_path), CLIP_MDNS_TYPE=types, CLIP_MDNS_NAME=name, **settings).ready()
        try:
            run = run_client("health", "--discover", LUMEN_MDNS_INTERFACE="127.0.0.1")
            assert run.stdout == "SERVING\n" and f"found {node.address}" in run.stderr, run.stderr
            found.append(_browse(name, "_homenative-node._tcp.local."))
            assert _browse(name, "_lumen._tcp.local.").addresses == [socket.inet_aton("127.0.0.1")]
        finally:
            assert node.stop() == 0
    properties = [{k.decode(): v.decode() for k, v in info.properties.items()} for info in found]
    assert properties[0] == properties[1]  # the uuid is kept
    assert properties[0] == {
        "uuid": (tmp_path / "uuid").read_text().strip(),
        "status": "ready",
        "version": "1.0.0",
        "v": "1.0.0",
        "runtime": "onnxrt",
    }
    assert run_client("health", "--discover", LUMEN_MDNS_INTERFACE="127.0.0.1").returncode == 1  # withdrawn


BROWSER = """
import socket, sys, time, zeroconf
found = zeroconf.Zeroconf(interfaces=[sys.argv[1]], ip_version=zeroconf.IPVersion.V4Only)
info = found.get_service_info("_lumen._tcp.local.", sys.argv[2] + "._lumen._tcp.local.", 8000)
print(info and [socket.inet_ntoa(address) for address in info.addresses])
"""


def test_a_network_that_comes_later_or_changes_is_announced_on(tmp_path: Path, tiny_onnx: Path) -> None:
    """If this fails, boards that start before their router, or whose address changes, are not found."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("needs root, iproute2 and util-linux, for a network of its own")
    name = f"lumen-later-{os.getpid()}"
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": tiny_onnx, "BIOCLIP_BACKEND": "none", "CLIP_MDNS_NAME": name}
    settings["CLIP_MDNS_TYPE"] = "_lumen._tcp.local."
    node = Node(write_labels(tmp_path), ("--host", "0.0.0.0"), ("unshare", "--net", *Node.PROGRAM), **settings)
    node.wait_for("ready: ")
    inside = ("nsenter", "--target", str(node.process.pid), "--net")

    def ip(*arguments: str) -> None:
        subprocess.run([*inside, "ip", *arguments], check=True)

    try:
        node.wait_for("no address that others could reach")
        ip("link", "add", "eth9", "type", "veth", "peer", "name", "eth8")
        for end in ("eth8", "eth9"):
            ip("link", "set", end, "up")
        for address, other in (("10.77.0.1", ""), ("10.77.0.2", "10.77.0.1")):
            if other:
                ip("address", "del", f"{other}/24", "dev", "eth9")
            ip("address", "add", f"{address}/24", "dev", "eth9")
            ip("route", "replace", "224.0.0.0/4", "dev", "eth9")
            node.wait_for(rf"mDNS: {name}\._lumen\._tcp\.local\. at {address}:\d+", 30)
            browse = [*inside, sys.executable, "-c", BROWSER, address, name]
            seen = subprocess.run(browse, capture_output=True, text=True, timeout=30)
            assert seen.stdout.strip() == str([address]), seen.stderr
    finally:
        assert node.stop() == 0, node.log


def _browse(name: str, kind: str) -> Any:
    from zeroconf import Zeroconf

    with Zeroconf(interfaces=["127.0.0.1"]) as browser:
        info = browser.get_service_info(kind, f"{name}.{kind}", 3000)
    assert info is not None
    return info


def test_a_given_address_and_the_uuid_are_used_as_they_are(tmp_path: Path) -> None:
    """If this fails, the daemon advertises an address that nobody can reach, or a new uuid after each start."""
    assert discovery.advertised_ip("127.0.0.1") is None
    assert discovery.advertised_ip("192.168.7.7") == "192.168.7.7"
    assert discovery.is_local_address("127.0.0.1") and not discovery.is_local_address("192.0.2.77")
    assert discovery.kept_uuid(tmp_path) == discovery.kept_uuid(tmp_path)
