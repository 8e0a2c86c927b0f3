"""A stand-in for Rockchip's library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# What rknn-toolkit-lite2 2.5.0 does, as its source and a run of the real wheel show it, on ONNX Runtime: it reports by
# return codes, None and its log, takes one layout and dtype, and tolerates no second thread (here: aloud).
FAKE_NPU = """
import logging, os, threading, time
import numpy as np
import onnxruntime

log = logging.getLogger("acuityLogger")
log.propagate = False
log.addHandler(logging.StreamHandler())
SOC = os.environ.get("FAKE_SOC", "rk3588")
BROKEN_CORES = [int(core) for core in os.environ.get("FAKE_BROKEN_CORES", "").split()]
ZEROS = os.environ.get("FAKE_ZEROS")  # toolkit issue 574
made = []

class RKNNLite:
    NPU_CORE_AUTO, NPU_CORE_0, NPU_CORE_1, NPU_CORE_2 = 0, 1, 2, 4

    def __init__(self, verbose=False, verbose_file=None):
        self.rknn_data, self.session, self.mask, self.released = None, None, None, False
        self.pictures, self.thread = 0, threading.get_ident()
        self.rknn_log = type("Log", (), {"logger": log})
        logging.addLevelName(logging.ERROR, "E")  # for the whole process
        made.append(self)

    def _here(self):
        assert threading.get_ident() == self.thread, "a context was used by two threads"

    def load_rknn(self, path, key_path=None):
        self._here()
        if not os.path.exists(path):
            log.error("Invalid RKNN model path: %s", path)
            return -1
        self.path = path
        with open(path, "rb") as file:
            self.rknn_data = file.read()
        return 0

    def init_runtime(self, target=None, device_id=None, async_mode=False, core_mask=NPU_CORE_AUTO):
        self._here()
        self.mask = core_mask
        if core_mask and SOC not in ("rk3576", "rk3588"):
            log.error("Traceback\\nException: RKNN init failed. error code: RKNN_ERR_FAIL")
            return -1
        if (core_mask or 1).bit_length() - 1 in BROKEN_CORES:
            log.error("Traceback\\nException: failed to submit!")
            return -1
        try:
            self.session = onnxruntime.InferenceSession(self.path)
        except Exception:
            log.error("Traceback\\nException: Invalid RKNN model version 6")
            return -1
        return 0

    def inference(self, inputs, data_type=None, data_format=None, inputs_pass_through=None):
        self._here()
        tower = self.session.get_inputs()[0]
        uint8 = "uint8" in tower.type
        shape = (1, *tower.shape[1:])
        fits = (inputs[0].dtype, data_format) == ((np.uint8, "nhwc") if uint8 else (np.float32, "nchw"))
        if not (fits and inputs[0].shape == shape and inputs[0].flags.c_contiguous):
            log.error("The input does not fit: %s %s", inputs[0].shape, inputs[0].dtype)
            return None
        self.pictures += 1
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        rows = self.session.run(None, {tower.name: inputs[0]})[0].astype(np.float16).astype(np.float32)
        return [np.zeros_like(rows) if ZEROS else rows]

    def get_sdk_version(self):
        return "2.3.2 (429f97ae6b@2025-04-09T09:09:27)"

    def release(self):
        self._here()
        self.released = True
"""


def with_program(source: Path, folder: Path, target: str = "rk3588", **contract: Any) -> Path:
    """A copy of a model's folder with an "NPU program" in it, and an export's model.json if there is a contract."""
    shutil.copytree(source, folder)
    home = folder / "visual" / "rknpu" / target
    shutil.copytree(source / "visual", home, ignore=shutil.ignore_patterns("preprocess_cfg.json"))
    (home / "model.onnx").rename(home / "model.rknn")
    if contract:
        (home / "model.json").write_text(json.dumps({"format": 1, "soc": target, "toolkit": "2.5.0", **contract}))
    return folder


def golden_of(source: Path) -> dict[str, Any]:
    return json.loads((source / "manifest.json").read_text())["golden"]
