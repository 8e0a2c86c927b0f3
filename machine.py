"""The machine: cores, memory, thread priorities, board, GPUs; hashes; files that are replaced atomically."""

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
LIBC = ctypes.CDLL(None)  # mallopt and malloc_trim are glibc's own: musl and macOS do not have them


def control_groups(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[Path]:
    """The folders of this process's control group (v2) and of its parents, whose limits apply as well."""
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):  # not Linux, or control groups of version 1
        return []
    folder = cgroups / group
    return [path for path in (folder, *folder.parents) if cgroups in (path, *path.parents)]


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """The number of cores that this process may use, by its affinity and the quota of its control groups."""
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
    """Bytes of the largest cache of the first core, or of its part of a shared cache; 0 if unknown."""
    parts = [0]
    with suppress(OSError):  # /sys may not be readable
        for cache in caches.glob("index*"):
            with suppress(OSError, ValueError):  # some ARM kernels report less
                kilobytes = int((cache / "size").read_text().strip().removesuffix("K"))
                sharing = int((cache / "shared_cpu_map").read_text().replace(",", ""), 16).bit_count()
                parts.append((kilobytes << 10) // max(1, sharing))
    return max(parts)


class RunningClock:
    """A monotonic clock, in seconds, that does not count time for which the whole process was stopped.

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
        """Call this every `interval` seconds. A delay of more than a quarter of it does not count."""
        now = time.monotonic()
        if self._ticked is not None:
            late = now - self._ticked - interval
            if late > interval / 4:
                self._stood_still += late
        self._ticked = now


clock = RunningClock()


def nvidia_gpus(folder: Path = NVIDIA_GPUS) -> str:
    """The models of the NVIDIA GPUs as the driver names them, separated by commas, or "" if there are none.

    Read from /proc, so that neither torch nor `nvidia-smi` is needed.
    """
    models = []
    for path in sorted(folder.glob("*/information")):
        with suppress(OSError, ValueError):  # a container may hide the file of a GPU
            lines = (line.partition(":") for line in path.read_text().splitlines())
            models += [value.strip() for name, _, value in lines if name.strip() == "Model"]
    return ", ".join(models)


def board_target() -> str:
    """The target in `NPU_CORES` whose programs this board runs, or "" if the board is not known."""
    try:
        return npu_target(DEVICE_TREE.read_bytes().decode("ascii", "replace"))
    except OSError:  # no device tree, or a container that hides it
        return ""


def npu_target(names: str) -> str:
    """The target for the names in a device tree, such as `rockchip,rk3588s`; see `board_target`."""
    if "rk3582" in names:  # an RK3588 with fewer cores
        return "rk3588"
    return next((target for target in NPU_CORES if target in names), "")


# Steps of `nice` of the threads that decode, and of those that run pictures: decoding runs ahead, so that batches are
# full.
DECODER_NICE, WORKER_NICE = 4, 9


def lower_thread_priority(steps: int) -> None:
    """Lowers the calling thread's priority by `steps` of `nice`. Only on Linux, where threads have own priorities.

    Short answers (Health, a text) then do not wait for a core that decodes or runs pictures.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + steps)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that replaces `path` when the body ends without an exception; complete and on the disk."""
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
    """Writes a small file. A kill at any moment leaves the old content or the new one."""
    with replacing(path) as file:
        file.write(data)


def sha256_of(*paths: Path) -> str:
    """The sha-256 of a file in hex. For several files or a folder: that of their hashes, sorted by path."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def use_one_heap() -> None:
    """Makes all threads use one heap. By default glibc creates up to eight heaps for each core.

    `malloc_trim` returns free memory at the end of the main heap only. A second heap grew to 50 MB in half an hour of
    hostile load, hardly any of it in use. `bench.py` shows no cost of sharing one heap.
    """
    if hasattr(LIBC, "mallopt") and "MALLOC_ARENA_MAX" not in os.environ:
        LIBC.mallopt(-8, 1)  # M_ARENA_MAX


def trim_memory() -> None:
    """Collects cycles of Python objects, and returns freed memory to the system.

    Cancelled calls leave cycles that contain their payloads, about 10 MB after some hundreds of calls. Python's own
    collector rarely runs for so few objects. This takes milliseconds, so it runs every few seconds. Limiting what
    malloc keeps (M_MMAP_THRESHOLD) would cost as much for each photograph.
    """
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


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
    """How many of `wanted` connections may be open so that `kept` open files are left for everything else.

    Raises the soft limit of the process if that is allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + kept:
        soft = wanted + kept if hard == resource.RLIM_INFINITY else min(wanted + kept, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - kept))
