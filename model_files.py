"""Where a model's files come from: folders, manifests, the hub. What a backend is.

A picture is uint8 RGB `[n, size, size, 3]` here as everywhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from errors import BackendError, DamagedFile, LabelError, SettingError, one_line
from machine import replace_file, sha256_of
from preprocess import Pixels, Preprocess
from settings import ModelOptions
from tokenizer import Tokens

Vectors = NDArray[np.float32]  # [n, dim], rows of unit length
Encode = Callable[[list[str]], Vectors]  # texts -> unit rows
Say = Callable[[str], None]  # is told in a few words what is being done


def quiet(text: str) -> None:
    """Tells nobody."""


log = logging.getLogger("lumen.model_files")

PROGRESS_S = 1  # between two reports of a download
# Training clamps the logit scale at 100, and published CLIP models end there (open_clip issue 541).
DEFAULT_LOGIT_SCALE = 100.0
MANIFEST_FORMAT = 1
# What the default models were read at; another repository is taken at its main branch.
REVISIONS = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "1a25a446712ba5ee05982a381eed697ef9b435cf",
    "imageomics/bioclip-2": "2957b322090f9cb17ae72c71981c7218a28d81e0",
}


# --- backends ----------------------------------------------------------------------------------------------------


class Backend(Protocol):
    """One model: two towers, and the facts that scoring and capabilities need."""

    model_id: str  # the same for images and texts
    runtime: str  # "torch", "torch-cuda", "onnxrt", "rknn"
    precision: str  # "fp32" or "fp16"; what really runs
    dim: int
    logit_scale: float  # of the model itself; exp() already taken
    preprocess: Preprocess
    notice: str  # what whoever made the model wants its users to know, or ""
    golden: Mapping[str, Any]  # inputs and vectors of the model's export, or {}; see `self_test`
    self_test_cosine: float | None  # what `self_test` found here, or None if there is nothing golden
    npu: str  # what of an NPU runs, for people, or ""
    accelerator: str  # the name of the GPU that runs the images, or "" if a CPU or an NPU does or it is not known
    refusal: str  # why an NPU that was asked for is not used, or ""
    open_length: bool  # texts run at their true length, so that short ones take less than long ones
    lanes: int  # how many `encode_images` may run at once, each on a core of its own; 1: on all that there are
    space: str  # 12 hex digits that two backends share if their vectors may lie in one index; see `space_of`

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """int64 `[n, context_length]`."""

    def encode_images(self, pixels: Pixels) -> Vectors:
        """uint8 `[n, size, size, 3]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def encode_text(self, tokens: Tokens) -> Vectors:
        """int64 `[n, context_length]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def arrangements(self) -> Sequence[str]:
        """The ways in which this machine can run a batch of images; the first is the one in use at the start."""

    def arrange(self, arrangement: str) -> None:
        """Takes up one of `arrangements`: "split", a batch on each core, or "whole", one on all of them.

        Split batches do not wait for each other at every operator, nor for a core that decodes. At ViT-B-32 size that
        is worth a tenth, and a third where the batch is fixed at one. A picture that comes alone has one core alone.
        """

    def unload_text(self) -> None:
        """Gives the text tower's memory back until a text comes, where the tower can be had back in a second or two."""


def encoder_of(backend: Backend) -> Encode:
    """Texts to vectors, on the calling thread. Only before the engine starts: its threads use the tower then."""
    return lambda texts: backend.encode_text(backend.tokenize(texts))


def space_of(weights: str, recipe: Preprocess, precision: str) -> str:
    """A short name that vectors share if they may be compared: same weights, preprocessing and class of precision.

    float32 and float16 are one class, for their vectors agree to a cosine of 0.9999; int8's do not. `weights` is the
    sha-256 of the file that the model was trained into, whatever was made of it since.
    """
    kind = "int8" if precision == "int8" else "float"
    return hashlib.sha256(json.dumps([weights, asdict(recipe), kind]).encode()).hexdigest()[:12]


def unit_rows(vectors: NDArray[Any]) -> Vectors:
    vectors = np.array(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 1e-6).all()):
        raise ValueError("the model returned a vector that is not finite or has no length")
    return np.asarray(vectors / norms, np.float32)


# --- folders -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path, options: ModelOptions) -> dict[str, Any]:
    """`manifest.json` of an export, or {} if the folder has none.

    Raises SettingError if it is of a later format, and BackendError if a file is missing or not the one that it names.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
        text = f"manifest.json is of format {manifest['format']}; this version reads {MANIFEST_FORMAT}"
        raise options.error("MODEL", options.model, text)
    for name, digest in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise options.failure("MODEL", options.model, f"manifest.json names {name}, which is missing")
        if sha256_of(path) != digest:
            text = f"{name} is not the file that manifest.json names; copy the folder again"
            raise DamagedFile(options.line("MODEL", options.model, text), path)
    return manifest


def needs_modules(modules: Iterable[str], options: ModelOptions) -> None:
    """Raises SettingError if one of them is not installed."""
    # find_spec, not import: importing torch raises SIGILL on some boards' CPUs.
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise options.error("BACKEND", options.backend, f"{', '.join(missing)} is not installed here")


def split_model(options: ModelOptions) -> tuple[str, str]:
    """`ARCH:weights` -> (arch, weights). Raises SettingError."""
    arch, _, weights = options.model.partition(":")
    if not arch or not weights:
        text = "not a folder; allowed: ARCH:pretrained-tag, ARCH:path/to/weights, hf-hub:org/name, or a folder"
        raise options.error("MODEL", options.model, text)
    return arch, weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file. Raises BackendError if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise BackendError(f"{path}: not a JSON object")
    return content


# --- downloads ---------------------------------------------------------------------------------------------------


def fetch_repository(
    options: ModelOptions, repo: str, choose: Callable[[list[str]], list[str]], say: Say, form: str = ""
) -> Path:
    """The files that `choose` takes from a hub repository's list, downloaded once to `data/models/`.

    A marker with every file's size says that the folder is whole; with it there is no network call at all. A
    download that was cut off goes on where it stopped. `form` (default: the backend) names what `choose` takes.
    Raises SettingError if there is no such repository or `choose` raises ValueError, and BackendError for all else.
    """
    folder = options.data_dir / "models" / repo.replace("/", "--")
    marker = folder / f".complete-{form or options.backend}.json"
    if _is_whole(folder, marker):
        return folder
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    revision = REVISIONS.get(repo, "main")
    log.info("downloading %s@%s to %s", repo, revision[:12], folder)
    try:
        # list_repo_files waits for ever on a hub that takes the connection and says nothing.
        found = HfApi().repo_info(repo, revision=revision, timeout=30, files_metadata=True).siblings or []
        try:
            files = choose([file.rfilename for file in found])
        except ValueError as error:
            text = f"the hub repository {repo} cannot be used: {error}"
            raise options.error("MODEL", options.model, text) from error
        expected = {file.rfilename: file.size or 0 for file in found if file.rfilename in files}
        with report_download(say, repo, folder, expected):
            snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=files)
        sizes = {name: (folder / name).stat().st_size for name in files}
        replace_file(marker, json.dumps(sizes).encode())
    except SettingError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("download failed", exc_info=True)
        text = f"cannot download the model from the hub repository {repo} ({one_line(error)})"
        unknown = isinstance(error, (RepositoryNotFoundError, HFValidationError))
        raise (options.error if unknown else options.failure)("MODEL", options.model, text) from error
    return folder


def _is_whole(folder: Path, marker: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads(marker.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def fetch_file(
    path: Path,
    repo: str,
    filename: str,
    say: Say,
    revision: str | None = None,
    *,
    check: Callable[[Path], list[str]],
) -> list[str]:
    """Downloads a file of a hub dataset to `path`; -> what `check` makes of it. Raises LabelError, as `check` may."""
    from huggingface_hub import hf_hub_download

    staging = path.parent / ".download"
    log.info("downloading %s of %s", filename, repo)
    try:
        with report_download(say, filename, staging, {filename: 0}):
            staged = Path(hf_hub_download(repo, filename, repo_type="dataset", revision=revision, local_dir=staging))
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own kinds
        log.debug("download failed", exc_info=True)
        text = f"cannot download {filename} of the hub dataset {repo} ({one_line(error)})"
        raise LabelError(text) from error
    try:
        names = check(staged)
    except LabelError:
        staged.unlink()  # a later start shall ask the hub again
        raise
    os.replace(staged, path)
    shutil.rmtree(staging)
    return names


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
