"""Embeds the pictures of an archive on the machines of a Ray cluster, and writes the vectors to Parquet files.

    python ray_embed.py /mnt/photos --out /mnt/vectors

Ray Data decodes the pictures in tasks and embeds them in actors, with the daemon's own preprocessing and backends. gRPC
is not used. The unit of work is a shard: pictures that stay together in one row of Ray's data set and become one file.
Only this process writes files, and the name of a file depends only on its pictures. So a picture has exactly one row,
whatever Ray repeats after a failure.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backends import create_backend
from client_files import UsageError, progress, read_picture, readable, reason_of
from errors import BadInput, DaemonError, SettingError, one_line
from machine import replace_file, trim_memory
from model_files import Backend
from photo_index import scan
from preprocess import Pixels, Preprocess, decode_image
from settings import ModelOptions, Settings, demo_environment

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads this when it is imported

SHARD = 256  # pictures at most, 38 MB of pixels at 224 x 224; a run that is killed loses those in progress
SHARDS_OF_AN_ACTOR = 4  # at least, so that all actors end at about the same time
# Without a GPU, each core has one actor and one decoding task. An actor that Ray moves from a lost node does not fit
# beside another actor, so it never takes the place of the decoding that the other one needs. It starts when an actor
# has nothing left to do. A node may have up to 998 cores.
ACTOR_CPUS, DECODE_CPUS = 0.999, 0.001
CPU_PROVIDER = "CPUExecutionProvider"
RETRIES = 5  # of a decoding task whose process or node was lost; some pictures may crash it each time

Row = dict[str, Any]


class Facts(NamedTuple):
    """What is known of a model after it was opened once."""

    recipe: Preprocess
    space: str
    model_id: str


# --- on the nodes -------------------------------------------------------------------------------------------------


def open_model(options: ModelOptions, folder: str) -> tuple[Backend, Facts]:
    """`folder`: where relative paths in the settings begin. Raises SettingError or BackendError."""
    os.chdir(folder)
    backend = create_backend(options)
    return backend, Facts(backend.preprocess, backend.space, backend.model_id)


def facts_of(options: ModelOptions, folder: str) -> Facts:
    return open_model(options, folder)[1]


def decode(row: Row, settings: Settings, recipe: Preprocess, folder: str) -> Row:
    """`paths` of a shard -> `paths`, `errors`, and `pixels`: uint8 `[n, size, size, 3]` of those without an error.

    The paths and the errors are JSON, because a column of texts cannot contain names that are not UTF-8. `folder`:
    where relative paths begin.
    """
    pixels, errors = list[bytes](), list[str | None]()
    most, most_bytes = settings.lumen_max_megapixels * 1_000_000, settings.lumen_max_request_mb << 20
    for path in json.loads(row["paths"]):
        file = Path(folder, path)
        try:
            if (size := file.stat().st_size) > most_bytes:
                raise BadInput(f"the file has {size} bytes; allowed: {most_bytes}")
            decoded = decode_image(read_picture(str(file)), [recipe], most, settings.lumen_jpeg_draft)
            pixels.append(decoded[recipe].tobytes())
            errors.append(None)
        except BadInput as error:
            errors.append(str(error).removeprefix("payload: "))
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            errors.append(reason_of(error))
    return {"paths": row["paths"], "errors": json.dumps(errors), "pixels": b"".join(pixels)}


class Embedder:
    """An actor that holds the model."""

    def __init__(self, options: ModelOptions, expected: Facts, folder: str) -> None:
        """Raises SettingError, and BackendError if the model of this node is not the one of the first."""
        self.backend, self.facts = open_model(options, folder)
        if self.facts != expected:
            text = f"the nodes have different models: {self.facts.space} and {expected.space}"
            raise options.failure("MODEL", options.model, text)
        self.backend.unload_text()
        trim_memory()
        self.batch = options.max_batch_size

    def __call__(self, row: Row) -> Row:
        """What `decode` returns -> `paths`, the `name` and `content` of their file, and how many have `failed`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths, errors = json.loads(row["paths"]), json.loads(row["errors"])
        side = self.facts.recipe.size
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(-1, side, side, 3)
        batches = (self.vectors(pixels[at : at + self.batch]) for at in range(0, len(pixels), self.batch))
        decoded = iter([vector for batch in batches for vector in batch])
        vectors = [next(decoded) if error is None else None for error in errors]
        for at, vector in enumerate(vectors):
            if vector is None and errors[at] is None:
                errors[at] = "the model returned a vector that is not finite"
        columns = {
            "path": pa.array(map(readable, paths), pa.string()),
            "space": pa.array([self.facts.space] * len(paths), pa.string()),
            "model_id": pa.array([self.facts.model_id] * len(paths), pa.string()),
            "vector": pa.array(vectors, pa.list_(pa.float32())),
            "error": pa.array(errors, pa.string()),
        }
        content = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), content, use_dictionary=["space", "model_id", "error"])
        name = hashlib.sha256(f"{self.facts.space} {row['paths']}".encode()).hexdigest()[:32] + ".parquet"
        failed = len(errors) - errors.count(None)
        return {"paths": row["paths"], "name": name, "content": content.getvalue().to_pybytes(), "failed": failed}

    def vectors(self, pixels: Pixels) -> list[Any]:
        """uint8 `[n, size, size, 3]` -> n vectors, float32 `[dim]`, with None for each that is not finite."""
        try:
            return list(self.backend.encode_images(pixels))
        except ValueError:
            if len(pixels) == 1:
                return [None]
            half = len(pixels) // 2
            return self.vectors(pixels[:half]) + self.vectors(pixels[half:])


# --- the run ------------------------------------------------------------------------------------------------------


def read_paths(name: str) -> list[str]:
    """The paths that INPUT names: absolute ones in a folder, otherwise as they stand in the list or Parquet file.

    Raises UsageError or OSError.
    """
    path = Path(name)
    if not path.exists():
        raise UsageError(f"{readable(name)}: no such file or folder")
    if path.is_dir():
        photos, unreadable = scan(str(path.absolute()))
        for folder, reason in unreadable.items():
            say(f"{readable(folder)}: {reason}")
        return [photo.path for photo in photos]
    if path.suffix == ".parquet":
        return list(filter(None, read_column(path)))
    return [line for text in os.fsdecode(path.read_bytes()).split("\n") if (line := text.removesuffix("\r"))]


def read_column(path: Path, space: str = "") -> list[str | None]:
    """The column `path` of a Parquet file, of all rows or of those of one space. Raises UsageError or OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [("space", "==", space)] if space else None
    try:
        column = pq.read_table(path, columns=["path"], filters=rows, partitioning=None)["path"]
        return list[str | None](column.cast(pa.string()).to_pylist())
    except (pa.ArrowException, KeyError) as error:
        wanted = "a Parquet file with texts in a column `path`" + (" and a column `space`" if space else "")
        raise UsageError(f"{readable(str(path))}: not {wanted} ({one_line(error)})") from error


def placement(options: ModelOptions) -> tuple[int, Row, Row]:
    """(number of actors, resources of an actor, resources of a decoding task). Raises UsageError.

    One actor for each GPU if the model runs on GPUs and the cluster has some, otherwise one for each core.
    """
    import ray

    cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    if not cores:
        raise UsageError("the Ray cluster has no cores; allowed: 1 and more")
    on_cpu = options.device == "cpu" if options.backend == "torch" else not set(options.ort_providers) - {CPU_PROVIDER}
    if gpus and not on_cpu:
        return gpus, {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1}
    return cores, {"num_cpus": ACTOR_CPUS}, {"num_cpus": DECODE_CPUS}


def embed(settings: Settings, options: ModelOptions, paths: Sequence[str], out: Path) -> list[str]:
    """Embeds the pictures that have no row in `out` yet. Returns those that have none afterwards.

    Raises UsageError, OSError, RayError, and as its cause what opening the model raises.
    """
    import ray
    import ray.data

    ray.init(log_to_driver=False, include_dashboard=False)
    count, actor, task = placement(options)
    folder = str(Path.cwd())
    opened = ray.remote(max_calls=1, **actor)(facts_of)  # its process ends, or it would keep the model in memory
    facts: Facts = ray.get(opened.remote(options, folder))
    done = {path for file in out.glob("*.parquet") for path in read_column(file, facts.space)}
    pending = list({readable(path): path for path in paths if readable(path) not in done}.values())
    say(f"model {facts.model_id}, space {facts.space}, actors: {count}, pictures to embed: {len(pending)}")
    if not pending:
        return []
    size = min(SHARD, math.ceil(len(pending) / (SHARDS_OF_AN_ACTOR * count)))
    shards = [json.dumps(pending[at : at + size]) for at in range(0, len(pending), size)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a shard that fails each time does not end the run
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # there is no other way to limit the retries
    how = {"settings": settings, "recipe": facts.recipe, "folder": folder}
    pool = ray.data.ActorPoolStrategy(size=count)
    rows = (
        ray.data.from_items([{"paths": shard} for shard in shards], override_num_blocks=len(shards))
        .map(decode, fn_kwargs=how, max_retries=RETRIES, **task)
        .map(Embedder, fn_constructor_args=(options, facts, folder), compute=pool, **actor)
    )
    missing, failed = set(shards), 0

    def written() -> Iterator[None]:
        nonlocal failed
        for row in rows.iter_rows():
            replace_file(out / row["name"], row["content"])
            missing.discard(row["paths"])
            failed += row["failed"]
            yield from [None] * len(json.loads(row["paths"]))

    for _ in progress(written(), len(pending)):
        pass
    left = [path for shard in missing for path in json.loads(shard)]
    say(f"new rows with a vector: {len(pending) - len(left) - failed}, with an error: {failed}")
    return left


def run(options: argparse.Namespace) -> int:
    """The exit status. Raises SettingError, and what `embed` raises."""
    settings = Settings.from_environment(demo_environment(os.environ) if options.demo else os.environ)
    model = settings.clip if options.model == "clip" else settings.bioclip
    if model.backend not in ("torch", "onnxrt"):
        raise model.error("BACKEND", model.backend, "ray_embed.py does not run it; allowed: torch, onnxrt")
    paths = read_paths(options.input)
    if not paths:
        raise UsageError(f"{readable(options.input)}: it names no picture")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / ".lock").open("w") as lock:  # the system releases it when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {readable(str(options.out))}: another run writes to this folder") from None
        for remainder in options.out.glob(".*.tmp"):  # of a run that was killed
            remainder.unlink()
        left = embed(settings, model, paths, options.out)
    if left:
        text = f"pictures without a row, because their tasks failed: {len(left)}, such as {readable(left[0])}"
        say(f"{text}; run the command again to try them again")
    return 1 if left else 0


def say(text: str) -> None:
    print(f"ray_embed.py: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ray_embed.py", description="Embed an archive of pictures on a Ray cluster.")
    parser.add_argument("input", help="a folder, a file with one path a line, or a .parquet file with a column `path`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the Parquet files are written")
    parser.add_argument("--model", choices=("clip", "bioclip"), default="clip", help="default: clip")
    parser.add_argument("--demo", action="store_true", help="use the demo model")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="ray_embed.py: %(message)s")
    if find_spec("ray") is None:
        say(f"ray is not installed for {sys.executable}; it needs requirements-ray.txt")
        return 2
    from ray.exceptions import RayError

    try:
        return run(options)
    except (RayError, DaemonError, UsageError, OSError) as error:
        cause = getattr(error, "cause", None) or error  # what was raised on a node
        say(str(cause) if isinstance(cause, DaemonError | UsageError | OSError) else one_line(cause))
        return 2 if isinstance(cause, SettingError | UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
