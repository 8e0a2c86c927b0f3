"""Embeds an archive of pictures on a Ray cluster: `python ray_embed.py /mnt/photos --out /mnt/vectors`.

Ray Data decodes the pictures in tasks and embeds them in actors, with the daemon's own preprocessing and backends. gRPC
is not used. Only this process writes the Parquet files. So a picture has one row, whatever Ray repeats after a failure.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from backends import create_backend
from client_files import UsageError, image_paths, read_picture, readable, reason_of
from errors import BadInput, DaemonError, SettingError, one_line
from machine import replacing, trim_memory
from model import GPU_BATCH
from preprocess import Preprocess, decode_image
from settings import ModelOptions, Settings, demo_environment

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads this when it is imported

SHARD = 256  # pictures of a task and of a file at most; a run that is killed loses those in progress
SHARDS_OF_AN_ACTOR = 4  # at least, so that all actors end at about the same time
# Without a GPU, each core has one actor and one decoding task. An actor that Ray moves from a lost node waits until
# another actor ends, and never takes the place of a decoding task. A node may have up to 998 cores.
ACTOR_CPUS, DECODE_CPUS = 0.999, 0.001
RETRIES = 5  # of a decoding task whose process or node was lost; some pictures may crash it each time


def decode(row: dict[str, Any], settings: Settings, recipe: Preprocess) -> dict[str, Any]:
    """`path`, `file` -> `path`, `pixels`: uint8 `[size, size, 3]` as bytes, and `error`. One of the two is empty."""
    file, pixels, reason = os.fsdecode(row["file"]), b"", ""
    most_bytes, most_pixels = settings.lumen_max_request_mb << 20, settings.lumen_max_megapixels * 1_000_000
    try:
        if (size := Path(file).stat().st_size) > most_bytes:
            raise BadInput(f"the file has {size} bytes; allowed: {most_bytes}")
        pixels = decode_image(read_picture(file), [recipe], most_pixels, settings.lumen_jpeg_draft)[recipe].tobytes()
    except (BadInput, OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = reason_of(error) if isinstance(error, OSError) else str(error).removeprefix("payload: ")
    return {"path": row["path"], "pixels": pixels, "error": reason}


class Embedder:
    """An actor with the model. Raises SettingError, and BackendError if the model is damaged or of another space."""

    def __init__(self, options: ModelOptions, space: str) -> None:
        self.backend = create_backend(options)
        if self.backend.space != space:
            raise options.failure("MODEL", options.model, "the nodes have different models")
        self.backend.unload_text()
        trim_memory()

    def __call__(self, batch: Any) -> Any:
        """A pyarrow table of what `decode` returns -> one with the columns of a file."""
        import pyarrow as pa

        size, errors = self.backend.preprocess.size, [error or None for error in batch["error"].to_pylist()]
        pixels = np.frombuffer(b"".join(batch["pixels"].to_pylist()), np.uint8).reshape(-1, size, size, 3)
        try:
            encoded = iter(self.backend.encode_images(pixels) if len(pixels) else ())
        except ValueError as error:  # a vector is not finite
            if len(errors) > 1:
                return pa.concat_tables([self(batch.slice(at, 1)) for at in range(len(errors))])
            encoded, errors = iter(()), [str(error)]
        columns = {
            "path": batch["path"],
            "space": [self.backend.space] * len(errors),
            "model_id": [self.backend.model_id] * len(errors),
            "vector": pa.array([None if error else next(encoded) for error in errors], pa.list_(pa.float32())),
            "error": pa.array(errors, pa.string()),
        }
        return pa.table(columns)


def read_paths(file: Path, space: str = "") -> list[str]:
    """The lines of a list, or the column `path` of Parquet: all, or those of a space. Raises UsageError or OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix != ".parquet":
        return [os.fsdecode(line) for line in file.read_bytes().splitlines() if line]
    rows = [("space", "==", space)] if space else None
    try:
        column = pq.read_table(file, columns=["path"], filters=rows, partitioning=None)["path"]
        return [path for path in column.cast(pa.string()).to_pylist() if path]
    except (pa.ArrowException, KeyError) as error:
        raise UsageError(f"{file}: not a Parquet file with texts in a column `path` ({one_line(error)})") from error


def placement(options: ModelOptions) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(number of actors, resources of an actor, those of a decoding task): an actor for each GPU, or else each core."""
    import ray

    cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    if not cores:
        raise UsageError("the Ray cluster has no cores")
    providers = set(options.ort_providers) - {"CPUExecutionProvider"}
    if gpus and (options.device != "cpu" if options.backend == "torch" else providers):
        return gpus, {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1}
    return cores, {"num_cpus": ACTOR_CPUS}, {"num_cpus": DECODE_CPUS}


def embed(settings: Settings, options: ModelOptions, paths: list[str], out: Path) -> int:
    """Embeds what has no row in `out` yet. Returns the exit status. Raises UsageError, OSError or RayError."""
    import pyarrow.parquet as pq
    import ray.data

    def facts() -> tuple[Preprocess, str, str]:
        backend = create_backend(options)
        return backend.preprocess, backend.space, backend.model_id

    ray.init(log_to_driver=False, include_dashboard=False)
    count, actor, task = placement(options)
    recipe, space, model_id = ray.get(ray.remote(max_calls=1, **actor)(facts).remote())  # its process ends then
    done = {path for file in out.glob("*.parquet") for path in read_paths(file, space)}
    left = {name: os.fsencode(Path(path).absolute()) for path in paths if (name := readable(path)) not in done}
    say(f"model {model_id}, space {space}, actors: {count}, pictures to embed: {len(left)}")
    if not left:
        return 0
    ray.data.DataContext.get_current().max_errored_blocks = -1  # a shard that fails each time does not end the run
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # there is no other way to limit the retries
    shards = max(len(left) // SHARD + 1, SHARDS_OF_AN_ACTOR * count)
    pictures = ray.data.from_items([{"path": p, "file": f} for p, f in left.items()], override_num_blocks=shards)
    decoded = pictures.map(decode, fn_args=(settings, recipe), max_retries=RETRIES, **task)
    pool = ray.data.ActorPoolStrategy(size=count)
    most = options.max_batch_size or (GPU_BATCH if "num_gpus" in actor else settings.batch_size)
    batches = {"batch_size": most, "batch_format": "pyarrow"}
    embedded = decoded.map_batches(Embedder, fn_constructor_args=(options, space), compute=pool, **batches, **actor)
    total, failed = len(left), 0
    for table in embedded.iter_batches(batch_size=None, batch_format="pyarrow"):
        written = table["path"].to_pylist()
        with replacing(out / f"{space}-{hashlib.sha256(written[0].encode()).hexdigest()}.parquet") as file:
            pq.write_table(table, file, use_dictionary=["space", "model_id", "error"])
        failed += len(table) - table["error"].null_count
        for path in written:
            del left[path]
    say(f"new rows with a vector: {total - len(left) - failed}, with an error: {failed}")
    if left:
        say(f"pictures without a row, because their tasks failed: {len(left)}, such as {min(left)}; run it again")
    return 1 if left else 0


def say(text: str) -> None:
    print(f"ray_embed.py: {readable(text)}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ray_embed.py", description="Embed an archive of pictures on a Ray cluster.")
    parser.add_argument("input", help="a folder, a file with one path a line, or a .parquet file with a column `path`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the Parquet files are written")
    parser.add_argument("--model", choices=("clip", "bioclip"), default="clip", help="default: clip")
    parser.add_argument("--demo", action="store_true", help="use the demo model")
    options = parser.parse_args(arguments)
    try:
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        say(f"ray is not installed for {sys.executable}; it needs requirements-ray.txt")
        return 2
    try:
        settings = Settings.from_environment(demo_environment(os.environ) if options.demo else os.environ)
        model: ModelOptions = getattr(settings, options.model)
        if model.backend not in ("torch", "onnxrt"):
            raise model.error("BACKEND", model.backend, "ray_embed.py does not run it; allowed: torch, onnxrt")
        source = Path(options.input).absolute()
        paths, _ = image_paths([str(source)], takes_heic=lambda: True)
        if source.is_file():
            paths = read_paths(source)
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / ".lock").open("w") as lock:  # the system releases it when the process ends, however it ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"--out {options.out}: another run writes to this folder") from None
            for remainder in options.out.glob(".*.tmp"):  # of a run that was killed
                remainder.unlink()
            return embed(settings, model, paths, options.out)
    except (RayError, DaemonError, UsageError, OSError) as error:
        cause = getattr(error, "cause", None) or error  # what was raised on a node
        say(str(cause) if isinstance(cause, DaemonError | UsageError | OSError) else one_line(cause))
        return 2 if isinstance(cause, SettingError | UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
