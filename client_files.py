"""Options, inputs and outputs of the command line of `client.py`.

Reads pictures and texts; writes results as text, JSON lines or .npz. numpy (for .npz) and tqdm (for the progress bar)
are imported where they are used, and everything else is in the standard library. Nothing here uses gRPC.
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import json
import mimetypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

IMAGE_TASKS = (
    *("clip_classify", "bioclip_classify", "smart_classify"),
    *("clip_image_embed", "bioclip_image_embed", "semantic_image_embed"),
)
TEXT_TASKS = ("clip_embed", "bioclip_embed", "semantic_text_embed")
PICTURE_TASK_OF = dict(zip(TEXT_TASKS, IMAGE_TASKS[3:], strict=True))  # by the same model
SPECIES_TASKS = ("bioclip_classify", "smart_classify")
OPTION_TASKS = {  # options that not all tasks take
    **dict.fromkeys(("topk", "min_score"), ("clip_classify", *SPECIES_TASKS)),
    **dict.fromkeys(("labels", "label_set", "score"), ("clip_classify",)),
    **dict.fromkeys(("label_format", "rank", "within"), SPECIES_TASKS),
    "prompt_template": ("clip_classify", *TEXT_TASKS),
    "out": (*IMAGE_TASKS, *TEXT_TASKS),
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif")
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species", "auto")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")  # of pictures that only some daemons read
HEIC_MIMES = {"image/heic", "image/heif"}
STREAMS_MAX = 64  # a daemon's own limit on streams, unless LUMEN_MAX_STREAMS changes it
NO_PICTURES = f"no pictures ({', '.join(IMAGE_SUFFIXES)}) in this folder"
NOT_A_FILE = "not a regular file"


class UsageError(ValueError):
    """The command cannot be run as it was given."""


class OutputError(Exception):
    """A result does not fit into the output file."""


# --- options ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("client.py", description="Send pictures and texts to a lumen-clip daemon.")
    parser.add_argument("task", choices=(*IMAGE_TASKS, *TEXT_TASKS, "capabilities", "health"))
    parser.add_argument("inputs", nargs="*", help='files, folders or "-" (image tasks); texts (text tasks)')
    parser.add_argument("--discover", action="store_true", help="find the daemons by mDNS")
    parser.add_argument(
        "--streams", type=int, default=1, metavar="N", help="connections to an address with several daemons behind it"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of plain text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to .jsonl, or embeddings to .npz")
    parser.add_argument("--topk", metavar="K", help="number of labels")
    parser.add_argument("--labels", metavar="A,B,...", help="your own labels for clip_classify; @FILE: one a line")
    parser.add_argument("--label-set", metavar="NAME", help="a label set of the daemon, for clip_classify")
    parser.add_argument("--score", help="softmax, or sigmoid for models such as SigLIP, for clip_classify")
    formats = ("lineage", "scientific", "common")
    parser.add_argument("--label-format", choices=formats, metavar="F", help="species as lineage, scientific or common")
    parser.add_argument("--rank", choices=RANKS, metavar="R", help="rank of species: kingdom to species, or auto")
    parser.add_argument("--within", metavar="A,B,...", help="consider these taxa only; @FILE: one a line")
    parser.add_argument("--min-score", metavar="P", help="leave out labels below this score")
    parser.add_argument("--prompt-template", metavar="T", help='a text with one {}, such as "a photo of a {}"')
    add_connection_options(parser)
    return parser


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Which daemons are asked, and how. `read_credentials` reads the files that these options name."""
    parser.add_argument("--address", action="append", metavar="HOST:PORT,...", help="several share the work")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for what is no input (default: 60)"
    )
    parser.add_argument("--tls", action="store_true", help="use TLS; implied by --ca, --cert and --server-name")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="the CA of the daemon's certificate, or the certificate")
    parser.add_argument("--cert", type=Path, metavar="PEM", help="certificate of the client, with --key")
    parser.add_argument("--key", type=Path, metavar="PEM", help="private key of --cert")
    parser.add_argument("--server-name", default="", metavar="NAME", help="name in the certificate, if not the address")
    token_file = os.environ.get("LUMEN_TOKEN_FILE") or None
    parser.add_argument("--token-file", type=Path, default=token_file, metavar="FILE", help="a file with the token")


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError if the task does not take one of the options, or takes inputs and has none."""
    task = options.task
    for option, tasks in OPTION_TASKS.items():
        if getattr(options, option) is not None and task not in tasks:
            allowed = "all tasks with inputs" if option == "out" else ", ".join(tasks)
            raise UsageError(f"--{option.replace('_', '-')}: {task} does not take it; allowed: {allowed}")
    if not 1 <= options.streams <= STREAMS_MAX:
        raise UsageError(f"--streams {options.streams}: allowed: 1 to {STREAMS_MAX}")
    if options.labels is not None and options.label_set is not None:
        raise UsageError("--labels and --label-set: allowed: one of the two")
    if options.prompt_template is not None and task == "clip_classify" and options.labels is None:
        raise UsageError("--prompt-template: clip_classify takes it with --labels only")
    if task in OPTION_TASKS["out"] and not options.inputs:
        raise UsageError(f"{task}: name at least one {'text' if task in TEXT_TASKS else 'file or folder'}")


def request_meta(options: argparse.Namespace) -> dict[str, str]:
    """The options as request meta. Raises UsageError if one is not UTF-8, OSError if a file cannot be read."""
    plain = ("topk", "label_format", "prompt_template", "label_set", "score", "rank", "min_score")
    meta = {name: value for name in plain if (value := getattr(options, name)) is not None}
    for name in ("labels", "within"):
        if text := getattr(options, name):
            file = Path(text[1:]) if text.startswith("@") else None
            items = read_utf8(file, f"--{name}").splitlines() if file else text.split(",")
            meta[name] = json.dumps([item.strip() for item in items if item.strip()], ensure_ascii=False)
    for name, value in meta.items():
        if not is_text(value):
            raise UsageError(f"--{name.replace('_', '-')}: {readable(value)} is not UTF-8")
    return meta


# --- names and texts that may not be UTF-8 ----------------------------------------------------------------------


def is_text(text: str) -> bool:
    """Whether a command line argument or file name is UTF-8. Python keeps other bytes as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str) -> str:
    """A command line argument or file name in a form that UTF-8 can encode: `\\xNN` for each byte that is not UTF-8.

    Equals `os.fsencode(name).decode("utf-8", "backslashreplace")` on a system whose file names are UTF-8.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_utf8(path: Path, option: str) -> str:
    """The content of a file that an option names. Raises UsageError if it is not UTF-8, OSError if it is unreadable."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{option}: {readable(str(path))} is not UTF-8") from None


# --- inputs -------------------------------------------------------------------------------------------------------


def image_paths(inputs: Sequence[str], takes_heic: Callable[[], bool]) -> tuple[list[str], int]:
    """The inputs, with each folder replaced by the pictures in it, sorted; and how many HEIC files are left out.

    HEIC files in folders are left out unless the daemons take them. Inputs that cannot be read stay in the list.
    `read_input` reports each when its turn comes, so the others are not affected. Raises UsageError if no input is a
    file or a folder with pictures.
    """
    paths: list[str] = []
    heic: set[str] = set()
    wrong = []
    for name in inputs:
        path, found, reason = Path(name), [name], ""
        try:
            if name == "-":
                pass
            elif path.is_dir():
                found = pictures_in(name)
                heic.update(path for path in found if Path(path).suffix.lower() in HEIC_SUFFIXES)
                if not found:
                    found, reason = [name], NO_PICTURES
            elif not path.is_file():
                reason = NOT_A_FILE if path.exists() else "no such file or folder"
        except OSError as error:
            reason = reason_of(error)
        paths += found
        if reason:
            wrong.append(f"{readable(name)}: {reason}")
    if wrong and len(wrong) == len(inputs):
        raise UsageError(wrong[0])
    if not heic or takes_heic():
        return paths, 0
    if heic.issuperset(paths):
        raise UsageError(heic_note(len(heic)))
    return [path for path in paths if path not in heic], len(heic)


def reads_heic(capabilities: Iterable[Any], task: str) -> bool:
    """Whether a daemon with these capabilities takes HEIC pictures for the task."""
    offered = [io_task for capability in capabilities for io_task in capability.tasks if io_task.name == task]
    return any(HEIC_MIMES.intersection(io_task.input_mimes) for io_task in offered)


def heic_note(count: int) -> str:
    were = "HEIC file was" if count == 1 else "HEIC files were"
    return f"{count} {were} skipped: the daemon cannot read them; install pillow-heif beside it"


def pictures_in(folder: str) -> list[str]:
    """The pictures in a folder and its subfolders, and the subfolders that cannot be read; sorted."""
    unreadable: list[str] = []
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=lambda error: unreadable.append(error.filename))
        for name in names
        if Path(name).suffix.lower() in (*IMAGE_SUFFIXES, *HEIC_SUFFIXES)
    ]
    return list(map(str, sorted([*found, *map(Path, unreadable)])))


def warn_of_pictures(task: str, texts: Sequence[str]) -> None:
    """One line if texts are names of picture files, which are embedded like any other text."""

    def is_picture(text: str) -> bool:
        with suppress(OSError):  # a long text is no file name
            return Path(text).suffix.lower() in (*IMAGE_SUFFIXES, *HEIC_SUFFIXES) and Path(text).is_file()
        return False

    if names := [readable(text) for text in texts if is_picture(text)]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        hint = f"the name is embedded as text; {PICTURE_TASK_OF[task]} embeds pictures"
        print(f"client.py: {names[0]}{more}: {hint}", file=sys.stderr)


def read_text(argument: str) -> bytes:
    """Raises ValueError if the text is not UTF-8."""
    text = sys.stdin.read() if argument == "-" else argument
    if not is_text(text):
        raise ValueError("the text is not UTF-8")
    return text.encode()


def read_picture(name: str) -> bytes:
    """Raises OSError with the reason."""
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    if path.is_dir():
        raise OSError(errno.EISDIR, NO_PICTURES if os.access(name, os.R_OK | os.X_OK) else "Permission denied")
    if path.exists() and not path.is_file():  # reading a named pipe could block forever
        raise OSError(errno.EINVAL, NOT_A_FILE)
    return path.read_bytes()


def read_input(task: str, name: str) -> tuple[bytes, str]:
    """The payload of an input and its MIME type; "-" is standard input. Raises OSError or ValueError."""
    if task in TEXT_TASKS:
        return read_text(name), "text/plain"
    return read_picture(name), mimetypes.guess_type(name)[0] or "application/octet-stream"


def reason_of(error: Exception) -> str:
    """Why an input cannot be read, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{'' if isinstance(error, OSError | ValueError) else type(error).__name__} {error}".split())


def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Shows a progress bar for four items or more, if tqdm is installed."""
    if total < 4:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Any] = tqdm(items, total=total, unit="photo")
    return bar


# --- outputs ------------------------------------------------------------------------------------------------------


def row_of(name: str, data: Mapping[str, Any], meta: Mapping[str, str]) -> dict[str, Any]:
    """The output row of an answer: its data, and what its meta says about it."""
    row = {"input": name, **data} | {key: meta[key] for key in ("rank", "within_unknown") if key in meta}
    if "vector" in data:
        row["space"] = meta.get("space", "")
    if "labels" in data and "none_score" in meta:
        with suppress(ValueError):
            row["none_score"] = float(meta["none_score"])
    return row


class Output:
    """Where the rows go: one for each input, with its result or its error. Closed at the end of a `with` block."""

    _space = ""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(complete=kind is None)

    def add(self, row: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def close(self, complete: bool) -> None:
        """`complete` is False if the run was interrupted."""

    def check_space(self, row: Mapping[str, Any]) -> None:
        """Raises OutputError for a vector that cannot be compared with those before it."""
        if "vector" not in row:
            return
        space = row["space"] or row.get("model_id", "")  # other servers may not report a space
        self._space = self._space or space
        if space != self._space:
            raise OutputError(f"{row['input']}: its vector is of the space {space}; those before it: {self._space}")


def open_output(out: Path | None, task: str, as_json: bool, several: bool) -> Output:
    """The output file, or standard output if `out` is None. Raises UsageError or OSError."""
    if out is None:
        return Printer(as_json, several)
    name = readable(str(out))
    if out.suffix not in (".jsonl", ".npz"):
        raise UsageError(f"--out {name}: allowed: a name that ends in .jsonl or .npz")
    if out.suffix == ".npz" and task.endswith("classify"):
        raise UsageError(f"--out {name}: only embeddings go to .npz; allowed for {task}: .jsonl")
    if out.is_dir():
        raise UsageError(f"--out {name}: a folder; allowed: the name of a file")
    return NpzFile(out) if out.suffix == ".npz" else JsonLinesFile(out)


class Printer(Output):
    """Standard output: plain text, or JSON lines."""

    def __init__(self, as_json: bool, several: bool) -> None:
        self._as_json, self._several = as_json, several
        self._ascii = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"

    def add(self, row: Mapping[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(row, ensure_ascii=self._ascii))
        elif "error" not in row:
            print((f"{row['input']}\n" if self._several else "") + self._as_text(row))

    def _as_text(self, row: Mapping[str, Any]) -> str:
        if row.get("labels") == []:
            none = row.get("none_score")
            if none and none >= 0.5:
                return f"none of these ({none:.2f})"
            return "no label reaches the minimum score" + (f" (none of these: {none:.2f})" if none else "")
        if "labels" in row:
            return "\n".join(f"{label['score']:7.2%}  {label['label']}" for label in row["labels"])
        first = ", ".join(f"{x:.4f}" for x in row["vector"][:6])
        return f"{row['model_id']}, {row['dim']} dimensions: [{first}, ...]"


class JsonLinesFile(Output):
    """Rows as JSON lines, each written at once.

    They go to NAME.partial.jsonl, which is renamed to NAME.jsonl when the run is complete. An interrupted run leaves
    NAME.partial.jsonl with whole lines only, and does not change an existing NAME.jsonl.
    """

    def __init__(self, out: Path) -> None:
        """Raises OSError."""
        self._out = out
        self._path, self._file = create_partial(out)
        self._count = self._size = 0  # of whole lines

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OutputError, or OSError, for example if the disk is full."""
        self.check_space(row)
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) :]
        self._size += len(line)
        self._count += 1

    def close(self, complete: bool) -> None:
        """Raises OSError."""
        with self._file, suppress(OSError):
            if not complete:
                self._file.truncate(self._size)  # a full disk or an interrupt may have cut the last line
        try:
            if complete:
                self._path.replace(self._out)
        finally:
            if self._path.exists():
                if self._count:
                    report_partial(self._count, self._path)
                else:
                    self._path.unlink()


class NpzFile(Output):
    """Embeddings as .npz, written at the end: `paths` (text `[n]`), `vectors` (float32 `[n, dim]`), and of the vectors
    `model_id` and `space`.

    Inputs that failed are left out. An interrupted run leaves NAME.partial.npz, as with `JsonLinesFile`. If the file
    cannot be written, for example because the disk is full, the folder for temporary files is tried.
    """

    def __init__(self, out: Path) -> None:
        """Raises UsageError without numpy, OSError if the folder is not writable."""
        self._np = import_numpy()
        self._out = out
        path, file = create_partial(out)  # finds out before the run whether a file can be created here
        file.close()
        path.unlink()
        self._paths: list[str] = []
        self._vectors: list[Any] = []
        self._facts: dict[str, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OutputError for a vector of another space or length, which would make the file unusable."""
        if "error" in row:
            return
        self.check_space(row)
        vector = self._np.array(row["vector"], self._np.float32)
        if self._vectors and vector.shape != self._vectors[0].shape:
            raise OutputError(f"{row['input']}: {len(vector)} dimensions; before: {len(self._vectors[0])}")
        self._facts = self._facts or {key: row.get(key, "") for key in ("model_id", "space")}
        self._vectors.append(vector)
        self._paths.append(row["input"])

    def close(self, complete: bool) -> None:
        """Raises OSError."""
        if not (complete or self._paths):
            return
        try:
            path = self._write(self._out)
        except OSError:
            report_partial(len(self._paths), self._write(Path(tempfile.gettempdir(), self._out.name)))
            raise
        try:
            if complete:
                path.replace(self._out)
        finally:
            if path.exists():
                report_partial(len(self._paths), path)

    def _write(self, out: Path) -> Path:
        """Writes a new file beside `out` and returns its path. Raises OSError and leaves nothing behind."""
        np = self._np
        vectors = np.stack(self._vectors) if self._vectors else np.array([], np.float32)
        path, file = create_partial(out)
        try:
            with io.BufferedWriter(file) as buffered:
                facts = self._facts or {"model_id": "", "space": ""}
                np.savez(buffered, paths=np.array(self._paths, dtype=str), vectors=vectors, **facts)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def print_capability(capability: Any, as_json: bool) -> None:
    if as_json:
        from google.protobuf.json_format import MessageToDict

        print(json.dumps(MessageToDict(capability, preserving_proto_field_name=True)))
        return
    models, precisions = ", ".join(capability.model_ids), ", ".join(capability.precisions)
    tasks = ", ".join(task.name for task in capability.tasks)
    print(f"{capability.service_name}: {models} on {capability.runtime} ({precisions})\n  {tasks}")
    usable = capability.extra.get("clip_label_sets", "").split(",")
    for key, note in sorted(capability.extra.items()):
        if name := key.partition("clip_label_set.")[2]:
            print(f"  label set {name}{'' if name in usable else ' (not usable)'}: {note}")


def print_health(state: str, degraded: Sequence[str], as_json: bool) -> None:
    print(json.dumps({"status": state, "degraded": degraded}) if as_json else "\n".join([state, *degraded]))


def create_partial(out: Path) -> tuple[Path, io.FileIO]:
    """Creates NAME.partial.SUFFIX beside `out`, or a numbered one if an earlier run left it. Raises OSError."""
    for number in itertools.count(1):
        path = out.with_name(f"{out.stem}.partial{f'-{number}' if number > 1 else ''}{out.suffix}")
        with suppress(FileExistsError):
            return path, path.open("xb", buffering=0)
    raise AssertionError


def report_partial(count: int, path: Path) -> None:
    print(f"client.py: {count} rows are in {readable(str(path))}", file=sys.stderr)


def import_numpy() -> Any:
    try:
        import numpy
    except ImportError:
        raise UsageError("--out: .npz needs the numpy package; .jsonl does not") from None
    return numpy
