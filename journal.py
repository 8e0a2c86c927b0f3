"""The crash journal: finds payloads that crash the process, and rejects them after the restart.

Decoders and runtimes are native code, which one damaged file can crash. Without the journal, a client that sends the
file again would crash the daemon again. Any thread may call any method.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import machine
from errors import BadInput

log = logging.getLogger("lumen.journal")


class Journal:
    """Records which payloads are in progress, in a file that survives the process, and rejects those that crash it.

    After a crash in native code, faulthandler's report names the thread that crashed, and the file lists the payloads
    of each thread. If that thread had exactly one payload, the payload is rejected from the next start on. In every
    other case the cause is unknown: a batch of several payloads, a thread without a payload, or a kill from outside.
    Then each payload that may be the cause gets one strike. It is rejected after the second strike. An answer in
    between clears its strikes.
    """

    SLOT_BYTES = 96  # thread, kind, digest
    SLOTS = 1024
    SUSPECTS_MAX = 1000
    STRIKES_TO_REJECT = 2

    def __init__(self) -> None:
        """The journal records and rejects nothing until `open` is called."""
        self._suspects = Counter[str]()  # digest -> strikes
        self._file: FileIO | None = None
        self._free: list[int] = []  # slots of the file
        self._lock = threading.Lock()

    def open(self, folder: Path) -> None:
        """Reads what the previous process left in `folder`, and records there from now on. Call it once per process.

        If the folder cannot be used, a warning is logged and nothing is recorded.
        """
        self._folder = folder
        try:
            self._open()
        except (OSError, ValueError) as error:
            faulthandler.enable()
            text = "no crash journal in %s (%s): a payload that crashes the daemon is not recorded"
            log.warning(text, folder, error)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "in-flight"
        path.touch()  # "a+b" would append each slot, and "w+b" would lose those of the previous process
        file = path.open("r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise OSError("another daemon uses this folder") from error
        self._suspects.update(self._read_suspects())
        self._assess(file.read())
        file.truncate(0)
        os.pwrite(file.fileno(), bytes(self.SLOT_BYTES * self.SLOTS), 0)
        self._report = (self._folder / "crash.txt").open("w")
        faulthandler.enable(self._report)
        self._file, self._free = file, list(range(self.SLOTS))

    def close(self) -> None:
        """Empties the file, so that the next start does not take an orderly stop for a crash.

        Payloads that are still in progress are no longer recorded. May be called twice, and without `open`.
        """
        with self._lock:
            if self._file is None:
                return
            file, self._file = self._file, None
            self._free.clear()
            try:
                with file:
                    file.truncate(0)
            except OSError as error:
                log.warning("cannot empty the crash journal (%s)", error)

    def _read_suspects(self) -> dict[str, int]:
        """Returns the strikes from earlier crashes. A damaged file counts as an empty one."""
        path = self._folder / "suspects.json"
        try:
            content = json.loads(path.read_bytes() if path.exists() else "{}")
            return {str(digest): int(strikes) for digest, strikes in content.items()}
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s) and is ignored", path, error)
            return {}

    def _assess(self, slots: bytes) -> None:
        """Gives strikes for the payloads in the slots of the previous process. After an orderly stop there are none."""
        texts = slots.decode("ascii", "replace").split("\0")
        held = [slot for slot in map(str.split, texts) if len(slot) == 3]
        path = self._folder / "crash.txt"
        report = path.read_text("utf-8", "replace") if path.exists() else ""
        digests, certain = self._suspects_of(held, report)
        for digest in digests:
            self._suspects[digest] += self.STRIKES_TO_REJECT if certain else 1
        if report:
            log.error("the previous process crashed: %s", " / ".join(report.split("\n\n")[0].split("\n")[:2]))
            log.debug("%s", report)
        if digests:
            self._save()
            rejected = [digest for digest in digests if self._suspects[digest] >= self.STRIKES_TO_REJECT]
            text = "the previous process ended during the processing of %d payloads; rejected from now on: %s"
            log.error(text, len(digests), ", ".join(f"sha-256 {digest[:16]}..." for digest in rejected) or "none")

    @staticmethod
    def _suspects_of(held: Sequence[Sequence[str]], report: str) -> tuple[set[str], bool]:
        """Returns the payloads that may have ended the process, and whether the cause is certain.

        `held`: (thread, kind, digest) of each slot. `report`: faulthandler's report, or "" after a kill from outside.
        """
        thread = re.search(r"Current thread 0x0*([0-9a-f]+)", report)
        crashing = {digest for ident, _, digest in held if thread and ident == thread[1]}
        if crashing:
            # A bus error comes from a mapped file or from the memory. The payload need not be the cause.
            return crashing, len(crashing) == 1 and "Bus error" not in report.partition("\n")[0]
        # The report names no thread of a native library. Such a thread works on a batch.
        native = {digest for _, kind, digest in held if report and not thread and kind == "batch"}
        return native or {digest for *_, digest in held}, False

    def _save(self) -> None:
        while len(self._suspects) > self.SUSPECTS_MAX:
            del self._suspects[next(iter(self._suspects))]
        try:
            machine.replace_file(self._folder / "suspects.json", json.dumps(self._suspects).encode())
        except OSError as error:
            log.warning("cannot write suspects.json in %s (%s)", self._folder, error)

    def check(self, digest: str) -> None:
        """Raises BadInput for a payload that is rejected."""
        if self._suspects.get(digest, 0) >= self.STRIKES_TO_REJECT:
            raise BadInput("payload: rejected, because the daemon crashed while processing these bytes before")

    def answered(self, digest: str) -> None:
        """Clears the strikes of a payload."""
        if digest in self._suspects:
            with self._lock:
                self._suspects.pop(digest, None)
                self._save()

    @contextmanager
    def holding(self, digests: Sequence[str], kind: str = "batch") -> Iterator[None]:
        """Records that the calling thread works on these payloads while the body runs.

        `digests`: SHA-256 in hex, or "" for a payload that is never suspected, such as a text. `kind` is "prepare" or
        "batch".
        """
        digests = list(dict.fromkeys(filter(None, digests)))
        with self._lock:
            # All of them or none. A part of a batch could look like the only payload of a thread.
            slots = [self._free.pop() for _ in digests] if len(digests) <= len(self._free) else []
            for slot, digest in zip(slots, digests, strict=False):
                self._write(slot, f"{threading.get_ident():x} {kind} {digest}")
        try:
            yield
        finally:
            with self._lock:
                if self._file is not None:  # not closed meanwhile
                    for slot in slots:
                        self._write(slot, "")
                    self._free += slots

    def _write(self, slot: int, text: str) -> None:
        assert self._file is not None
        # Written with pwrite and not through mmap, because writing to a mapping on a full disk ends the process.
        try:
            os.pwrite(self._file.fileno(), text.encode().ljust(self.SLOT_BYTES, b"\0"), slot * self.SLOT_BYTES)
        except OSError as error:
            log.warning("cannot write the crash journal (%s)", error)
