"""A network of the tests' own: real avahi, real network namespaces."""

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

import doors
from tests.kit import LIMIT_S, ROOT
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
    """What most of the world's Linux desktops ask, on a machine of the LAN."""

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
    """Lost otherwise: every client that is not of our own making, and those that believe what `status` says."""
    board, (early, late) = lan.machine("10.77.0.1"), MDNS_TYPES
    os.mkfifo(tmp_path / "names.json")  # loading takes as long as we like
    node = board.daemon(tmp_path)
    port = int(node.wait_for(r"port (\d+); loading")[1])
    [seen] = until(lambda: avahi.sees(early))
    kept = (tmp_path / "uuid").read_text().strip()
    known = {"uuid": kept, "version": "1.0.0", "v": "1.0.0"}
    assert seen == Sighting(
        "CLIP-Image-Processor", early, f"lumen-clip-{kept[:8]}.local", "10.77.0.1", port, {**known, "status": "loading"}
    )
    assert avahi.sees(late) == []  # its clients do not ask for long
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
    """Lost otherwise: the photo app, which listens nowhere else and asks nothing more."""
    board, phone = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    node = board.daemon(tmp_path)
    port = int(node.wait_for(r"port (\d+); loading")[1])
    node.wait_for(r"mDNS: .*_lumen")
    numbers, of_class = (("0000", "0000"), "8001") if form == "QU" else (("1234", "abcd"), "0001")
    question = b"\x06_lumen\x04_tcp\x05local\x00\x00\x0c" + bytes.fromhex(of_class)
    packets = [f"{number}00000001000000000000{question.hex()}" for number in numbers]
    command = [*phone.inside, sys.executable, "-c", ASK, phone.address, *packets]
    replies = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout.splitlines()
    for number, reply in zip(numbers, replies, strict=True):  # the SDK asks from each of its interfaces at once
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
import sys, doors
while sys.stdin.readline():
    print(doors.advertised_ip("0.0.0.0"), flush=True)
"""


@pytest.mark.lan
def test_nothing_but_the_lans_address_is_announced(lan: Lan) -> None:
    """Lost otherwise: the app, which dials the one address that it is given, and waits."""
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
    up("home", "172.20.0.1/16", "bridge")  # by any name: it joins a container to nothing else
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
    assert "dev wg0" in route.stdout and announced() == "192.168.77.1"  # the VPN has all routes
    board.ip("link", "del", "wg0")
    assert announced() == "192.168.77.1"  # an offline LAN: there is no way out
    board.plug("192.168.78.1", "eth1")
    board.ip("route", "add", "default", "via", "192.168.78.254")
    assert announced() == "192.168.78.1"  # of two, the one that the kernel would use
    board.ip("link", "set", "eth1", "down")
    assert announced() == "192.168.77.1"
    board.ip("address", "flush", "dev", "eth0")
    board.ip("address", "add", "169.254.3.4/16", "dev", "eth0")
    assert announced() == "169.254.3.4"  # a cable between two machines, and no router


def test_a_bridge_is_the_lans_if_there_is_hardware_in_it(tmp_path: Path) -> None:
    """Lost otherwise: routers and hosts of virtual machines, whose only address is a bridge's."""
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
    there = {link.name for link in tmp_path.iterdir() if doors.leads_to_lan(link)}
    assert there == {"eth0", "bond0", "bond0.7", "br-lan", "vmbr0"}
    assert doors.leads_to_lan(tmp_path / "en0") and not doors.leads_to_lan(tmp_path / "utun3")  # no /sys at all


BEACON = """
import logging, pathlib, socket, sys
import doors, settings
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
doors.CHECK_S = 1
port = int(sys.argv[2])
with socket.create_server(("0.0.0.0", port)):
    beacon = doors.Beacon(settings.Settings(lumen_data_dir=pathlib.Path(sys.argv[1])), "0.0.0.0", port)
    beacon.serve("torch")
    sys.stdin.read()
beacon.close()
"""


@pytest.mark.lan
@pytest.mark.measure
def test_no_two_daemons_share_a_name_and_each_keeps_its_own(
    lan: Lan, avahi: Avahi, tmp_path: Path, measuring: bool
) -> None:
    """Lost otherwise: one of two daemons, or the one that clients know by its name, after every power cut."""
    if not measuring:
        pytest.skip("a daemon must answer within 750 ms; run it on a quiet machine with: python -m pytest -m measure")

    def beacon(machine: Machine, data: str, port: int = 50051) -> subprocess.Popen[str]:
        with (tmp_path / f"{data}.log").open("a") as file:
            streams = {"stdin": subprocess.PIPE, "stdout": file, "cwd": ROOT}
            return machine.start(sys.executable, "-c", BEACON, str(tmp_path / data), str(port), **streams)

    def seen(count: int) -> dict[tuple[str, int], tuple[str, str]]:
        """where -> (name, host), once avahi sees so many, each with a name of its own."""

        def look() -> Any:
            sightings = avahi.sees(MDNS_TYPES[1])
            names = {sighting.name for sighting in sightings}
            own = all(sighting.text["uuid"][:8] in sighting.host for sighting in sightings)
            return own and len(sightings) == len(names) == count and sightings

        return {(s.address, s.port): (s.name, s.host) for s in until(look)}

    one, two, three = (lan.machine(f"10.77.0.{i}") for i in (1, 2, 3))
    # Two that do not hear each other at first both take the name, and one gives way when it does.
    lan.ip("-n", lan.switch, "link", "set", two.port, "nomaster")
    first, second = (beacon(machine, data) for machine, data in ((one, "a"), (two, "b")))
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    until(lambda: all("mDNS: CLIP-Image-Processor._lumen._tcp" in log.read_text() for log in logs))
    lan.ip("-n", lan.switch, "link", "set", two.port, "master", "br0")
    found = seen(2)
    uuids = {data: (tmp_path / data / "uuid").read_text()[:8] for data in "ab"}
    names = {"CLIP-Image-Processor", *(f"CLIP-Image-Processor-{uuid}" for uuid in uuids.values())}
    assert {name for name, _ in found.values()} < names
    for process, host, data in ((first, one, "a"), (second, two, "b")):  # each comes back as what it was
        process.kill()
        process.wait()
        beacon(host, data)
        assert seen(2) == found
    shutil.copytree(tmp_path / "a", tmp_path / "copy")  # of a memory card, say: another machine with the same uuid
    beacon(three, "copy")
    beacon(one, "a", 50052)  # on the same machine with the same data folder
    everybody = seen(4)
    assert found.items() <= everybody.items()
    assert everybody["10.77.0.3", 50051][1] == f"lumen-clip-{uuids['a']}-2.local" != everybody["10.77.0.1", 50052][1]
    assert "the daemon at 10.77.0.1 has the uuid of this one" in (tmp_path / "copy.log").read_text()


ECHO = """
import socket, sys, zeroconf
found = zeroconf.Zeroconf(interfaces=[sys.argv[1]], ip_version=zeroconf.IPVersion.V4Only)
host, address, port = sys.argv[2], sys.argv[3], int(sys.argv[4])
for kind in sys.argv[5:]:
    where = {"addresses": [socket.inet_aton(address)], "port": port, "server": host}
    found.register_service(zeroconf.ServiceInfo(kind, "CLIP-Image-Processor." + kind, **where))
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.lan
@pytest.mark.parametrize("where", ["its own address", "an address of old"])
def test_a_name_that_only_caches_remember_is_taken_back(lan: Lan, tmp_path: Path, where: str) -> None:
    """Lost otherwise: the name, after a crash on a network whose router or sleep proxy answers for the dead."""
    board, proxy = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    host = f"lumen-clip-{doors.kept_uuid(tmp_path)[:8]}.local."
    old = board.address if where == "its own address" else "10.77.0.99"
    kinds = [f"{kind}.local." for kind in MDNS_TYPES]
    command = [sys.executable, "-c", ECHO, proxy.address, host, old, "40404", *kinds]
    echo = proxy.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert echo.stdout and echo.stdout.readline() == "there\n"
    node = board.daemon(tmp_path)
    port = node.wait_for(r"port (\d+); loading")[1]
    node.wait_for(rf"mDNS: CLIP-Image-Processor\._lumen\._tcp\.local\. at 10\.77\.0\.1:{port}\n")
    assert node.stop() == 0
    assert "CLIP-Image-Processor-" not in node.log and "copy" not in node.log
