"""Where a model's files come from: folders, manifests, the hub. What a backend is."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from errors import BackendError, LabelError, SettingError, one_line
from machine import replace_file
from preprocess import Pixels, Preprocess
from settings import ModelOptions
from tokenizer import Tokens
from torch_device import DeviceRows

Vectors = NDArray[np.float32]  # [n, dim], rows of unit length
Encode = Callable[[list[str]], Vectors]  # texts -> unit rows
Say = Callable[[str], None]  # receives short progress messages
Choose = Callable[[list[str]], list[str]]  # the names of a repository's files -> of those to download


def quiet(text: str) -> None:
    """Ignores progress messages."""


log = logging.getLogger("lumen.model_files")

PROGRESS_S = 1  # seconds between two progress messages of a download
# Training limits the logit scale to 100, and published CLIP models reach that (open_clip issue 541).
DEFAULT_LOGIT_SCALE = 100.0
MANIFEST_FORMAT = 1
EXPORTED_LABELS = "labels"  # what `export.py --labels` puts into the folder of a model; `label_cache` reads it
# The revisions of the default models. Other repositories are used at their main branch.
REVISIONS = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "1a25a446712ba5ee05982a381eed697ef9b435cf",
    "imageomics/bioclip-2": "2957b322090f9cb17ae72c71981c7218a28d81e0",
}


# --- backends ----------------------------------------------------------------------------------------------------


class Backend(Protocol):
    """A model with two towers, and its properties for scoring and capabilities."""

    model_id: str  # the same for images and texts
    runtime: str  # "torch", "torch-cuda", "onnxrt", "rknn"
    precision: str  # "fp32", "fp16", "bf16" or "int8"; what really runs
    dim: int
    logit_scale: float  # the model's own, after exp()
    logit_bias: float | None  # of models that were trained with a sigmoid, such as SigLIP
    preprocess: Preprocess
    notice: str = ""  # a notice from the maker of the model to its users
    golden: Mapping[str, Any] = {}  # inputs and expected vectors of an export; see `self_test`
    # The worst cosine of `self_test`, or of half precision to fp32; None: not tested
    self_test_cosine: float | None = None
    npu: str = ""  # a description of the NPU in use
    accelerator: str = ""  # the name of the GPU that runs the images, or "" if there is none or it is unknown
    on_gpu: bool  # images run on a GPU, whose best batches are larger than those of a core
    refusal: str = ""  # the reason why a requested NPU is not used
    open_length: bool  # texts run at their true length, so short texts take less time
    # How many `encode_images` may run at once: on a GPU, or each on one core; 1: a single one on all cores. Threads of
    # one batch wait for each other at every operator, and for a core that decodes: a batch on each core is a tenth
    # faster at ViT-B-32 size, and a third if the batch size is fixed at one.
    workers: int = 1
    single_image_cores: int = 1  # on how many cores `encode_single` runs
    folder: Path | None = None  # an export whose files belong together; it may contain EXPORTED_LABELS
    space: str  # 12 hex digits, equal for backends whose vectors may be stored in one index; see `space_of`
    # uint8 `[size, size, 3]` each -> a batch for `encode_images`, in memory that suits the device
    stack: Callable[[Sequence[Pixels]], Pixels]
    tokenize: Callable[[Sequence[str]], Tokens]  # -> int64 `[n, context_length]`

    def encode_images(self, pixels: Pixels) -> Vectors:
        """uint8 `[n, size, size, 3]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def encode_single(self, pixels: Pixels) -> Vectors:
        """The same for one image that nothing else waits beside. It may use `single_image_cores`."""
        return self.encode_images(pixels)

    def prepare_single(self) -> None:
        """Makes `encode_single` use all cores, if that is possible and the memory suffices. May take a second."""
        return

    def encode_text(self, tokens: Tokens) -> Vectors:
        """int64 `[n, context_length]` -> float32 `[n, dim]`, unit rows. Raises ValueError if a row is not finite."""

    def hold_rows(self, rows: NDArray[Any]) -> DeviceRows | None:
        """The rows of a label set on the device of the model, if that should compute its scores; else None."""
        return None

    def unload_text(self) -> None:
        """Frees the memory of the text tower until the next text, if loading it again takes only a second or two."""
        return


def encoder_of(backend: Backend) -> Encode:
    """Texts to vectors, on the calling thread. Only before the engine starts: its threads use the tower then."""
    return lambda texts: backend.encode_text(backend.tokenize(texts))


def space_of(weights: str, recipe: Preprocess, precision: str) -> str:
    """The name of a vector space, 12 hex digits. Vectors may be compared if their spaces are equal.

    It depends on the weights, the preprocessing and the class of precision. fp32, fp16 and bf16 are one class, because
    their vectors agree to a cosine of 0.999 at least; int8 is another. `weights`: the sha-256 of the original weights
    file, from which exports were made.
    """
    kind = "int8" if precision == "int8" else "float"
    return hashlib.sha256(json.dumps([weights, asdict(recipe), kind]).encode()).hexdigest()[:12]


def unit_rows(vectors: NDArray[Any]) -> Vectors:
    vectors = np.array(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 1e-6)).all():
        raise ValueError("the model returned a vector that is not finite or has no length")
    return np.asarray(vectors / norms, np.float32)


def split_model(options: ModelOptions) -> tuple[str, str]:
    """`ARCH:weights`, or `ARCH__weights` as immich writes it -> (arch, weights). Raises SettingError."""
    arch, _, weights = options.model.partition(":" if ":" in options.model else "__")
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


def fetch_repository(options: ModelOptions, repo: str, choose: Choose, say: Say, form: str = "") -> Path:
    """Downloads the files of a hub repository that `choose` selects, once, to `data/models/`.

    A marker file with the sizes shows that the folder is complete. With it there is no network access. An interrupted
    download continues where it stopped. `form` (default: the backend) names the selection. Raises SettingError if the
    repository does not exist or `choose` raises ValueError, and BackendError if the download fails.
    """
    folder = options.data_dir / "models" / repo.replace("/", "--")
    marker = folder / f".complete-{form or options.backend}.json"
    if _is_whole(folder, marker):
        return folder
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:  # released when it is closed, however the process ends
            with suppress(OSError):  # not every network file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(folder, marker):  # another process may have downloaded it meanwhile
                _download(options, repo, choose, say, marker)
    except SettingError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the disk raise various exceptions
        log.debug("download failed", exc_info=True)
        text = f"cannot download the model from the hub repository {repo} ({one_line(error)})"
        unknown = isinstance(error, (RepositoryNotFoundError, HFValidationError))
        raise (options.error if unknown else options.failure)("MODEL", options.model, text) from error
    return folder


def _download(options: ModelOptions, repo: str, choose: Choose, say: Say, marker: Path) -> None:
    """The body of `fetch_repository`, into the folder of the marker. Raises SettingError, and what the hub raises."""
    from huggingface_hub import HfApi, snapshot_download

    folder, revision = marker.parent, REVISIONS.get(repo, "main")
    log.info("downloading %s@%s to %s", repo, revision[:12], folder)
    # list_repo_files has no timeout for a hub that accepts the connection and does not answer.
    found = HfApi().repo_info(repo, revision=revision, timeout=30, files_metadata=True).siblings or []
    try:
        files = choose([file.rfilename for file in found])
    except ValueError as error:
        raise options.error("MODEL", options.model, f"the hub repository {repo} cannot be used: {error}") from error
    expected = {file.rfilename: file.size or 0 for file in found if file.rfilename in files}
    with report_download(say, repo, folder, expected):
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=files)
    sizes = {name: (folder / name).stat().st_size for name in files}
    replace_file(marker, json.dumps(sizes).encode())


def _is_whole(folder: Path, marker: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads(marker.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def fetch_file(
    path: Path, repo: str, filename: str, say: Say, revision: str | None = None, *, check: Callable[[Path], list[str]]
) -> list[str]:
    """Downloads a file of a hub dataset to `path`. Returns the result of `check`. Raises LabelError, as `check` may."""
    from huggingface_hub import hf_hub_download

    staging = path.parent / ".download"
    log.info("downloading %s of %s", filename, repo)
    try:
        with report_download(say, filename, staging, {filename: 0}):
            staged = Path(hf_hub_download(repo, filename, repo_type="dataset", revision=revision, local_dir=staging))
    except Exception as error:  # the hub's client, its HTTP library and the disk raise various exceptions
        log.debug("download failed", exc_info=True)
        raise LabelError(f"cannot download {filename} of the hub dataset {repo} ({one_line(error)})") from error
    try:
        names = check(staged)
    except LabelError:
        staged.unlink()  # so that a later start downloads it again
        raise
    os.replace(staged, path)
    shutil.rmtree(staging)
    return names


@contextmanager
def report_download(report: Say, what: str, folder: Path, files: Mapping[str, int]) -> Iterator[None]:
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
