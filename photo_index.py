"""The index of `search.py`: which photographs a folder contains, and the vectors that are known of them."""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from client_files import HEIC_SUFFIXES, IMAGE_SUFFIXES, reason_of

Vector = NDArray[np.float32]

# `files`: what is known of each file. `gone`: when it was first missed, in seconds since the epoch; otherwise NULL.
# `vectors`: by content, so that a file that was moved or copied has its vector. A damaged photograph has an error.
# SQLite's own pages of 4 KiB would be half empty, with one vector of 512 dimensions in each.
SCHEMA = """
PRAGMA page_size = 16384;
CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, sha256 BLOB, gone REAL);
CREATE TABLE IF NOT EXISTS vectors (sha256 BLOB, space TEXT, vector BLOB, error TEXT, PRIMARY KEY (sha256, space));
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""
BUSY_SECONDS = 60  # of waiting for another search that writes to the index
KEEP_SECONDS = 30 * 86_400  # for which the vectors of missing files are kept; their disk may not be mounted
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what vanished meanwhile, or is a link to nothing
SUFFIXES = (*IMAGE_SUFFIXES, *HEIC_SUFFIXES)
FLOAT32 = np.dtype("<f4")  # of the vectors in the index


@dataclass(frozen=True)
class Photo:
    """A file: its absolute path, its size in bytes, and the time of its last change in nanoseconds."""

    path: str
    size: int
    mtime: int


class Index:
    """What is known of the photographs: one SQLite file that only its user can read. Methods raise sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        """Creates the file if it is missing. Raises OSError as well."""
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        path.touch(0o600)
        path.chmod(0o600)  # SQLite gives its journal the same mode
        self._db = sqlite3.connect(path, timeout=BUSY_SECONDS)
        self._db.executescript(SCHEMA)
        self.commit, self.close = self._db.commit, self._db.close

    def fact(self, name: str) -> str:
        """What was remembered under this name, or an empty text."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row else ""

    def remember(self, name: str, value: str) -> None:
        if value != self.fact(name):
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
            self.commit()

    def new_photos(self, folder: str, photos: Sequence[Photo], unreadable: Sequence[str], space: str) -> list[Photo]:
        """The photographs that are new, have changed, or have no vector of this space.

        Notes which files of the folder are missing, except in what is unreadable. Forgets them after some time.
        """
        query = """SELECT path, size, mtime, gone, EXISTS (SELECT 1 FROM vectors WHERE sha256 = files.sha256
                   AND space = ?) FROM files WHERE path >= ? AND path < ?"""
        known = {row[0]: row[1:] for row in self._db.execute(query, (space, *_inside(folder)))}
        present, now = {os.fsencode(photo.path): photo for photo in photos}, time.time()
        changes = list[tuple[float | None, bytes]]()
        changes += [(None, path) for path, row in known.items() if row[2] and path in present]
        unknown = tuple(map(os.fsencode, unreadable))
        missing = (path for path in known if path not in present and not path.startswith(unknown))
        changes += [(now, path) for path in missing if not known[path][2]]
        if changes:  # writing may have to wait for another search, so it is not done without need
            self._db.executemany("UPDATE files SET gone = ? WHERE path = ?", changes)
        if self._db.execute("SELECT 1 FROM files WHERE gone < ?", (now - KEEP_SECONDS,)).fetchone():
            self._db.execute("DELETE FROM files WHERE gone < ?", (now - KEEP_SECONDS,))
            self._db.execute("DELETE FROM vectors WHERE sha256 NOT IN (SELECT sha256 FROM files)")
        self.commit()
        done = {path: row[:2] for path, row in known.items() if row[3]}
        return [photo for path, photo in present.items() if done.get(path) != (photo.size, photo.mtime)]

    def sizes(self, space: str) -> set[int]:
        """The sizes of all files of which the content has a vector or an error in this space."""
        rows = self._db.execute("SELECT DISTINCT size FROM files JOIN vectors USING (sha256) WHERE space = ?", (space,))
        return {size for (size,) in rows}

    def has(self, sha256: bytes, space: str) -> bool:
        query = "SELECT 1 FROM vectors WHERE sha256 = ? AND space = ?"
        return self._db.execute(query, (sha256, space)).fetchone() is not None

    def add_file(self, photo: Photo, sha256: bytes) -> None:
        row = (os.fsencode(photo.path), photo.size, photo.mtime, sha256, None)
        self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)

    def add_vector(self, sha256: bytes, space: str, vector: Sequence[float] | None, error: str = "") -> None:
        """`vector`: float `[dim]` of unit length, or None for a damaged photograph, with its error."""
        stored = None if vector is None else np.array(vector, FLOAT32).tobytes()
        self._db.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", (sha256, space, stored, error))

    def vectors(self, folder: str, space: str, dim: int) -> tuple[list[str], Vector]:
        """(paths, float32 `[n, dim]`) of the photographs in the folder, in the order of their paths."""
        query = """SELECT path, vector FROM files JOIN vectors USING (sha256) WHERE path >= ? AND path < ?
                   AND gone IS NULL AND space = ? AND vector IS NOT NULL ORDER BY path"""
        paths, joined = [], bytearray()  # a joined list would need twice the memory
        for path, vector in self._db.execute(query, (*_inside(folder), space)):
            paths.append(os.fsdecode(path))
            joined += vector
        return paths, np.frombuffer(joined, FLOAT32).reshape(-1, dim)


def _inside(folder: str) -> tuple[bytes, bytes]:
    """The paths in a folder are those from the first of these on, and before the second."""
    prefix = os.fsencode(folder).rstrip(b"/")
    return prefix + b"/", prefix + b"0"  # the character after the slash


def index_path() -> Path:
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or caches, "lumen-clip", "search.sqlite")


def scan(folder: str) -> tuple[list[Photo], dict[str, str]]:
    """The photographs in a folder and its subfolders, and what of it cannot be read, with the reasons.

    Follows symbolic links. Each folder is read once, so links in circles do no harm.
    """
    photos, unreadable, waiting = list[Photo](), dict[str, str](), [folder]
    entered = set[tuple[int, int]]()
    while waiting:
        path = waiting.pop()
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if error.errno not in ABSENT:
                unreadable[path] = reason_of(error)
            continue
        for entry in found:
            try:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES) and S_ISREG((status := entry.stat()).st_mode):
                    photos.append(Photo(entry.path, status.st_size, status.st_mtime_ns))
            except OSError as error:
                if error.errno not in ABSENT:
                    unreadable[entry.path] = reason_of(error)
    return photos, unreadable
