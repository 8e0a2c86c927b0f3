"""How long Python's global lock is held for a picture, whose figures docs/performance.md quotes; only `-m measure`."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench_load import Case, Clients, Server, encoded, photograph, watch
from tests.kit import ROOT

pytestmark = pytest.mark.measure

CORES, DECODE_S, MODEL_S = 8, 0.0005, 0.02  # simulated; a rate that two cores reach with ease
CLIENTS, EACH = 8, 16
SECONDS, TURNS = 4, 3


@pytest.fixture
def probes(measuring: bool) -> Iterator[tuple[str, ...]]:
    """Probes where a thread of CPython has taken the global lock, and where it gives it up."""
    if not measuring:
        pytest.skip("measures; run it with: python -m pytest -s -m measure tests/test_global_lock.py")
    maps = Path("/proc/self/maps").read_text()
    library = next((line.split()[-1] for line in maps.splitlines() if "/libpython3" in line), "")
    if os.geteuid() != 0 or not shutil.which("perf") or not library:
        pytest.skip("needs root, perf (Debian: linux-perf), and a Python with a shared library that has its symbols")
    for probe in ("lumen:took=take_gil%return", "lumen:gave=drop_gil"):
        added = subprocess.run(("perf", "probe", "-x", library, probe), capture_output=True, text=True)
        if added.returncode:
            pytest.skip(f"no probe: {added.stderr.strip()[-200:]}")
    try:
        yield "-e", "lumen:took*", "-e", "lumen:gave*"
    finally:
        subprocess.run(("perf", "probe", "-q", "-d", "lumen:*"), check=True)


def core_seconds(recording: Path) -> tuple[float, float]:
    """(core seconds for which the lock was held, seconds of the recording).

    Time in which the thread that holds the lock does not run does not count.
    """
    command = ("perf", "script", "-i", str(recording), "--show-switch-events", "-F", "tid,time,event")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    running: dict[str, float | None] = {}  # threads with the lock -> since when each runs; None: it does not
    total, times = 0.0, []
    for line in text.splitlines():
        thread, stamp, event = line.split(maxsplit=2)
        now = float(stamp.rstrip(":"))
        times.append(now)
        if "took" in event:
            running[thread] = now
        elif thread in running:
            since = running[thread]
            total += now - since if since is not None and ("gave" in event or " OUT" in event) else 0.0
            running[thread] = None if " OUT" in event else now
            if "gave" in event:
                del running[thread]
    return total, times[-1] - times[0]


def milliseconds(program: list[str], probes: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """(core ms with the lock for a picture, pictures a second)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CLIP_", "BIOCLIP_", "LUMEN_", "BATCH_"))}
    environment |= {"LUMEN_DATA_DIR": str(folder), "LUMEN_TUNE": "0"}
    server = Server("", environment, program)
    try:
        case = Case("small JPEG", "clip_image_embed", encoded(photograph(224, 168), "JPEG", quality=60))
        clients = Clients(server.address, [case], CLIENTS, EACH)
        time.sleep(2)
        assert server.process
        recording = folder / "perf.data"
        command = ("perf", "record", "-q", "-o", str(recording), *probes, "--switch-events", "-m", "4096")
        with subprocess.Popen((*command, "-p", str(server.process.pid), "--", "sleep", str(SECONDS))) as perf:
            window = watch(server, clients, SECONDS)
        assert perf.returncode == 0
    finally:
        server.stop()
    held, seconds = core_seconds(recording)
    return 1000 * held / (window.per_s * seconds), window.per_s


def test_how_long_the_global_lock_is_held_for_a_picture(probes: tuple[str, ...], tmp_path: Path) -> None:
    """Lost otherwise: what a machine of many cores is good for, and how much of it is not ours to improve."""
    daemon = [str(ROOT / "bench_simulation.py"), str(CORES), str(DECODE_S), str(MODEL_S), "--demo"]
    bare = [str(ROOT / "tests" / "bare_server.py"), str(DECODE_S), str(MODEL_S)]
    found: dict[str, list[float]] = {"the daemon": [], "gRPC, Pillow and orjson alone": []}
    for _ in range(TURNS):
        for name, program in zip(found, (daemon, bare), strict=True):
            held, rate = milliseconds(program, probes, tmp_path)
            print(f"\n    {name}: {held:.2f} core ms for a picture, {rate:.0f} pictures a second", end="")
            assert rate > 10
            found[name].append(held)
    print("".join(f"\n    {name}: median {statistics.median(held):.2f}" for name, held in found.items()))
    assert all(held > 0.05 for series in found.values() for held in series)
