"""Every setting: its name, default, and what is allowed.

Read once, from the environment, into one frozen dataclass. Nobody else reads the environment for a setting.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import backends
import labels
import npu

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent
DATA_DIR = HERE / "data"
# What `--demo` sets: an ordinary model in the ordinary layout, and the names of what it was shown.
DEMO_DIR = HERE / "gen" / "demo"
DEMO = {
    "CLIP_BACKEND": "onnxrt",
    "CLIP_MODEL": str(DEMO_DIR),
    "BIOCLIP_MODEL": str(DEMO_DIR),
    "CLIP_LABELS": str(DEMO_DIR / "names.json"),
    "BIOCLIP_LABELS": str(DEMO_DIR / "species.json"),
}


class SettingError(ValueError):
    """An operator's value is not allowed; the text is one line that names the variable."""


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return text

    return parse


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise ValueError(f"allowed: a whole number from {low} to {high}")
        return int(text)

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mdns_types(text: str) -> tuple[str, ...]:
    types = () if text == "off" else _names(text)
    if not all(t.startswith("_") and t.endswith(("._tcp.local.", "._tcp.local")) for t in types):
        raise ValueError("allowed: service types such as _lumen._tcp.local., separated by commas, or off")
    return tuple(t.rstrip(".") + "." for t in types)


def _mdns_name(text: str) -> str:
    if "." in text or not 0 < len(text.encode()) <= 63:
        raise ValueError("allowed: one DNS label, 1 to 63 bytes without a dot")
    return text


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError("allowed: an IPv4 address") from None


def _templates(text: str) -> int:
    return int(_choice(*map(str, labels.TEMPLATES))(text))


def _switch(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _setting(default: Any, parse: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"parse": parse})


_BACKEND = _choice("torch", "onnxrt", "rknn", "none")
_BATCH = _number(1, 1024)


@dataclass(frozen=True)
class Settings:
    """Every setting under its variable's name in lower case; README has the table. An empty variable is unset."""

    clip_backend: str = _setting("torch", _BACKEND)
    bioclip_backend: str = _setting("", _BACKEND)  # "": CLIP's
    clip_model: str = _setting("ViT-B-32:laion2b_s34b_b79k")
    bioclip_model: str = _setting("hf-hub:imageomics/bioclip-2")
    clip_device: str = _setting("")
    bioclip_device: str = _setting("")
    clip_precision: str = _setting("fp32", _choice("fp32", "fp16"))
    bioclip_precision: str = _setting("fp32", _choice("fp32", "fp16"))
    batch_size: int = _setting(8, _BATCH)
    clip_max_batch_size: int = _setting(0, _BATCH)  # 0: BATCH_SIZE
    bioclip_max_batch_size: int = _setting(0, _BATCH)
    clip_onnx_image: str = _setting("")
    clip_onnx_text: str = _setting("")
    bioclip_onnx_image: str = _setting("")
    bioclip_onnx_text: str = _setting("")
    clip_ort_providers: tuple[str, ...] = _setting((), _names)
    bioclip_ort_providers: tuple[str, ...] = _setting((), _names)
    clip_rknn_model: str = _setting("")
    bioclip_rknn_model: str = _setting("")
    clip_rknn_target: str = _setting("", _choice(*npu.NPU_CORES))  # "": what the device tree says
    bioclip_rknn_target: str = _setting("", _choice(*npu.NPU_CORES))
    clip_rknn_cores: int = _setting(0, _number(0, 3))  # 0: all that there are and that memory allows
    bioclip_rknn_cores: int = _setting(0, _number(0, 3))
    clip_labels: str = _setting("")  # "": ImageNet-1k
    bioclip_labels: str = _setting("")  # "": see `loading.SpeciesLoader`
    clip_templates: int = _setting(7, _templates)
    lumen_scenes: str = _setting("")  # "": scenes.TABLE
    lumen_semantic: str = _setting("", _choice("clip", "bioclip"))  # "": the semantic_ tasks are off
    clip_mdns_type: tuple[str, ...] = _setting(("_homenative-node._tcp.local.", "_lumen._tcp.local."), _mdns_types)
    clip_mdns_name: str = _setting("CLIP-Image-Processor", _mdns_name)
    clip_mdns_uuid: str = _setting("")
    clip_mdns_status: str = _setting("ready")
    clip_mdns_version: str = _setting("1.0.0")
    advertise_ip: str = _setting("", _ipv4)
    lumen_data_dir: Path = _setting(DATA_DIR, Path)
    lumen_jpeg_draft: bool = _setting(True, _switch)
    lumen_tune: bool = _setting(True, _switch)
    lumen_tls_cert: str = _setting("")  # "": plaintext
    lumen_tls_key: str = _setting("")
    lumen_tls_client_ca: str = _setting("")
    lumen_token_file: str = _setting("")
    lumen_hang_s: int = _setting(120, _number(1, 86_400))
    lumen_max_streams: int = _setting(64, _number(1, 4096))
    lumen_max_request_mb: int = _setting(64, _number(1, 1024))
    lumen_max_megapixels: int = _setting(40, _number(1, 1000))
    lumen_metrics_port: int = _setting(0, _number(0, 65535))  # 0: none

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Raises SettingError: one line with the variable, its value and what is allowed."""
        values: dict[str, Any] = {}
        for setting in fields(cls):
            name = setting.name.upper()
            if text := environment.get(name, "").strip():
                try:
                    values[setting.name] = setting.metadata["parse"](text)
                except ValueError as error:
                    raise SettingError(f"{name}={text}: {error}") from None
        settings = cls(**values)
        if settings.backend_of("clip") == settings.backend_of("bioclip") == "none":
            raise SettingError("CLIP_BACKEND=none: there is nothing to serve; allowed for one of the two models")
        if settings.lumen_semantic and settings.backend_of(settings.lumen_semantic) == "none":
            model = settings.lumen_semantic
            raise SettingError(f"LUMEN_SEMANTIC={model}: {model.upper()}_BACKEND=none; allowed: a model that is served")
        return settings

    def backend_of(self, model: str) -> str:
        return self.clip_backend if model == "clip" else self.bioclip_backend or self.clip_backend

    def options(self, model: str) -> backends.ModelOptions:
        """What the backend of "clip" or "bioclip" needs to know."""
        shared = {"device", "precision", "onnx_image", "onnx_text", "ort_providers"}
        shared |= {"rknn_model", "rknn_target", "rknn_cores"}
        return backends.ModelOptions(
            name=model.upper(),
            backend=self.backend_of(model),
            model=getattr(self, f"{model}_model"),
            data_dir=self.lumen_data_dir,
            **{name: getattr(self, f"{model}_{name}") for name in shared},
        )

    def batch_size_of(self, model: str) -> int:
        return int(getattr(self, f"{model}_max_batch_size")) or self.batch_size


def demo_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The demo's models in place of the operator's. Photo apps do not find it unless CLIP_MDNS_TYPE says so."""
    mdns = {"CLIP_MDNS_TYPE": "off"}
    kept = {
        name: value
        for name, value in environment.items()
        if name.startswith("CLIP_MDNS_") or not name.startswith(("CLIP_", "BIOCLIP_"))
    }
    return mdns | kept | DEMO
