"""The image tower on a Rockchip NPU.

`rknnlite` is imported when a backend is built; `available_memory` and `board_target` may be asked anywhere.
"""

from __future__ import annotations

import base64
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import ModelOptions, Vectors, normalize, read_json, unit_rows
from inputs import Pixels, Preprocess, decode_image
from machine import usable_cores
from onnxrt import ONNXRTBackend

log = logging.getLogger("lumen.npu")

NPU_FLOOR = 0.999  # the least cosine of what the NPU makes of a golden picture
NPU_FORMAT = 1  # of the model.json beside a .rknn file
NPU_CORES = {"rk3562": 1, "rk3566": 1, "rk3568": 1, "rk3576": 2, "rk3588": 3}
DEVICE_TREE = Path("/proc/device-tree/compatible")


class NPURefused(Exception):
    """The NPU of this board cannot be used, or not be trusted; the text is a part of one line.

    `detail` is what its library said, for the operator alone.
    """

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = f" ({detail[:300]})" if detail else ""


def board_target() -> str:
    """The target in `NPU_CORES` whose programs this board runs, or "" if it is no Rockchip board that we know."""
    try:
        return npu_target(DEVICE_TREE.read_bytes().decode("ascii", "replace"))
    except OSError:  # no device tree, or a container that hides it
        return ""


def npu_target(names: str) -> str:
    """Of the names that a device tree lists, such as `rockchip,rk3588s`; see `board_target`."""
    if "rk3582" in names:  # sold with a part of an RK3588's cores
        return "rk3588"
    return next((target for target in NPU_CORES if target in names), "")


def available_memory() -> int:
    """Bytes that the system could give to a program now, or 0 if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


class NPUContext:
    """One program on one core of the NPU, with a thread of its own.

    Nobody promises that two threads may share a context, and cores that work on one picture together hardly gain
    (RKNN.md 3.2): each core gets a context, and each context its thread, on which alone it is made and used.
    """

    def __init__(self, path: Path, core: int, choose_core: bool) -> None:
        """`choose_core` only where a core may be named: elsewhere that is an error. Raises NPURefused."""
        self.runtime_version = ""
        self._thread = ThreadPoolExecutor(1, f"npu-{core}")
        try:
            self._thread.submit(self._load, path, core, choose_core).result()
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, core: int, choose_core: bool) -> None:
        from rknnlite.api import RKNNLite

        self._npu = RKNNLite()
        for level in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
            logging.addLevelName(level, _LEVEL_NAMES[level])  # it renames everybody's to one letter
        with _overheard(self._npu.rknn_log.logger) as reason:
            if self._npu.load_rknn(str(path)) != 0:
                raise NPURefused("the NPU's library cannot read the program", reason())
            mask = {"core_mask": (RKNNLite.NPU_CORE_0, RKNNLite.NPU_CORE_1, RKNNLite.NPU_CORE_2)[core]}
            if self._npu.init_runtime(**(mask if choose_core else {})) != 0:
                raise NPURefused(f"the NPU's core {core} does not start", reason())
            self.runtime_version = " ".join(str(self._npu.get_sdk_version()).split())
        self._npu.rknn_data = None  # the file's bytes, which the runtime has copied by now

    def run(self, pictures: NDArray[Any], layout: str) -> Future[list[NDArray[np.float32]]]:
        """`[n, ...]`, which go through the fixed batch of one -> n rows, float32. Raises RuntimeError."""
        return self._thread.submit(self._run, pictures, layout)

    def _run(self, pictures: NDArray[Any], layout: str) -> list[NDArray[np.float32]]:
        rows = []
        for index in range(len(pictures)):
            picture = np.ascontiguousarray(pictures[index : index + 1])
            outputs = self._npu.inference(inputs=[picture], data_format=layout)
            if outputs is None:  # it logs its failures and raises nothing
                raise RuntimeError("the NPU failed on an image; its library's messages in the log say more")
            rows.append(np.array(outputs[0], np.float32).ravel())  # a copy: the library may use its buffer again
        return rows

    def close(self) -> None:
        if npu := getattr(self, "_npu", None):
            self._thread.submit(npu.release)
        self._thread.shutdown()


_LEVEL_NAMES = {level: logging.getLevelName(level) for level in (10, 20, 30, 40)}


@contextmanager
def _overheard(library: logging.Logger) -> Iterator[Callable[[], str]]:
    """Keeps a library's tracebacks off the screen; gives a function that names the last error among them."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.debug("the NPU's library: %s", record.getMessage())
            if record.levelno >= logging.ERROR:
                heard.append(record.getMessage())

    def reason() -> str:
        lines = heard[-1].strip().splitlines() if heard else []
        start = max(
            (i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): |Exception: ", line)), default=0
        )
        return " ".join(" ".join(lines[start:]).split())

    handlers, library.handlers = library.handlers, [Listener()]
    try:
        yield reason
    finally:
        library.handlers = handlers


class RKNNBackend(ONNXRTBackend):
    """The image tower on a Rockchip NPU, the text tower on the CPU by ONNX Runtime.

    An NPU that does not start, or whose vectors are not those of its program's golden picture, is refused: `refusal`
    says why, and the folder's ONNX tower runs instead. Nothing short of running it proves a program right on a board.
    """

    def __init__(self, options: ModelOptions) -> None:
        if importlib.util.find_spec("rknnlite") is None:
            text = "needs a Rockchip board with rknn-toolkit-lite2, which is not installed here; elsewhere: onnxrt"
            raise options.error("BACKEND", options.backend, text)
        self.target = options.rknn_target or board_target()
        self._form = f"rknn-{self.target}" if self.target else "rknn"  # another board wants another program
        self._contexts: list[NPUContext] = []
        super().__init__(options)
        if self._contexts:
            self.precision = "fp16"

    def _wanted_files(self, files: list[str]) -> list[str]:
        npu = f"visual/rknpu/{self.target}/"
        return super()._wanted_files(files) + [name for name in files if self.target and name.startswith(npu)]

    def _image_file(self) -> str:
        return self._options.rknn_model

    def arrangements(self) -> Sequence[str]:
        return ("whole",) if self._contexts else super().arrangements()

    def arrange(self, arrangement: str) -> None:
        if not self._contexts:
            super().arrange(arrangement)

    def _load_image_tower(self) -> None:
        if self._options.rknn_model and not Path(self._options.rknn_model).is_file():
            raise self._options.error("RKNN_MODEL", self._options.rknn_model, "no such file")
        try:
            self._start_npu()
        except NPURefused as refusal:
            for context in self._contexts:
                context.close()
            self._contexts = []
            self.refusal = " ".join(str(refusal).split())
            self._take_the_cpu(refusal.detail)

    def _take_the_cpu(self, detail: str) -> None:
        text = f"the NPU is not used: {self.refusal}{detail}"
        if self._onnx_tower() is None:
            text += "; and there is no visual/model.onnx that could run on the CPU instead"
            raise self._options.error("BACKEND", self._options.backend, text)
        log.error("%s: %s; images run on the CPU instead, by ONNX Runtime", self._options.name, text)
        super()._load_image_tower()

    def _onnx_tower(self) -> Path | None:
        given = self._options.onnx_image
        path = Path(given) if given else self._folder / "visual" / "model.onnx" if self._folder else None
        return path if path and path.is_file() else None

    def _start_npu(self) -> None:
        """Raises NPURefused; contexts that were started by then are in `_contexts`."""
        path = self._program()
        contract = read_json(path.with_name("model.json"))
        self._check_contract(contract)
        # Without a model.json it is immich's, which takes what has been normalised. The file itself does not say.
        self._takes_uint8 = bool(contract)
        recipes = (folder / "preprocess_cfg.json" for folder in (path.parent, *path.parents[:3]))
        recipe = contract.get("preprocess") or next(filter(None, map(read_json, recipes)), {})
        self.preprocess = Preprocess.from_config(recipe)
        for core in range(self._cores_to_use(path)):
            try:
                self._contexts.append(NPUContext(path, core, NPU_CORES[self.target] > 1))
            except NPURefused as refusal:
                if not self._contexts:
                    raise
                text = "%s: %s%s; the NPU goes on with %d cores"
                log.warning(text, self._options.name, refusal, refusal.detail, core)
                break
        cosine = self._worst_cosine(contract)
        if cosine is not None and not cosine >= NPU_FLOOR:
            raise NPURefused(f"self-test: cosine {cosine:.6f} to the golden vector; allowed: {NPU_FLOOR} and more")
        self.npu = f"{self.target}, {len(self._contexts)} of {NPU_CORES[self.target]} cores"
        self.npu += f", self-test {cosine:.6f}" if cosine is not None else ", not verified"
        runtime = self._contexts[0].runtime_version
        toolkit = contract.get("toolkit", "an unknown version")
        log.info("%s: NPU: %s; runtime %s, program of toolkit %s", self._options.name, self.npu, runtime, toolkit)
        # Vectors of the NPU and of its ONNX tower may lie in one index, so they are of the same weights.
        self._weights.append(tower.parent if (tower := self._onnx_tower()) else path)
        self.runtime = "rknn"

    def _program(self) -> Path:
        if not self.target:
            known = ", ".join(NPU_CORES)
            text = f"{DEVICE_TREE} names no Rockchip NPU that we know ({known}); in a container it may be hidden"
            raise NPURefused(f"{text}; {self._options.name}_RKNN_TARGET says it by hand")
        if self._options.rknn_model:
            return Path(self._options.rknn_model)
        assert self._folder is not None  # without one both towers were given as files
        path = self._folder / "visual" / "rknpu" / self.target / "model.rknn"
        if not path.is_file():
            raise NPURefused(
                f"the folder has no {path.relative_to(self._folder).as_posix()}; export.py --rknn makes it"
            )
        return path

    def _check_contract(self, contract: Mapping[str, Any]) -> None:
        if contract.get("format", NPU_FORMAT) != NPU_FORMAT:
            raise NPURefused(f"model.json is of format {contract['format']}; this version reads {NPU_FORMAT}")
        soc = contract.get("soc", self.target)
        if soc != self.target:
            raise NPURefused(f"the program is for {soc}, the board is a {self.target}")
        files = read_json(self._folder / "manifest.json").get("files", {}) if self._folder else {}
        onnx = files.get("visual/model.onnx")
        if onnx and contract.get("onnx_sha256", onnx) != onnx:
            raise NPURefused("the program was made of another visual/model.onnx than the one beside it")

    def _cores_to_use(self, path: Path) -> int:
        """Each context holds the weights, and the file besides while it loads."""
        wanted = self._options.rknn_cores or NPU_CORES[self.target]
        have, each = available_memory(), 3 * path.stat().st_size
        fit = max(1, have // each) if have else wanted
        if fit < wanted:
            log.warning("%s: memory for %d of %d NPU cores alone", self._options.name, fit, wanted)
        return min(wanted, fit, NPU_CORES[self.target])

    def _worst_cosine(self, contract: Mapping[str, Any]) -> float | None:
        """Of the golden picture on each core, or of a picture to what the ONNX tower makes of it; None without both."""
        golden = contract.get("golden") or self.golden
        if golden:
            file = base64.b64decode(golden["picture"])
            picture = decode_image(file, [self.preprocess], 1 << 20, draft=False)[self.preprocess]
            expected = np.array(golden["picture_vector"], np.float32)
        elif tower := self._onnx_tower():
            ramp = np.add.outer(np.arange(self.preprocess.size), np.arange(self.preprocess.size))
            picture = np.stack([ramp % 251, ramp // 2 % 241, 255 - ramp % 239], axis=-1).astype(np.uint8)
            session = self._session(tower, "ONNX_IMAGE", usable_cores())
            takes_uint8 = session.get_inputs()[0].type == "tensor(uint8)"
            given = picture[None] if takes_uint8 else normalize(picture[None], self.preprocess)
            expected = self._run(session, given)[0]
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

    def encode_images(self, pixels: Pixels) -> Vectors:
        if not self._contexts:
            return super().encode_images(pixels)
        batch, layout = self._as_input(pixels)
        step = len(self._contexts)
        shares = [context.run(batch[i::step], layout) for i, context in enumerate(self._contexts)]
        rows: list[Any] = [None] * len(batch)
        for i, share in enumerate(shares):
            rows[i::step] = share.result()
        # float16 inside: what it made a unit is one to three digits.
        return unit_rows(np.stack(rows))
