"""ONNX Runtime on towers in the folder layout that immich publishes and `export.py` writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import (
    DEFAULT_LOGIT_SCALE,
    DamagedFile,
    ModelOptions,
    Vectors,
    fetch_repository,
    needs_modules,
    normalize,
    one_line,
    read_json,
    read_manifest,
    sha256_of,
    space_of,
    split_model,
    unit_rows,
)
from inputs import ClipTokenizer, Pixels, Preprocess, Tokens, true_length
from machine import nvidia_gpus, usable_cores

log = logging.getLogger("lumen.onnxrt")


class ONNXRTBackend:
    """ONNX Runtime on towers in the `visual/` + `textual/` folder layout that the README describes.

    Takes image towers with uint8 `[n, h, w, 3]` or float32 `[n, 3, h, w]` input, text towers with int32 or int64 ids,
    each with a fixed or an open batch; the first output is the embedding, whatever its name.
    """

    npu = refusal = accelerator = ""
    lanes = 1
    _form = "onnxrt"  # of a download; see `fetch_repository`

    def __init__(self, options: ModelOptions) -> None:
        needs_modules(("onnxruntime", "tokenizers", "ftfy", "regex"), options)
        self._options = options
        self._folder, self.model_id = self._resolve()
        config = read_json(self._folder / "config.json") if self._folder else {}
        manifest = self._manifest()
        self.model_id = manifest.get("model_id", self.model_id)
        self.logit_scale = float(manifest.get("logit_scale", config.get("logit_scale", DEFAULT_LOGIT_SCALE)))
        self.precision = str(manifest.get("precision", "fp32"))
        self.notice = str(manifest.get("notice", ""))
        self.golden = manifest.get("golden", {})
        self.self_test_cosine: float | None = None
        self._weights: list[Path] = []
        self._load_image_tower()
        self._load_text_tower(config)
        source = "" if options.onnx_image or options.onnx_text else manifest.get("source", {}).get("sha256", "")
        self.space = space_of(source or sha256_of(*self._weights), self.preprocess, self.precision)
        self.dim = int(self.encode_text(self.tokenize(["a photo"])).shape[1])

    def _resolve(self) -> tuple[Path | None, str]:
        """(folder, model_id); no folder when both towers are given as files."""
        options, value = self._options, self._options.model
        if Path(value).is_dir():
            return Path(value), Path(value).resolve().name
        if self._image_file() and options.onnx_text:
            return None, value.removeprefix("hf-hub:")
        if value.startswith("hf-hub:"):
            repo = value.removeprefix("hf-hub:")
            return fetch_repository(options, repo, self._wanted_files, self._form), repo
        arch, tag = split_model(options)
        if Path(tag).exists():
            raise options.error("MODEL", value, "these are torch weights; onnxrt takes a visual/ + textual/ folder")
        # immich publishes OpenCLIP models in this layout, under names made of the architecture and the tag.
        repo = f"immich-app/{arch}__{tag.replace('_', '-')}"
        return fetch_repository(options, repo, self._wanted_files, self._form), value

    def _manifest(self) -> dict[str, Any]:
        """That of the folder. A file of a download that is damaged is fetched once more. Raises BackendError."""
        if self._folder is None:
            return {}
        try:
            return read_manifest(self._folder, self._options)
        except DamagedFile as error:
            markers = list(self._folder.glob(".complete-*.json"))
            if not markers:  # no download
                raise
            log.warning("%s is damaged; fetching it once more", error.path)
            for path in (error.path, *markers):
                path.unlink()
            self._folder, _ = self._resolve()
            assert self._folder is not None
            return read_manifest(self._folder, self._options)

    def _wanted_files(self, files: list[str]) -> list[str]:
        """Both towers and their configs; what belongs to other runtimes stays on the hub."""
        if "visual/model.onnx" not in files or "textual/model.onnx" not in files:
            raise ValueError("it has no visual/model.onnx and textual/model.onnx, so it has no form for ONNX Runtime")
        return [
            name
            for name in files
            if name in ("config.json", "manifest.json")
            or (name.startswith(("visual/", "textual/")) and "/rknpu/" not in name and not name.endswith(".armnn"))
        ]

    def _image_file(self) -> str:
        return self._options.onnx_image

    def _load_image_tower(self) -> None:
        path = self.image_path = self._tower_path("ONNX_IMAGE", self._options.onnx_image, "visual")
        self.arrange(self.arrangements()[0])
        tower = self._image.get_inputs()[0]
        self._takes_uint8 = tower.type == "tensor(uint8)"
        side = tower.shape[1] if self._takes_uint8 else tower.shape[2]
        recipe = read_json(path.parent / "preprocess_cfg.json")
        self.preprocess = Preprocess.from_config(recipe, side if isinstance(side, int) else None)
        used = self._image.get_providers()[0]
        short = used.removesuffix("ExecutionProvider").lower()
        self.runtime = "onnxrt" if short == "cpu" else f"onnxrt-{short}"
        self.accelerator = "" if short == "cpu" else nvidia_gpus()  # ONNX Runtime names no device

    def _load_text_tower(self, config: Mapping[str, Any]) -> None:
        path = self._text_path = self._tower_path("ONNX_TEXT", self._options.onnx_text, "textual")
        self._text: Any = self._session(path, "ONNX_TEXT", usable_cores())
        inputs = self._text.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(x.name for x in inputs)
            raise self._options.error("ONNX_TEXT", str(path), f"takes {names}; only towers fed by token ids alone")
        length = inputs[0].shape[1]
        self.open_length = not isinstance(length, int)
        context = config.get("text_cfg", {}).get("context_length", 77) if self.open_length else length
        self._tokenizer = ClipTokenizer.from_file(path.parent / "tokenizer.json", int(context))

    def _tower_path(self, variable: str, value: str, part: str) -> Path:
        path = Path(value) if value or self._folder is None else self._folder / part / "model.onnx"
        if not path.is_file():
            if value:
                raise self._options.error(variable, value, "no such file")
            text = f"the folder has no {part}/model.onnx; a model needs both towers, {self._options.name}_{variable}"
            raise self._options.error("MODEL", self._options.model, f"{text} can name one elsewhere")
        self._weights.append(path if value else path.parent)
        return path

    def arrangements(self) -> Sequence[str]:
        on_cpu = self._options.ort_providers in ((), ("CPUExecutionProvider",))
        return ("split", "whole") if on_cpu and usable_cores() > 1 else ("whole",)

    def arrange(self, arrangement: str) -> None:
        self.lanes = usable_cores() if arrangement == "split" else 1
        self._image: Any = None  # not two at a time
        self._image = self._session(self.image_path, "ONNX_IMAGE", usable_cores() // self.lanes)

    def _session(self, path: Path, variable: str, threads: int) -> Any:
        import onnxruntime

        wanted = list(self._options.ort_providers) or ["CPUExecutionProvider"]
        missing = [name for name in wanted if name not in onnxruntime.get_available_providers()]
        if missing:
            have = ", ".join(onnxruntime.get_available_providers())
            raise self._options.error("ORT_PROVIDERS", ",".join(wanted), f"{missing[0]} is not available; here: {have}")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores that decode the next pictures.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), settings, providers=wanted)
        except Exception as error:
            raise self._options.error(
                variable, str(path), f"ONNX Runtime cannot load it ({one_line(error)})"
            ) from error
        if session.get_providers()[0] != wanted[0]:  # never a silent fall-back
            text = f"ONNX Runtime fell back to {session.get_providers()[0]}"
            raise self._options.error("ORT_PROVIDERS", ",".join(wanted), text)
        return session

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self._tokenizer(texts)

    def encode_images(self, pixels: Pixels) -> Vectors:
        return self._run(self._image, pixels if self._takes_uint8 else normalize(pixels, self.preprocess))

    def rest_text(self) -> None:
        self._text = None

    def encode_text(self, tokens: Tokens) -> Vectors:
        if self._text is None:
            self._text = self._session(self._text_path, "ONNX_TEXT", usable_cores())
        integers = np.int32 if self._text.get_inputs()[0].type == "tensor(int32)" else np.int64
        return self._run(self._text, tokens.astype(integers), cut=self.open_length)

    @staticmethod
    def _run(session: Any, batch: NDArray[Any], cut: bool = False) -> Vectors:
        """Runs a batch, in pieces of the size that the graph has fixed, if it has; `cut`: token ids, at true length."""
        tower = session.get_inputs()[0]
        size = tower.shape[0] if isinstance(tower.shape[0], int) else len(batch)
        rows = []
        for start in range(0, len(batch), size):
            piece = batch[start : start + size]
            if cut:
                piece = piece[:, : true_length(piece)]
            padding = [(0, size - len(piece))] + [(0, 0)] * (batch.ndim - 1)
            whole = np.pad(piece, padding, mode="edge") if len(piece) < size else piece
            rows.append(session.run(None, {tower.name: whole})[0][: len(piece)])
        return unit_rows(np.concatenate(rows))
