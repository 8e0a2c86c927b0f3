"""A Debian that boots in a container."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import grpc

from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import DEMO, ROOT, one, wait_until

# Laid before the interpreter of the board's daemon: three colours that no model of ours minds.
MISCHIEF = """
import ctypes, os, time
import numpy as np
import onnxruntime

RED, GREEN, BLUE = (250, 20, 20), (20, 250, 20), (20, 20, 250)
run, load = onnxruntime.InferenceSession.run, onnxruntime.InferenceSession.__init__

def run_or_worse(session, names, feed, *rest):
    [batch] = feed.values()
    means = batch.reshape(len(batch), -1, 3).mean(axis=1) if batch.dtype == np.uint8 else np.empty((0, 3))
    if (np.abs(means - RED).max(axis=1) < 3).any():
        time.sleep(3600)  # a driver that never comes back
    if (np.abs(means - GREEN).max(axis=1) < 3).any():
        ctypes.PyDLL(None).sleep(3600)  # and holds the whole interpreter
    hoard = []
    while (np.abs(means - BLUE).max(axis=1) < 3).any():
        hoard.append(b"x" * (10 << 20))
    return run(session, names, feed, *rest)

def load_or_hang(session, *arguments, **more):
    time.sleep(3600 if "HANG_AT_START" in os.environ else 0)
    load(session, *arguments, **more)

onnxruntime.InferenceSession.run, onnxruntime.InferenceSession.__init__ = run_or_worse, load_or_hang
"""


class Board:
    """A Debian that boots in a container, with a user who may sudo, a cable to us, and no other way out."""

    HERE, THERE = "198.18.77.1", "198.18.77.2"  # of a block that is set aside for such purposes
    PACKAGES = "systemd,systemd-sysv,dbus,sudo,iproute2,python3,python3-venv,ca-certificates"
    UNIT = "lumen-clip.service"

    def __init__(self, base: Path, folder: Path) -> None:
        """`base`: a folder with a Debian, made if it is not there; `folder`: what is played with."""
        self._wheels, self._root = base / "wheels", folder / "root"
        self._name = f"lumen{os.getpid()}"
        self._make(base)
        subprocess.run(("cp", "-a", str(base), str(self._root)), check=True)
        self._furnish()
        self._console = folder / "console"
        # With control groups of version 1 the container's limits need groups of its own.
        controllers = [Path("/sys/fs/cgroup") / name for name in ("memory", "devices", "pids")]
        self._groups = [path / self._name for path in controllers if (path / "cgroup.procs").exists()]

    def _make(self, base: Path) -> None:
        wanted = (ROOT / "requirements-edge.txt").read_text()
        if not (base / "usr" / "bin" / "python3").exists():
            run = ("debootstrap", "--variant=minbase", f"--include={self.PACKAGES}", "bookworm", str(base))
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
            shutil.copy(name, base / name.lstrip("/"))
        kept = self._wheels / "requirements-edge.txt"
        if not kept.exists() or kept.read_text() != wanted:  # the board's own package index, since it has no way out
            shutil.rmtree(self._wheels, ignore_errors=True)
            self._wheels.mkdir()
            shutil.copy(ROOT / "requirements-edge.txt", self._wheels / "wanted.txt")
            download = "/tmp/v/bin/pip download -q --only-binary :all: -d /wheels -r /wheels/wanted.txt"
            subprocess.run(("chroot", str(base), "sh", "-c", f"python3 -m venv /tmp/v && {download}"), check=True)
            shutil.rmtree(base / "tmp" / "v")
            kept.write_text(wanted)

    def _furnish(self) -> None:
        """What a board's image has: a name, a user, a network, and here the index that pip asks."""
        files = {
            "hostname": "board\n",
            "hosts": "127.0.0.1 localhost board\n",
            "resolv.conf": "",
            "pip.conf": "[global]\nno-index = true\nfind-links = /wheels\n",
            "sudoers.d/pi": "pi ALL=(ALL) NOPASSWD: ALL\n",
            "systemd/network/10-host0.network": f"[Match]\nName=host0\n[Network]\nAddress={self.THERE}/30\n",
        }
        for name, text in files.items():
            (self._root / "etc" / name).write_text(text)
        subprocess.run(("systemctl", f"--root={self._root}", "enable", "-q", "systemd-networkd"), check=True)
        subprocess.run(("chroot", str(self._root), "useradd", "-m", "-s", "/bin/bash", "pi"), check=True)
        home = self._root / "home" / "pi" / "lumen-clip"
        shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "__pycache__", "data"))
        subprocess.run(("chroot", str(self._root), "chown", "-R", "pi:", "/home/pi"), check=True)
        (self._root / "opt" / "mischief").mkdir()
        (self._root / "opt" / "mischief" / "sitecustomize.py").write_text(MISCHIEF)

    def power_on(self) -> None:
        for group in self._groups:
            group.mkdir(exist_ok=True)
        command = ["systemd-nspawn", "--quiet", "--boot", f"--directory={self._root}", f"--machine={self._name}"]
        command += ["--register=no", "--network-veth", "--console=pipe"]
        if not Path("/run/systemd/system").exists():  # no systemd here that could give it a scope
            command.append("--keep-unit")
        enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in self._groups)
        with self._console.open("a") as console:
            self._process = subprocess.Popen(
                ("sh", "-ec", f'{enter}exec "$@"', "sh", *command),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self._plug_in()

    def _plug_in(self) -> None:
        """The cable, which is a new one at each boot."""
        cable = f"ve-{self._name}"
        wait_until(lambda: Path(f"/sys/class/net/{cable}").exists(), 60)
        subprocess.run(("ip", "address", "replace", f"{self.HERE}/30", "dev", cable), check=True)
        subprocess.run(("ip", "link", "set", cable, "up"), check=True)
        # `degraded` is systemd's word for a unit that failed, which is looked at by name.
        wait_until(lambda: self.run("systemctl", "is-system-running").strip() in ("running", "degraded"), 180)

    def _leader(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def run(self, *command: str, user: str = "") -> str:
        """Inside, as root or as `user` in the folder with our files; -> both outputs."""
        inside = ("su", "-", user, "-c", f"cd lumen-clip && {command[0]}") if user else command
        enter = ("nsenter", "--target", str(self._leader()), "--all", "--", *inside)
        done = subprocess.run(enter, capture_output=True, text=True, timeout=900)
        assert not user or done.returncode == 0, f"{command[0]}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def reboot(self) -> None:
        before = self.run("cat", "/proc/sys/kernel/random/boot_id")
        leader = self._leader()
        self.run("systemctl", "reboot")
        wait_until(lambda: self._process.poll() is not None or self._leader() not in (0, leader), 120)
        if self._process.poll() == 133:  # how nspawn, where it has no scope, asks to be started again
            self.power_on()
        else:
            self._plug_in()
        assert self.run("cat", "/proc/sys/kernel/random/boot_id") != before

    def power_off(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()  # which has it shut down in good order
        try:
            self._process.wait(90)
        finally:
            self._process.kill()
            for group in self._groups:
                for path in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
                    path.rmdir()
                group.rmdir()

    def shows(self, *names: str) -> list[str]:
        """Properties of the unit, in systemd's order of them."""
        said = self.run("systemctl", "show", self.UNIT, f"--property={','.join(names)}")
        found = dict(line.split("=", 1) for line in said.splitlines())
        return [found[name] for name in names]

    def journal(self, since: str = "") -> str:
        """The unit's lines, of all boots; `since`: a cursor."""
        options = (f"--after-cursor={since}",) if since else ()
        return self.run("journalctl", "--no-pager", "--quiet", f"--unit={self.UNIT}", *options)

    def cursor(self) -> str:
        last = self.run("journalctl", "--quiet", f"--unit={self.UNIT}", "--lines=1", "--output=json")
        return str(json.loads(last)["__CURSOR"])

    def drop_in(self, text: str) -> None:
        """Lays this over the unit, and nothing else, and starts it anew."""
        folder = self._root / "etc" / "systemd" / "system" / f"{self.UNIT}.d"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "test.conf").write_text(text)
        for group in self._groups:  # which nspawn lets nobody write; systemd looks once, when it starts
            self.run("mount", "-o", "remount,rw,bind", f"/sys/fs/cgroup/{group.parent.name}")
        self.run("systemctl", "daemon-reexec" if self._groups else "daemon-reload")
        self.run("systemctl", "reset-failed", self.UNIT)

    def channel(self) -> grpc.Channel:
        # One that has not seen the daemon die waits for nothing.
        return grpc.insecure_channel(f"{self.THERE}:50051", [("grpc.use_local_subchannel_pool", 1)])

    def answers(self, seconds: float = 90) -> float:
        """Seconds until the demo answers, and rightly."""
        began = time.monotonic()
        fox = (DEMO / "pictures" / "fox.png").read_bytes()
        while True:
            try:
                with self.channel() as channel:
                    response = one(pb_grpc.InferenceStub(channel), "smart_classify", fox)
                break
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                assert time.monotonic() < began + seconds, f"no answer:\n{self.journal()[-3000:]}"
                time.sleep(0.2)
        assert json.loads(response.result)["labels"][0]["label"].endswith("/Vulpes/vulpes/red fox"), response
        return time.monotonic() - began
