"""ONNX Runtime, on models in the `visual/` + `textual/` layout that immich publishes and `export.py` writes.

`FolderBackend` is composed of an image tower and an ONNX text tower. `rknn_backend` has another image tower for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import model_files
from errors import one_line
from machine import memory, nvidia_gpus, sha256_of, usable_cores
from model_files import DEFAULT_LOGIT_SCALE, MANIFEST_FORMAT, Backend, Say, Vectors, quiet, read_json, unit_rows
from preprocess import Pixels, Preprocess, normalize
from settings import DEFAULT_MODELS, ModelOptions
from tokenizer import Tokens, is_cut_at_the_end, read_tokenizer, true_length

log = logging.getLogger("lumen.onnx_backend")
# From 1.29 on, ONNX Runtime sends usage data to its maker unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A second session takes about so many times the size of its file. It is opened if it needs at most a tenth of what is
# available, so that a small board keeps its memory.
SINGLE_MEMORY, SINGLE_MEMORY_SHARE = 1.2, 10


def source_of(options: ModelOptions) -> tuple[Path | None, str, str]:
    """(folder, hub repository, model_id): one of the first two, or neither if both towers are given as files.

    Downloads nothing. Raises SettingError.
    """
    value = options.model
    image_file = options.rknn_model if options.backend == "rknn" else options.onnx_image
    if Path(value).is_dir():
        return Path(value), "", Path(value).resolve().name
    if image_file and options.onnx_text:
        return None, "", value.removeprefix("hf-hub:")
    if value.startswith("hf-hub:"):
        repo = value.removeprefix("hf-hub:")
        if value == DEFAULT_MODELS["BIOCLIP"]:
            export = f"{options.name}_MODEL to a folder made by export.py"
            remedy = f"set {options.name}_BACKEND to torch or none, or {export}"
            raise options.error("MODEL", value, f"it is not published for {options.backend}; {remedy}")
        return None, repo, repo
    arch, tag = model_files.split_model(options)
    if Path(tag).exists():
        text = f"these are torch weights; {options.backend} needs a folder with visual/ and textual/"
        raise options.error("MODEL", value, text)
    # immich publishes OpenCLIP models in this layout, under names made of the architecture and the tag.
    return None, f"immich-app/{arch}__{tag.replace('_', '-')}", value


def tower_file(options: ModelOptions, folder: Path | None, part: str) -> Path:
    """The ONNX file of a tower, "visual" or "textual": the operator's, or the folder's. Raises SettingError."""
    variable, value = ("ONNX_IMAGE", options.onnx_image) if part == "visual" else ("ONNX_TEXT", options.onnx_text)
    path = Path(value) if value or folder is None else folder / part / "model.onnx"
    if not path.is_file():
        if value:
            raise options.error(variable, value, "no such file")
        text = f"the folder has no {part}/model.onnx; a model needs both towers, {options.name}_{variable}"
        raise options.error("MODEL", options.model, f"{text} can name one elsewhere")
    return path


class ModelFolder:
    """The files of a model, in a folder or downloaded from the hub, and their metadata."""

    def __init__(self, options: ModelOptions, say: Say = quiet) -> None:
        """With rknn, programs for `options.rknn_target` are downloaded as well. Raises SettingError or BackendError."""
        self.options, self._say = options, say
        self._target = options.rknn_target if options.backend == "rknn" else ""
        self.path, self.model_id = self._resolve()  # the path is None if both towers are given as files
        self.config = read_json(self.path / "config.json") if self.path else {}
        self.manifest = self._read_manifest(self.path) if self.path else {}
        self.model_id = self.manifest.get("model_id", self.model_id)

    def _resolve(self) -> tuple[Path | None, str]:
        """(folder, model_id), downloaded if need be."""
        path, repo, model_id = source_of(self.options)
        if repo:
            form = f"{self.options.backend}-{self._target}".rstrip("-")  # another board needs another program
            path = model_files.fetch_repository(self.options, repo, self._wanted_files, self._say, form)
        return path, model_id

    def _read_manifest(self, folder: Path, fetched_again: bool = False) -> dict[str, Any]:
        """`manifest.json` of an export, or {} if the folder has none. Fetches a damaged file of a download once more.

        Raises SettingError if it is of a later format, and BackendError if a file is missing or not the one it names.
        """
        options, manifest = self.options, read_json(folder / "manifest.json")
        if manifest.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
            text = f"manifest.json is of format {manifest['format']}; this version reads {MANIFEST_FORMAT}"
            raise options.error("MODEL", options.model, text)
        for name, digest in manifest.get("files", {}).items():
            path = folder / name
            if not path.is_file():
                raise options.failure("MODEL", options.model, f"manifest.json names {name}, which is missing")
            if sha256_of(path) == digest:
                continue
            markers = list(folder.glob(".complete-*.json"))  # of a download
            if fetched_again or not markers:
                text = f"{name} is not the file that manifest.json names; copy the folder again"
                raise options.failure("MODEL", options.model, text)
            log.warning("%s is damaged; fetching it once more", path)
            for damaged in (path, *markers):
                damaged.unlink()
            self._resolve()
            return self._read_manifest(folder, fetched_again=True)
        return manifest

    def _wanted_files(self, files: list[str]) -> list[str]:
        """Both towers, their configs, label vectors, and programs for the NPU; no files for other runtimes."""
        if "visual/model.onnx" not in files or "textual/model.onnx" not in files:
            raise ValueError("it has no visual/model.onnx and textual/model.onnx, so it has no form for ONNX Runtime")
        parts = "visual/", "textual/", f"{model_files.EXPORTED_LABELS}/"
        return [
            name
            for name in files
            if name in ("config.json", "manifest.json")
            or (name.startswith(parts) and "/rknpu/" not in name and not name.endswith(".armnn"))
            or (self._target and name.startswith(f"visual/rknpu/{self._target}/"))
        ]


# --- sessions ---------------------------------------------------------------------------------------------------


def wanted_providers(options: ModelOptions, available: Sequence[str]) -> list[str]:
    """The execution providers to ask for. Raises SettingError if one is not available."""
    wanted = list(options.ort_providers) or ["CPUExecutionProvider"]
    if missing := [name for name in wanted if name not in available]:
        text = f"{missing[0]} is not available; here: {', '.join(available)}"
        raise options.error("ORT_PROVIDERS", ",".join(wanted), text)
    return wanted


def open_session(options: ModelOptions, path: Path, variable: str, threads: int, spin: bool = False) -> Any:
    """An ONNX Runtime session. `spin`: its threads spin between the operators of a run, and stop at its end.

    Raises SettingError if a provider is not in this build, and BackendError if the file cannot be loaded or the session
    would run on another provider than the one wanted.
    """
    import onnxruntime

    wanted = wanted_providers(options, onnxruntime.get_available_providers())
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    # Threads that spin while they wait would occupy the cores that decode the next pictures.
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=wanted)
    except Exception as error:
        raise options.failure(variable, str(path), f"ONNX Runtime cannot load it ({one_line(error)})") from error
    if session.get_providers()[0] != wanted[0]:
        text = f"ONNX Runtime fell back to {session.get_providers()[0]}"
        raise options.failure("ORT_PROVIDERS", ",".join(wanted), text)
    return session


def run_session(session: Any, batch: NDArray[Any], cut: bool = False) -> Vectors:
    """Runs a batch, in pieces if the graph has a fixed batch size. `cut`: token ids, cut to their true length."""
    tower = session.get_inputs()[0]
    size = tower.shape[0] if isinstance(tower.shape[0], int) else len(batch)
    rows = []
    for start in range(0, len(batch), size):
        piece = batch[start : start + size]
        if cut:
            piece = piece[:, : true_length(piece)]
        whole = np.resize(piece, (size, *piece.shape[1:])) if len(piece) < size else piece  # repeats its rows
        rows.append(session.run(None, {tower.name: whole})[0][: len(piece)])
    return unit_rows(np.concatenate(rows))


def run_image_tower(session: Any, pixels: Pixels, recipe: Preprocess) -> Vectors:
    """Pictures through a tower that takes uint8 `[n, h, w, 3]` or float32 `[n, 3, h, w]`."""
    takes_uint8 = session.get_inputs()[0].type == "tensor(uint8)"
    return run_session(session, pixels if takes_uint8 else normalize(pixels, recipe))


# --- the image tower --------------------------------------------------------------------------------------------


class ImageTower(Protocol):
    """The image half of a `FolderBackend`; see `Backend` for the members. By default a single picture is a batch."""

    files: Path  # the file or folder that its vectors depend on
    precision: str = ""  # what really runs, if it is not that of the manifest
    preprocess: Preprocess
    runtime: str
    accelerator: str = ""
    npu: str = ""
    workers: int = 1
    single_image_cores: int = 1

    def encode(self, pixels: Pixels) -> Vectors: ...

    def encode_single(self, pixels: Pixels) -> Vectors:
        return self.encode(pixels)

    def prepare_single(self) -> None:
        return


class OnnxImageTower(ImageTower):
    """An image tower with a fixed or an open batch; see `run_image_tower` for its input.

    Its first output is the embedding, whatever its name.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._options, cores = folder.options, usable_cores()
        self.path = tower_file(self._options, folder.path, "visual")
        self.files = self.path if self._options.onnx_image else self.path.parent
        on_cpu = self._options.ort_providers in ((), ("CPUExecutionProvider",))
        self.workers = cores if on_cpu else 1
        self._session = open_session(self._options, self.path, "ONNX_IMAGE", cores // self.workers)
        self._single = self._session  # later one for one picture on all cores
        self.single_image_cores = 1 if on_cpu else cores
        side = self._session.get_inputs()[0].shape[2]  # the height or the width
        recipe = read_json(self.path.parent / "preprocess_cfg.json")
        self.preprocess = Preprocess.from_config(recipe, side if isinstance(side, int) else None)
        provider = self._session.get_providers()[0].removesuffix("ExecutionProvider").lower()
        self.runtime = "onnxrt" if provider == "cpu" else f"onnxrt-{provider}"
        self.accelerator = "" if provider == "cpu" else nvidia_gpus()  # ONNX Runtime does not name the device

    def encode(self, pixels: Pixels) -> Vectors:
        return run_image_tower(self._session, pixels, self.preprocess)

    def encode_single(self, pixels: Pixels) -> Vectors:
        return run_image_tower(self._single, pixels, self.preprocess)

    def prepare_single(self) -> None:
        if self.workers == 1:
            return
        available, _ = memory()
        needed = SINGLE_MEMORY * self.path.stat().st_size
        if available < SINGLE_MEMORY_SHARE * needed:
            text = f"{available / 1e6:.0f} MB are available, and it takes {needed / 1e6:.0f} MB"
            log.info("%s: a single picture runs on one core: %s", self._options.name, text)
            return
        # No other picture is in progress while it runs, and spinning saves a fourteenth of its time.
        self._single = open_session(self._options, self.path, "ONNX_IMAGE", usable_cores(), spin=True)
        self.single_image_cores = usable_cores()


# --- the backend ------------------------------------------------------------------------------------------------


class FolderBackend(Backend):
    """A model of a folder: an image tower, and a text tower on ONNX Runtime.

    The text tower takes int32 or int64 token ids, of a fixed or an open length. Its tokenizer is beside it.
    """

    stack: Any = staticmethod(np.array)  # `np.stack` makes seven more calls in Python

    def __init__(self, folder: ModelFolder, image: ImageTower) -> None:
        """Raises SettingError or BackendError."""
        options, manifest, config = folder.options, folder.manifest, folder.config
        self._options, self.image = options, image
        self._open_text_tower(folder)
        self.runtime, self.accelerator, self.npu = image.runtime, image.accelerator, image.npu
        self.preprocess, self.workers = image.preprocess, image.workers
        self.single_image_cores = image.single_image_cores
        self.model_id, self.on_gpu = folder.model_id, bool(image.accelerator)
        self.logit_scale = float(manifest.get("logit_scale", config.get("logit_scale", DEFAULT_LOGIT_SCALE)))
        # Manifests of older versions have a bias of 0 for models without one.
        self.logit_bias = manifest.get("logit_bias", config.get("logit_bias")) or None
        exported = str(manifest.get("precision", "fp32"))
        self.precision = image.precision or exported
        self.notice = str(manifest.get("notice", ""))
        self.golden = manifest.get("golden", {})
        # `export.py` has checked that all in its folder belongs together. The operator's files may not.
        whole = bool(manifest) and not options.onnx_text
        self.folder = folder.path if whole else None
        # The same for the NPU and the ONNX tower of a folder: their vectors may be stored in one index.
        own = options.onnx_image or options.onnx_text
        texts = self._text_path if options.onnx_text else self._text_path.parent
        weights = "" if own else manifest.get("source", {}).get("sha256", "")
        self.space = model_files.space_of(weights or sha256_of(image.files, texts), self.preprocess, exported)
        self.dim = int((whole and manifest.get("dim")) or self._vector_of_highest_token().shape[1])

    def _open_text_tower(self, folder: ModelFolder) -> None:
        self._text_path = tower_file(self._options, folder.path, "textual")
        self._text_session: Any = None
        inputs = self._opened_text_session().get_inputs()
        if len(inputs) != 1:
            names = ", ".join(x.name for x in inputs)
            text = f"takes {names}; only towers fed by token ids alone"
            raise self._options.error("ONNX_TEXT", str(self._text_path), text)
        length, config = inputs[0].shape[1], folder.config.get("text_cfg", {})
        self.open_length = not isinstance(length, int) and is_cut_at_the_end(config)
        context = length if isinstance(length, int) else config.get("context_length", 77)
        self._tokenizer = read_tokenizer(self._text_path.parent / "tokenizer.json", config, int(context))

    def _vector_of_highest_token(self) -> Vectors:
        """float32 `[1, dim]`: the vector of a text with the tokenizer's highest id.

        Raises SettingError if the tower has no such token: the tokenizer is that of another model.
        """
        tokens, highest = self.tokenize(["a photo"]), self._tokenizer.highest_id
        tokens[0, 1] = highest
        try:
            return self.encode_text(tokens)
        except Exception as error:
            text = f"its tokenizer.json has ids up to {highest}, which its text tower does not take"
            raise self._options.error("MODEL", self._options.model, f"{text} ({one_line(error)})") from error

    def _opened_text_session(self) -> Any:
        if self._text_session is None:
            self._text_session = open_session(self._options, self._text_path, "ONNX_TEXT", usable_cores())
        return self._text_session

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self._tokenizer(texts)

    def encode_text(self, tokens: Tokens) -> Vectors:
        session = self._opened_text_session()
        integers = np.int32 if session.get_inputs()[0].type == "tensor(int32)" else np.int64
        return run_session(session, tokens.astype(integers), cut=self.open_length)

    def unload_text(self) -> None:
        self._text_session = None

    def encode_images(self, pixels: Pixels) -> Vectors:
        return self.image.encode(pixels)

    def encode_single(self, pixels: Pixels) -> Vectors:
        return self.image.encode_single(pixels)

    def prepare_single(self) -> None:
        self.image.prepare_single()
        self.single_image_cores = self.image.single_image_cores


def open_onnx(options: ModelOptions, say: Say = quiet) -> FolderBackend:
    """Opens a model with both towers on ONNX Runtime. Raises SettingError or BackendError."""
    folder = ModelFolder(options, say)
    return FolderBackend(folder, OnnxImageTower(folder))
