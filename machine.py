"""What the daemon asks of the machine it runs on: cores, priority, memory, files that are whole."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, or fewer by the quota of its control groups (v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):  # no Linux, or control groups of version 1
        return cores
    folder = cgroups / group
    for path in (folder, *folder.parents):
        if cgroups not in (path, *path.parents):
            break
        try:
            quota, period = (path / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root has none
            continue
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def step_back(steps: int) -> None:
    """Lowers the calling thread's priority by so many steps of `nice`, where a thread has one of its own.

    Whoever waits for a short answer (Health, a text) then need not wait for a core as well; pictures that are decoded
    ahead come last.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + steps)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def trim_memory() -> None:
    """Has glibc give freed memory back to the system; left alone it keeps that of pictures for each thread.

    Done now and then, for it costs milliseconds; a limit on what malloc keeps (M_MMAP_THRESHOLD) costs as much for
    each photograph that arrives.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # musl has none
        trim(0)
