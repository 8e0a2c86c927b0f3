"""Test networks, made of network namespaces."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kit import LIMIT_S, ROOT, Node

MDNS_TYPES = "_homenative-node._tcp", "_lumen._tcp"


ON_LAN = {
    "CLIP_BACKEND": "onnxrt",
    "BIOCLIP_BACKEND": "none",
    "CLIP_MODEL": ROOT / "gen" / "demo",
    "CLIP_MDNS_TYPE": ",".join(f"{kind}.local." for kind in MDNS_TYPES),
    "ADVERTISE_IP": "",
}


class Machine:
    """A network namespace with a cable to the switch, unless it has no address."""

    def __init__(self, lan: Lan, name: str) -> None:
        self.lan, self.name = lan, name
        self.inside: tuple[str, ...] = ("ip", "netns", "exec", name)
        lan.ip("netns", "add", name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        self.lan.ip("-n", self.name, *arguments)

    def plug(self, address: str, nic: str = "eth0") -> None:
        switch = self.lan.switch
        self.port = f"port{next(self.lan.cables)}"
        self.lan.ip("link", "add", self.port, "netns", switch, "type", "veth", "peer", nic, "netns", self.name)
        self.lan.ip("-n", switch, "link", "set", self.port, "master", "br0", "up")
        self.ip("link", "set", nic, "up")
        self.ip("address", "add", f"{address}/24", "dev", nic)
        self.address = address

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen([*self.inside, *command], text=True, **options)
        self.lan.processes.append(process)
        return process

    def daemon(self, data: Path, *arguments: str, **environment: Any) -> Node:
        data.mkdir(parents=True, exist_ok=True)
        names = data / "names.json"
        names.exists() or names.write_text('["a fox", "a house", "a tree"]')
        settings = {**ON_LAN, "CLIP_LABELS": names, **environment}
        node = Node(data, ("--host", "0.0.0.0", *arguments), (*self.inside, *Node.PROGRAM), **settings)
        self.lan.processes.append(node.process)
        return node

    def client(self, *arguments: str, program: Path = ROOT / "client.py") -> subprocess.CompletedProcess[str]:
        command = [*self.inside, sys.executable, str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


class Lan:
    """A switch; there is no way out of it."""

    def __init__(self) -> None:
        self.switch = f"lumen-{os.getpid()}"
        self.names, self.cables = [self.switch], itertools.count()
        self.processes: list[subprocess.Popen[str]] = []
        self.ip("netns", "add", self.switch)
        self.ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        self.ip("-n", self.switch, "link", "set", "br0", "up")

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def machine(self, address: str = "") -> Machine:
        self.names.append(f"{self.switch}-{len(self.names)}")
        machine = Machine(self, self.names[-1])
        if address:
            machine.plug(address)
        return machine

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def until(condition: Callable[[], Any], seconds: float = LIMIT_S) -> Any:
    """What the condition becomes, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found
