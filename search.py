"""Search a folder of photographs by a text, or by another photograph.

    python search.py ~/Photos "a red bicycle"
    python search.py ~/Photos "a beach" --not "people" --top 30 --html page.html
    python search.py ~/Photos --like photo.jpg

A daemon embeds each photograph once. The vectors are kept in an index, one SQLite file in the user's cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import re
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # gRPC reads this at import; its log must not appear beside the messages of this program
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import client_files as files
from client import ask, discover, find_daemons, take_heic
from client_connections import AS_TENSOR, DEFAULT_ADDRESS, LumenClient, LumenError, read_credentials
from client_files import UsageError, readable
from photo_index import Index, Photo, Vector, index_path, scan

BATCH_SECONDS = 1.0  # of work in one transaction, which is lost if the process is killed
PROBE_SECONDS = 0.5  # for a connection to the daemon of the last search
NOT_WEIGHT = 0.5  # of --not: with 1, a photograph that shows neither would often have a higher score than one of both
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters in a name that a terminal would obey


def embed(index: Index, clients: Sequence[LumenClient], task: str, space: str, photos: Sequence[Photo]) -> None:
    """Adds the photographs to the index. Those that fail are printed with the reason.

    Raises LumenError if no daemon is left, and sqlite3.Error.
    """
    sizes, alone, alike = index.sizes(space), list[Photo](), list[Photo]()
    for photo in photos:  # a file whose size no other has cannot be a copy of another
        (alike if photo.size in sizes else alone).append(photo)
        sizes.add(photo.size)

    def send(asked: Sequence[Photo]) -> Iterator[None]:
        hashes: dict[str, bytes] = {}

        def read(task: str, name: str) -> tuple[bytes, str]:
            payload, mime = files.read_input(task, name)
            hashes[name] = hashlib.sha256(payload).digest()
            return payload, mime

        answered = ask(clients, task, (photo.path for photo in asked), AS_TENSOR, read)
        for photo, (name, answer) in zip(asked, answered, strict=True):
            sha256 = hashes.pop(name, b"")
            if isinstance(answer, LumenError):
                say(f"{readable(name)}: {answer.message}")
                if sha256 and answer.code == "invalid_argument":  # the daemon cannot read it, now or later
                    index.add_vector(sha256, space, None, answer.message)
                    index.add_file(photo, sha256)
            elif answer.meta.get("space", space) != space:
                raise LumenError("failed_precondition", "the daemon has another model now; run the command again")
            else:
                index.add_vector(sha256, space, answer.data["vector"])
                index.add_file(photo, sha256)
            yield

    def each() -> Iterator[None]:
        yield from send(alone)
        others = []
        for photo in alike:
            sha256 = sha256_of(photo.path)
            if index.has(sha256, space):
                index.add_file(photo, sha256)
                yield
            else:
                others.append(photo)
        yield from send(others)

    written = time.monotonic()
    try:
        for _ in files.progress(each(), len(photos)):
            if time.monotonic() - written > BATCH_SECONDS:
                index.commit()
                written = time.monotonic()
    finally:
        index.commit()


def sha256_of(path: str) -> bytes:
    """The hash of a file; that of nothing if it cannot be read, which `embed` reports when it asks for the file."""
    try:
        return hashlib.sha256(files.read_picture(path)).digest()
    except OSError:
        return b""


# --- the daemon ---------------------------------------------------------------------------------------------------


def find(options: argparse.Namespace, index: Index) -> list[str]:
    """The addresses that are given, otherwise those found last if they answer, otherwise those that mDNS finds,
    otherwise that of this computer. Raises UsageError."""
    if options.address or os.environ.get("LUMEN_ADDRESS"):
        return find_daemons(options)
    last = index.fact("address").split(",")
    if all(map(answers, last)):
        return last
    try:
        found = discover(tls=options.tls)
        say(f"found {', '.join(found)}")
    except (LumenError, OSError):  # OSError: no network
        found = [DEFAULT_ADDRESS]
        say(f"no daemon was found by mDNS; trying {DEFAULT_ADDRESS}")
    index.remember("address", ",".join(found))
    return found


def answers(address: str) -> bool:
    """Whether a connection to HOST:PORT, with a host name or an IPv4 address, can be opened."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def tasks_of(models: dict[str, str]) -> tuple[str, str]:
    """The tasks for texts and for photographs. Raises LumenError."""
    for text_task, photo_task in files.PICTURE_TASK_OF.items():
        if text_task in models and photo_task in models:
            return text_task, photo_task
    wanted = " or ".join(files.TEXT_TASKS)
    raise LumenError("failed_precondition", f"the daemon has no model for a search; it needs one with {wanted}")


def query_vector(client: LumenClient, text_task: str, photo_task: str, options: argparse.Namespace) -> Vector:
    """float32 `[dim]`. A score is its scalar product with the vector of a photograph. Raises LumenError, OSError."""
    wanted = [client.embed_text(options.text, text_task)] if options.text else []
    for name in options.like:
        try:
            wanted.append(client.embed_image(Path(name).read_bytes(), photo_task))
        except LumenError as error:
            raise LumenError(error.code, f"--like {readable(name)}: {error.message}") from error
    query: Vector = np.array(wanted, np.float32).mean(axis=0)
    if unwanted := [client.embed_text(text, text_task) for text in options.without]:
        query -= NOT_WEIGHT * np.array(unwanted, np.float32).mean(axis=0)
    return query


# --- command line -------------------------------------------------------------------------------------------------


def best(vectors: Vector, query: Vector, top: int, least: float) -> list[tuple[int, float]]:
    """(row, score) of the best `top` rows with a score of at least `least`, best first."""
    scores = vectors @ query
    order = np.argsort(-scores, kind="stable")[:top]
    return [(int(row), float(scores[row])) for row in order if scores[row] >= least]


def search(options: argparse.Namespace, index: Index, stack: ExitStack) -> list[tuple[str, float]]:
    """(path, score) of the photographs that fit best. Raises UsageError, LumenError, OSError or sqlite3.Error."""
    folder = str(Path(options.folder).resolve())
    photos, unreadable = scan(folder)
    for path, reason in unreadable.items():
        say(f"{readable(path)}: {reason}")
    addresses = find(options, index)
    credentials = read_credentials(options, addresses)
    clients = [stack.enter_context(LumenClient(address, options.timeout, credentials)) for address in addresses]
    models = clients[0].models()
    text_task, photo_task = tasks_of(models)
    space = models[photo_task]
    if index.fact("space") not in ("", space):
        say(f"the daemon has another model (space {space}, before: {index.fact('space')}); all are embedded again")
    index.remember("space", space)
    query = query_vector(clients[0], text_task, photo_task, options)
    new = index.new_photos(folder, photos, list(unreadable), space)
    heic = {photo.path for photo in new if photo.path.lower().endswith(files.HEIC_SUFFIXES)}
    if heic and not take_heic(clients, photo_task):
        new = [photo for photo in new if photo.path not in heic]
        say(files.heic_note(len(heic)))
    if new:
        embed(index, clients, photo_task, space, new)
    paths, vectors = index.vectors(folder, space, len(query))
    return [(paths[row], score) for row, score in best(vectors, query, options.top, options.min_score)]


def say(text: str) -> None:
    print(f"search.py: {text}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("search.py", description="Search a folder of photographs by text or photograph.")
    parser.add_argument("folder")
    parser.add_argument("text", nargs="?", default="", help='what to search for, such as "a red bicycle"')
    parser.add_argument(
        "--like", action="append", default=[], metavar="PHOTO", help="search for photographs that look like this one"
    )
    parser.add_argument(
        "--not",
        dest="without",
        action="append",
        default=[],
        metavar="TEXT",
        help="lower the scores of photographs that show this",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many photographs (default: 10)")
    parser.add_argument("--min-score", type=float, default=-np.inf, metavar="S", help="leave out scores below this one")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of plain text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with thumbnails")
    parser.set_defaults(discover=False)
    files.add_connection_options(parser)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError, or OSError if the folder cannot be read."""
    if not (options.text or options.like):
        raise UsageError("name a text to search for, or a photograph with --like")
    for text in (options.text, *options.without):
        if not files.is_text(text):
            raise UsageError(f"{readable(text)}: the text is not UTF-8")
    if options.top < 1:
        raise UsageError(f"--top {options.top}: allowed: 1 or more")
    if not Path(options.folder).is_dir():
        raise UsageError(f"{readable(options.folder)}: not a folder")
    for name in options.like:
        if not Path(name).is_file():
            raise UsageError(f"--like {readable(name)}: not a file")
    if options.html and not options.html.parent.is_dir():
        raise UsageError(f"--html {readable(str(options.html))}: the folder does not exist")
    if options.html and not find_spec("PIL"):
        raise UsageError("--html needs the Pillow package")


def show(options: argparse.Namespace, found: Sequence[tuple[str, float]]) -> None:
    """Prints the paths, which begin with the folder as it was given, and writes the page. Raises OSError."""
    folder = Path(options.folder)
    names = [readable(str(folder / Path(path).relative_to(folder.resolve()))) for path, _ in found]
    as_ascii = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    for name, (_, score) in zip(names, found, strict=True):
        if options.json:
            print(json.dumps({"path": name, "score": round(score, 4)}, ensure_ascii=as_ascii))
        else:
            print(f"{score:6.3f}  {CONTROL.sub(lambda match: ascii(match[0])[1:-1], name)}")
    if not found:
        say("no photograph was found")
    if options.html:
        import contact_sheet

        query = [options.text] if options.text else []
        query += [f"like {readable(name)}" for name in options.like] + [f"not {text}" for text in options.without]
        shown = zip(names, found, strict=True)
        contact_sheet.write(options.html, ", ".join(query), [(name, path, score) for name, (path, score) in shown])


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    options.tls = any((options.tls, options.ca, options.cert, options.server_name))
    logging.basicConfig(level=logging.WARNING, format="search.py: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not stop the run
        sys.stdout.reconfigure(errors="backslashreplace")
    path = index_path()
    try:
        check_options(options)
        with closing(Index(path)) as index, ExitStack() as stack:
            found = search(options, index, stack)
        show(options, found)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit, which must not fail
    except UsageError as error:
        say(str(error))
        return 2
    except sqlite3.Error as error:
        say(f"the index {readable(str(path))}: {error}; if it is damaged, delete it, and it is made again")
    except (LumenError, OSError) as error:
        say(str(error))
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
