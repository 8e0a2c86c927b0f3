"""What the daemon asks of the machine it runs on: cores, priority, memory, files that are whole."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
NPU_CORES = {"rk3562": 1, "rk3566": 1, "rk3568": 1, "rk3576": 2, "rk3588": 3}
DEVICE_TREE = Path("/proc/device-tree/compatible")


def control_groups(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[Path]:
    """The folders of this process's control group (v2) and of those it lies in, whose limits hold as well."""
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):  # no Linux, or control groups of version 1
        return []
    folder = cgroups / group
    return [path for path in (folder, *folder.parents) if cgroups in (path, *path.parents)]


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """The cores that this process may use: those of its affinity, or fewer by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in control_groups(cgroups, own):
        try:
            quota, period = (path / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root has none
            continue
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def cache_of_a_core(caches: Path = CACHES) -> int:
    """Bytes of the largest cache that the first core has, or of its part of one that cores share; 0 where unknown."""
    parts = [0]
    with suppress(OSError):  # a /sys that is closed to us
        for cache in caches.glob("index*"):
            with suppress(OSError, ValueError):  # some ARM kernels say less
                kilobytes = int((cache / "size").read_text().strip().removesuffix("K"))
                sharing = int((cache / "shared_cpu_map").read_text().replace(",", ""), 16).bit_count()
                parts.append((kilobytes << 10) // max(1, sharing))
    return max(parts)


class RunningClock:
    """A monotonic clock, in seconds, that does not count the time for which the whole process stood still.

    SIGSTOP, a paused container and a paused virtual machine stop all threads at once. Limits on how long something may
    take would otherwise end healthy work when the process goes on. One thread has to call `tick` regularly: a tick that
    comes much too late shows that the process stood still.
    """

    def __init__(self) -> None:
        self._stood_still = 0.0
        self._ticked: float | None = None

    def now(self) -> float:
        return time.monotonic() - self._stood_still

    def tick(self, interval: float) -> None:
        """To be called every `interval` seconds; a delay of more than a quarter of that is not counted."""
        now = time.monotonic()
        if self._ticked is not None:
            late = now - self._ticked - interval
            if late > interval / 4:
                self._stood_still += late
        self._ticked = now


clock = RunningClock()


def nvidia_gpus(folder: Path = NVIDIA_GPUS) -> str:
    """The models of the NVIDIA GPUs as the driver names them, with commas between them, or "" where there are none.

    Read from /proc, so that neither torch nor `nvidia-smi` is needed.
    """
    models = []
    for path in sorted(folder.glob("*/information")):
        with suppress(OSError, ValueError):  # a container may hide the file of a GPU
            lines = (line.partition(":") for line in path.read_text().splitlines())
            models += [value.strip() for name, _, value in lines if name.strip() == "Model"]
    return ", ".join(models)


def board_target() -> str:
    """The target in `NPU_CORES` whose programs this board runs, or "" if it is no Rockchip board that we know."""
    try:
        return npu_target(DEVICE_TREE.read_bytes().decode("ascii", "replace"))
    except OSError:  # no device tree, or a container that hides it
        return ""


def npu_target(names: str) -> str:
    """Of the names that a device tree lists, such as `rockchip,rk3588s`; see `board_target`."""
    if "rk3582" in names:  # sold with a part of an RK3588's cores
        return "rk3588"
    return next((target for target in NPU_CORES if target in names), "")


def lower_thread_priority(steps: int) -> None:
    """Lowers the calling thread's priority by so many steps of `nice`, where a thread has one of its own.

    Whoever waits for a short answer (Health, a text) then need not wait for a core as well; pictures that are decoded
    ahead come last.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + steps)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file so that a kill at any moment leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(data)


def sha256_of(*paths: Path) -> str:
    """Of one file its sha-256; of several, or of a folder's, that of theirs in the order of their names."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def use_one_heap() -> None:
    """Keeps glibc from giving threads heaps of their own, up to eight for each core.

    `malloc_trim` gives back what is free at the end of the main heap, and not of any other: one more heap took 50 MB in
    half an hour of hostile load, hardly any of it in use. Threads that wait for each other's bookkeeping cost nothing
    that `bench.py` could show.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option and "MALLOC_ARENA_MAX" not in os.environ:
        option(-8, 1)  # M_ARENA_MAX


def trim_memory() -> None:
    """Has Python let go of cycles, and glibc give freed memory back to the system; left alone they keep pictures.

    Calls that are cancelled leave cycles, small ones to Python's own count, with what the clients had sent: 10 MB
    after some hundreds. Done now and then, for it costs milliseconds; a limit on what malloc keeps (M_MMAP_THRESHOLD)
    costs as much for each photograph that arrives.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # musl has none
        trim(0)


def memory(groups: Sequence[Path] | None = None, meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(available bytes, total bytes) of the system or of its tightest control group (v2), whichever has less available.

    In a control group the page cache counts as available, hot pages (`active_file`) included: the kernel drops pages of
    files before it kills a process, and a mapped label set consists of such pages. Returns (sys.maxsize, 0) where
    nothing is known.
    """
    try:
        lines = (line.split() for line in meminfo.read_text().splitlines())
        known = {words[0]: int(words[1]) << 10 for words in lines if len(words) == 3}
        found = [(known["MemAvailable:"], known["MemTotal:"])]
    except (OSError, KeyError, ValueError):
        return sys.maxsize, 0
    for folder in control_groups() if groups is None else groups:
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the root has none; "max" is no limit
            continue
        cached = sum(int(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        found.append((limit - used + cached, limit))
    return min(found)


def files_for(wanted: int, kept: int) -> int:
    """How many of `wanted` files (connections, say) may be open so that `kept` are left for everything else.

    Raises the process's soft limit where it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + kept:
        soft = wanted + kept if hard == resource.RLIM_INFINITY else min(wanted + kept, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - kept))
