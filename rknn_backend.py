"""The image tower on a Rockchip NPU. The text tower runs on the CPU, by ONNX Runtime."""

from __future__ import annotations

import base64
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import machine
from errors import NPURefused
from machine import DEVICE_TREE, NPU_CORES
from model_files import Say, Vectors, quiet, read_json, unit_rows
from onnx_backend import FolderBackend, ImageTower, ModelFolder, OnnxImageTower, open_session, run_image_tower
from preprocess import Pixels, Preprocess, decode_image, normalize
from settings import ModelOptions

log = logging.getLogger("lumen.rknn_backend")

NPU_FLOOR = 0.999  # the least cosine of the NPU's vector of a golden picture with the expected one
NPU_FORMAT = 1  # version of the model.json beside a .rknn file
LEVEL_NAMES = {level: logging.getLevelName(level) for level in (10, 20, 30, 40)}


def open_rknn(options: ModelOptions, say: Say = quiet) -> FolderBackend:
    """Opens a model whose images run on the NPU.

    The NPU is refused if it does not start, or if its vector of the golden picture is wrong. Then the folder's ONNX
    tower runs instead, and `refusal` says why. Only running a program on the board shows that it is right there.
    Raises SettingError, and BackendError if neither of the two runs.
    """
    if importlib.util.find_spec("rknnlite") is None:
        text = "needs a Rockchip board with rknn-toolkit-lite2, which is not installed here; elsewhere: onnxrt"
        raise options.error("BACKEND", options.backend, text)
    options = replace(options, rknn_target=options.rknn_target or machine.board_target())
    folder = ModelFolder(options, say)
    if options.rknn_model and not Path(options.rknn_model).is_file():
        raise options.error("RKNN_MODEL", options.rknn_model, "no such file")
    try:
        return FolderBackend(folder, NPUImageTower(folder))
    except NPURefused as refused:
        refusal, detail = " ".join(str(refused).split()), refused.detail
    text = f"the NPU is not used: {refusal}{detail}"
    if onnx_tower(folder) is None:
        text += "; and there is no visual/model.onnx that could run on the CPU instead"
        raise options.failure("BACKEND", options.backend, text)
    log.error("%s: %s; images run on the CPU instead, by ONNX Runtime", options.name, text)
    backend = FolderBackend(folder, OnnxImageTower(folder))
    backend.refusal = refusal
    return backend


def onnx_tower(folder: ModelFolder) -> Path | None:
    """The ONNX image tower of the same model, if there is one."""
    given = folder.options.onnx_image
    path = Path(given) if given else folder.path / "visual" / "model.onnx" if folder.path else None
    return path if path and path.is_file() else None


class NPUImageTower(ImageTower):
    """An image tower on the NPU. The pictures of a batch are distributed over its cores; a single one runs on one."""

    runtime, precision = "rknn", "fp16"

    def __init__(self, folder: ModelFolder) -> None:
        """Raises NPURefused."""
        self._folder, self._options, self._target = folder, folder.options, folder.options.rknn_target
        self._contexts: list[NPUContext] = []
        try:
            self._start()
        except NPURefused:
            for context in self._contexts:
                context.close()
            raise
        # The space must be that of the ONNX tower, because vectors of both may be stored in one index.
        self.files = tower.parent if (tower := onnx_tower(folder)) else self._path

    def _start(self) -> None:
        path = self._path = self._program()
        contract = read_json(path.with_name("model.json"))
        self._check_contract(contract)
        # Without a model.json the program is immich's, which takes normalized input. The file itself does not say so.
        self._takes_uint8 = bool(contract)
        recipes = (folder / "preprocess_cfg.json" for folder in (path.parent, *path.parents[:3]))
        recipe = contract.get("preprocess") or next(filter(None, map(read_json, recipes)), {})
        self.preprocess = Preprocess.from_config(recipe)
        for core in range(self._cores_to_use(path)):
            try:
                self._contexts.append(NPUContext(path, core, NPU_CORES[self._target] > 1))
            except NPURefused as refusal:
                if not self._contexts:
                    raise
                text = "%s: %s%s; the NPU goes on with %d cores"
                log.warning(text, self._options.name, refusal, refusal.detail, core)
                break
        cosine = self._worst_cosine(contract)
        if cosine is not None and not cosine >= NPU_FLOOR:
            raise NPURefused(f"self-test: cosine {cosine:.6f} to the golden vector; allowed: {NPU_FLOOR} and more")
        self.npu = f"{self._target}, {len(self._contexts)} of {NPU_CORES[self._target]} cores"
        self.npu += f", self-test {cosine:.6f}" if cosine is not None else ", not verified"
        runtime = self._contexts[0].runtime_version
        toolkit = contract.get("toolkit", "an unknown version")
        log.info("%s: NPU: %s; runtime %s, program of toolkit %s", self._options.name, self.npu, runtime, toolkit)

    def _program(self) -> Path:
        if not self._target:
            known = ", ".join(NPU_CORES)
            text = f"{DEVICE_TREE} names no Rockchip NPU that we know ({known}); in a container it may be hidden"
            raise NPURefused(f"{text}; {self._options.name}_RKNN_TARGET says it by hand")
        if self._options.rknn_model:
            return Path(self._options.rknn_model)
        assert self._folder.path is not None  # it is None only if both towers are given as files
        name = f"visual/rknpu/{self._target}/model.rknn"
        if not (self._folder.path / name).is_file():
            raise NPURefused(f"the folder has no {name}; export.py --rknn makes it")
        return self._folder.path / name

    def _check_contract(self, contract: Mapping[str, Any]) -> None:
        if contract.get("format", NPU_FORMAT) != NPU_FORMAT:
            raise NPURefused(f"model.json is of format {contract['format']}; this version reads {NPU_FORMAT}")
        soc = contract.get("soc", self._target)
        if soc != self._target:
            raise NPURefused(f"the program is for {soc}, the board is a {self._target}")
        onnx = self._folder.manifest.get("files", {}).get("visual/model.onnx")
        if onnx and contract.get("onnx_sha256", onnx) != onnx:
            raise NPURefused("the program was made of another visual/model.onnx than the one beside it")

    def _cores_to_use(self, path: Path) -> int:
        """As many as memory allows. Each context holds the weights, and also the file while it loads."""
        wanted = self._options.rknn_cores or NPU_CORES[self._target]
        available, _ = machine.memory()
        fit = max(1, available // (3 * path.stat().st_size))
        if fit < wanted:
            log.warning("%s: memory for %d of %d NPU cores alone", self._options.name, fit, wanted)
        return min(wanted, fit, NPU_CORES[self._target])

    def _worst_cosine(self, contract: Mapping[str, Any]) -> float | None:
        """The worst cosine over the cores, for the golden picture, or else for a picture with the ONNX tower's vector.

        None if there is neither a golden picture nor an ONNX tower.
        """
        golden = contract.get("golden") or self._folder.manifest.get("golden")
        if golden:
            file = base64.b64decode(golden["picture"])
            picture = decode_image(file, [self.preprocess], 1 << 20, draft=False)[self.preprocess]
            expected = np.array(golden["picture_vector"], np.float32)
        elif tower := onnx_tower(self._folder):
            ramp = np.add.outer(np.arange(self.preprocess.size), np.arange(self.preprocess.size))
            picture = np.stack([ramp % 251, ramp // 2 % 241, 255 - ramp % 239], axis=-1).astype(np.uint8)
            session = open_session(self._options, tower, "ONNX_IMAGE", machine.usable_cores())
            expected = run_image_tower(session, picture[None], self.preprocess)[0]
        else:
            log.warning("%s: nothing to compare the NPU's vectors with; they are not verified", self._options.name)
            return None
        try:
            runs = [context.run(*self._as_input(picture[None])) for context in self._contexts]
            return float(min(unit_rows(np.stack(run.result()))[0] @ expected for run in runs))
        except (RuntimeError, ValueError) as error:
            raise NPURefused(f"self-test: {error}") from error

    def _as_input(self, pixels: Pixels) -> tuple[NDArray[Any], str]:
        return (pixels, "nhwc") if self._takes_uint8 else (normalize(pixels, self.preprocess), "nchw")

    def encode(self, pixels: Pixels) -> Vectors:
        batch, layout = self._as_input(pixels)
        step = len(self._contexts)
        shares = [context.run(batch[i::step], layout) for i, context in enumerate(self._contexts)]
        rows: list[Any] = [None] * len(batch)
        for i, share in enumerate(shares):
            rows[i::step] = share.result()
        # The NPU computes in float16, so its vectors have unit length only to three digits.
        return unit_rows(np.array(rows))


class NPUContext:
    """One program on one core of the NPU, on its own thread.

    It is not documented that threads may share a context, and cores that work on one picture together gain little. So
    each core has a context, and each context has a thread, on which alone it is created and used.
    """

    def __init__(self, path: Path, core: int, choose_core: bool) -> None:
        """`choose_core`: whether to name the core, which is an error on chips with one core. Raises NPURefused."""
        self._thread = ThreadPoolExecutor(1, f"npu-{core}")
        try:
            self._thread.submit(self._load, path, core, choose_core).result()
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, core: int, choose_core: bool) -> None:
        from rknnlite.api import RKNNLite

        self._npu = RKNNLite()
        for level, name in LEVEL_NAMES.items():  # the library has renamed the levels of all loggers to one letter
            logging.addLevelName(level, name)
        with _overheard(self._npu.rknn_log.logger) as reason:
            if self._npu.load_rknn(str(path)) != 0:
                raise NPURefused("the NPU's library cannot read the program", reason())
            mask = {"core_mask": (RKNNLite.NPU_CORE_0, RKNNLite.NPU_CORE_1, RKNNLite.NPU_CORE_2)[core]}
            if self._npu.init_runtime(**(mask if choose_core else {})) != 0:
                raise NPURefused(f"the NPU's core {core} does not start", reason())
            self.runtime_version = " ".join(str(self._npu.get_sdk_version()).split())
        self._npu.rknn_data = None  # frees the bytes of the file, which the runtime has copied

    def run(self, pictures: NDArray[Any], layout: str) -> Future[list[NDArray[np.float32]]]:
        """`[n, ...]` -> n rows, float32. Each picture is a batch of its own. Raises RuntimeError."""
        return self._thread.submit(self._run, pictures, layout)

    def _run(self, pictures: NDArray[Any], layout: str) -> list[NDArray[np.float32]]:
        rows = []
        for index in range(len(pictures)):
            picture = np.ascontiguousarray(pictures[index : index + 1])
            outputs = self._npu.inference(inputs=[picture], data_format=layout)
            if outputs is None:  # the library logs failures and does not raise
                raise RuntimeError("the NPU failed on an image; its library's messages in the log say more")
            rows.append(np.array(outputs[0], np.float32).ravel())  # a copy, because the library may reuse its buffer
        return rows

    def close(self) -> None:
        if npu := getattr(self, "_npu", None):
            self._thread.submit(npu.release)
        self._thread.shutdown()


@contextmanager
def _overheard(library: logging.Logger) -> Iterator[Callable[[], str]]:
    """Keeps a library's tracebacks out of the log. Yields a function that returns its last error."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.debug("the NPU's library: %s", record.getMessage())
            if record.levelno >= logging.ERROR:
                heard.append(record.getMessage())

    def reason() -> str:
        lines = heard[-1].strip().splitlines() if heard else []
        starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): |Exception: ", line)]
        return " ".join(" ".join(lines[max(starts, default=0) :]).split())

    handlers, library.handlers = library.handlers, [Listener()]
    try:
        yield reason
    finally:
        library.handlers = handlers
