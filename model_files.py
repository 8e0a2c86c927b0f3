"""Files that are downloaded: how much of them has arrived.

Imports nothing of ours, so that every file that downloads can use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRESS_S = 1  # between two reports


@contextmanager
def report_download(report: Callable[[str], None], what: str, folder: Path, files: Mapping[str, int]) -> Iterator[None]:
    """Reports the progress of a download once a second while the body runs, but only after new bytes have arrived.

    `files`: the names of the files in `folder` and their sizes in bytes, 0 if unknown.
    """
    total = 0 if 0 in files.values() else sum(files.values())
    ended = threading.Event()

    def watch() -> None:
        before = 0
        while not ended.wait(PROGRESS_S):
            paths = [*(folder / name for name in files), *folder.rglob("*.incomplete")]
            now = sum(map(_bytes_on_disk, paths))
            if now > before:
                report(f"downloading {what}: {now / 1e6:.0f} {f'of {total / 1e6:.0f} ' if total else ''}MB")
            before = now

    thread = threading.Thread(target=watch, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report(f"downloaded {what}")


def _bytes_on_disk(path: Path) -> int:
    """Returns the size of a file without its holes, or 0 if it does not exist (any more)."""
    try:
        stat = path.stat()
    except OSError:
        return 0
    return min(stat.st_size, stat.st_blocks * 512)
