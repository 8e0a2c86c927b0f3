"""Every setting: its name, default, unit, what is allowed, and why one would change it.

Read once, from the environment, into one frozen dataclass. No other file reads the environment for a setting.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import machine
from errors import BackendError, SettingError

log = logging.getLogger("lumen.settings")

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent
DATA_DIR = HERE / "data"
SPECIES_SOURCES = ("TreeOfLife-10M", "TreeOfLife-200M")  # values of BIOCLIP_LABELS that are no paths
DEFAULT_MODELS = {"CLIP": "ViT-B-32:laion2b_s34b_b79k", "BIOCLIP": "hf-hub:imageomics/bioclip-2"}
# Former settings, and what the daemon does instead.
RETIRED = {
    "CLIP_MDNS_STATUS": "the daemon announces its real state, loading or ready",
    "CLIP_MDNS_VERSION": "the daemon announces MDNS_VERSION of discovery.py",
}
PREFIXES = ("CLIP_", "BIOCLIP_", "LUMEN_")  # of all settings except BATCH_SIZE and ADVERTISE_IP
# Variables with these prefixes that the unit, compose.yaml, the client and the tests read.
READ_ELSEWHERE = (
    *("LUMEN_OPTIONS", "LUMEN_ADDRESS", "LUMEN_MDNS_INTERFACE"),
    *("LUMEN_SEED", "LUMEN_FUZZ", "LUMEN_MUTANTS", "LUMEN_SOAK_MINUTES", "LUMEN_PHOTOS"),
    *("LUMEN_ARM64_ROOT", "LUMEN_BOOT_ROOT", "LUMEN_DOCKER_ROOT", "LUMEN_RKNN_VENV"),
)
LIKENESS_MIN = 0.75  # of an unknown variable to a setting that is suggested instead
# Variables that Kubernetes sets in every container for a service named `lumen`, `clip` or `lumen-clip`.
SERVICE_LINK = re.compile(r"\w+_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
# What `--demo` sets: an ordinary model in the ordinary layout, and the names of what it was shown.
DEMO_DIR = HERE / "gen" / "demo"
DEMO = {
    "CLIP_BACKEND": "onnxrt",
    "CLIP_MODEL": str(DEMO_DIR),
    "BIOCLIP_MODEL": str(DEMO_DIR),
    "CLIP_LABELS": str(DEMO_DIR / "names.json"),
    "BIOCLIP_LABELS": str(DEMO_DIR / "species.json"),
}


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


def _address(text: str) -> str:
    """The address of an HTTP server, without a slash at its end."""
    try:
        url = urllib.parse.urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of a port that is no number, for example
        valid = False
    if not valid or "@" in text or "?" in text or "#" in text:
        raise ValueError("allowed: the address of a server, such as http://192.168.1.5:3003")
    return text.rstrip("/")


def _switch(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _model_path(text: str) -> str:
    """The folder, the file of `ARCH:file`, or "". Only a path contains a slash or begins with a dot, unlike a tag."""
    if text.startswith("hf-hub:"):
        return ""
    path = text if text.startswith("/") else text.partition(":")[2] or text
    return path if "/" in path or path.startswith(".") else ""


# --- when a setting has no effect: -> the setting that is the reason, or "" --------------------------------------


def _with_backend(*names: str) -> Callable[[ModelOptions], str]:
    """Has an effect with these backends only."""
    return lambda options: "" if options.backend in names else f"{options.name}_BACKEND={options.backend}"


def _with_models(*names: str) -> Callable[[Settings], str]:
    """Has an effect with these models only."""
    return lambda settings: ", ".join(f"{n.upper()}_BACKEND=none" for n in names if n not in settings.models())


def _unless_off(name: str, off: str) -> Callable[[Settings], str]:
    """Has no effect if another setting has the value `off`, whose parsed form is false."""
    return lambda settings: "" if getattr(settings, name) else f"{name.upper()}={off}"


# --- fields -----------------------------------------------------------------------------------------------------


def _setting(
    default: Any,
    parse: Callable[[str], Any] = str,
    path: Callable[[str], str] = lambda text: "",
    idle: Callable[[Any], str] = lambda owner: "",
) -> Any:
    """A field whose value comes from an environment variable.

    `parse` converts the text to the value. `path` returns the path in the text, or "". `idle` receives the whole
    dataclass and returns the other setting because of which this one has no effect, or "".
    """
    return field(default=default, metadata={"parse": parse, "path": path, "idle": idle})


_SERVED = _with_backend("torch", "onnxrt", "rknn")
_ONNX = _with_backend("onnxrt", "rknn")  # with rknn for texts, and for images where the NPU is refused
_RKNN = _with_backend("rknn")
_WITH_MDNS = _unless_off("clip_mdns_type", "off")


@dataclass(frozen=True)
class ModelOptions:
    """The settings that each of the two models has, under its name: `CLIP_BACKEND` and `BIOCLIP_BACKEND`, and so on.

    `name` ("CLIP" or "BIOCLIP") is the prefix of the variables, which error lines name. The fields without a parser are
    not settings.
    """

    name: str
    # What runs the model; "none" leaves it and its tasks out. BIOCLIP_BACKEND is CLIP_BACKEND unless it is set.
    backend: str = _setting("torch", _choice("torch", "onnxrt", "rknn", "none"))
    # ARCH:tag, ARCH:path/to/weights, hf-hub:org/name, or a folder. Another model has another space of vectors.
    model: str = _setting("", path=_model_path, idle=_SERVED)
    data_dir: Path = DATA_DIR
    # torch: where the model runs, "cuda:1" for example. Empty: CUDA, else MPS, else the CPU. The container images for
    # GPUs set it for both models, so it is not reported for a model that is left out.
    device: str = _setting("", idle=_with_backend("torch", "none"))
    # torch: half precision takes half of the memory of a GPU. auto: half precision on a GPU, if its vectors agree with
    # those of fp32. A CPU has fp32 only.
    precision: str = _setting("auto", _choice("auto", "fp32", "fp16"), idle=_with_backend("torch"))
    # Images or texts that share one batch at most; 0: BATCH_SIZE, or on a GPU what the tuning finds, up to 256. More
    # need more memory, and others wait longer.
    max_batch_size: int = _setting(0, _number(1, 1024), idle=_SERVED)
    # onnxrt: files in place of the folder's visual/model.onnx and textual/model.onnx.
    onnx_image: str = _setting("", path=str, idle=_ONNX)
    onnx_text: str = _setting("", path=str, idle=_ONNX)
    # onnxrt: execution providers in the order of preference; empty: the CPU's. One that is missing ends the start.
    ort_providers: tuple[str, ...] = _setting((), _names, idle=_ONNX)
    # rknn: a program in place of the folder's visual/rknpu/TARGET/model.rknn.
    rknn_model: str = _setting("", path=str, idle=_RKNN)
    # rknn: the chip; empty: what the device tree says, which a container may hide.
    rknn_target: str = _setting("", _choice(*machine.NPU_CORES), idle=_RKNN)
    # rknn: cores of the NPU, each with its own copy of the model; 0: all for which there is memory.
    rknn_cores: int = _setting(0, _number(0, 3), idle=_RKNN)
    # What the model classifies into. CLIP: a JSON list of names; empty: ImageNet-1k. BioCLIP: see `species_loader`.
    labels: str = _setting("", path=lambda text: "" if text in SPECIES_SOURCES else text, idle=_SERVED)

    def error(self, variable: str, value: str, text: str) -> SettingError:
        """The error for a value that the operator has to change."""
        return SettingError(self.line(variable, value, text))

    def failure(self, variable: str, value: str, text: str) -> BackendError:
        """The error for a failure that may not occur at the next start: a download, a damaged file, the machine."""
        return BackendError(self.line(variable, value, text))

    def line(self, variable: str, value: str, text: str) -> str:
        return f"{self.name}_{variable}={value}: {text}"


@dataclass(frozen=True)
class Settings:
    """Every setting, each under its variable's name in lower case; docs/settings.md has the table.

    An empty variable is unset.
    """

    clip: ModelOptions
    bioclip: ModelOptions
    # Images or texts that share one batch at most; see `ModelOptions.max_batch_size`. Set, it limits a GPU too.
    batch_size: int = _setting(8, _number(1, 1024))
    # Prompts that are averaged for each class of `clip_classify`. More are a little more accurate, and the first start
    # takes so many times as long. Allowed are the keys of `labels.TEMPLATES`.
    clip_templates: int = _setting(7, lambda text: int(_choice("1", "7", "80")(text)), idle=_with_models("clip"))
    # A JSON file of what `smart_classify` distinguishes; empty: `label_files.SCENES`.
    lumen_scenes: str = _setting("", path=str, idle=_with_models("clip", "bioclip"))
    # The model of the `semantic_` tasks; empty: they are off. Photo apps route them by name alone, so a second node
    # with another model would mix vectors of two models.
    lumen_semantic: str = _setting("", _choice("clip", "bioclip"))
    # The service types that are announced by mDNS. "off" makes the daemon invisible to apps that search for it.
    clip_mdns_type: tuple[str, ...] = _setting(("_homenative-node._tcp.local.", "_lumen._tcp.local."), _mdns_types)
    # The instance name, by which people recognize the daemon in an app's list.
    clip_mdns_name: str = _setting("CLIP-Image-Processor", _mdns_name, idle=_WITH_MDNS)
    # The identity that is announced. Empty: created once and kept in the data folder. A container may lose that folder.
    clip_mdns_uuid: str = _setting("", idle=_WITH_MDNS)
    # The IPv4 address that is announced. Empty: chosen by the daemon. Set it if a container's address is not reachable.
    advertise_ip: str = _setting("", _ipv4, idle=_WITH_MDNS)
    # Models, caches and label sets, several gigabytes. Another folder starts with downloads.
    lumen_data_dir: Path = _setting(DATA_DIR, Path, path=str)
    # Whether a JPEG may be decoded at a fraction of its size, in about half of the time. 0: always at full size.
    lumen_jpeg_draft: bool = _setting(True, _switch)
    # Whether the first start measures for about ten seconds how images run fastest. 0: BATCH_SIZE images on each core.
    lumen_tune: bool = _setting(True, _switch)
    # PEM files. A certificate and its key switch TLS on; photo apps then no longer reach the daemon.
    lumen_tls_cert: str = _setting("", path=str)
    lumen_tls_key: str = _setting("", path=str)
    # PEM file of an authority: only clients with a certificate that it signed are served.
    lumen_tls_client_ca: str = _setting("", path=str)
    # A file with a token that every call must carry.
    lumen_token_file: str = _setting("", path=str)
    # Seconds after which a batch, or the decoding of a picture, counts as hung and the process ends. A lower value may
    # end the daemon on a slow board while it works. A higher value delays the restart of a daemon that hangs.
    lumen_hang_s: int = _setting(120, _number(1, 86_400))
    # Open Infer streams, each with two threads. A stream beyond that receives RESOURCE_EXHAUSTED.
    lumen_max_streams: int = _setting(64, _number(1, 4096))
    # Megabytes (2^20 bytes) of one request. Four times as much may be held over all streams.
    lumen_max_request_mb: int = _setting(64, _number(1, 1024))
    # Megapixels (10^6 pixels) of one image, which take 4 to 20 bytes each while it is decoded.
    lumen_max_megapixels: int = _setting(40, _number(1, 1000))
    # The port of the metrics for Prometheus; 0: none.
    lumen_metrics_port: int = _setting(0, _number(0, 65535))
    # The HTTP port for immich's smart search; 0: none. immich's own machine-learning service uses 3003.
    lumen_immich_port: int = _setting(0, _number(0, 65535))
    # immich's own service, for its requests that are no smart search: faces and texts in pictures. Without it they are
    # refused, and immich then takes the daemon for unhealthy and sends its searches elsewhere.
    lumen_immich_fallback: str = _setting("", _address, idle=_unless_off("lumen_immich_port", "0"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Logs a warning for each variable that is not a setting, or that has no effect beside the others.

        Raises SettingError: one line with the variable, its value and what is allowed.
        """
        for name, instead in RETIRED.items():
            if environment.get(name):
                log.warning("%s is no longer a setting and has no effect: %s", name, instead)
        _warn_of_unknown(environment)
        shared = _read(cls, "", environment)
        common = {"max_batch_size": shared.get("batch_size", 0), "data_dir": shared.get("lumen_data_dir", DATA_DIR)}
        common["model"] = DEFAULT_MODELS["CLIP"]
        clip = ModelOptions("CLIP", **common | _read(ModelOptions, "CLIP_", environment))
        common |= {"backend": clip.backend, "model": DEFAULT_MODELS["BIOCLIP"]}
        bioclip = ModelOptions("BIOCLIP", **common | _read(ModelOptions, "BIOCLIP_", environment))
        settings = cls(clip, bioclip, **shared)
        if not settings.models():
            raise SettingError("CLIP_BACKEND=none: there is nothing to serve; allowed for one of the two models")
        if settings.lumen_semantic and settings.lumen_semantic not in settings.models():
            model = settings.lumen_semantic
            raise SettingError(f"LUMEN_SEMANTIC={model}: {model.upper()}_BACKEND=none; allowed: a model that is served")
        if settings.lumen_immich_port and "clip" not in settings.models():
            text = "CLIP_BACKEND=none; immich's smart search needs CLIP"
            raise SettingError(f"LUMEN_IMMICH_PORT={settings.lumen_immich_port}: {text}")
        for owner, prefix in ((settings, ""), (clip, "CLIP_"), (bioclip, "BIOCLIP_")):
            for name, setting in _variables(type(owner), prefix).items():
                text = environment.get(name, "").strip()
                if text and (reason := setting.metadata["idle"](owner)):
                    log.warning("%s=%s has no effect with %s", name, text, reason)
        return settings

    def models(self) -> dict[str, ModelOptions]:
        """The models that are served, under the names of the task table."""
        both = {"clip": self.clip, "bioclip": self.bioclip}
        return {name: options for name, options in both.items() if options.backend != "none"}


def _variables(kind: type[Settings | ModelOptions], prefix: str) -> dict[str, Field[Any]]:
    """The settings of a dataclass by the names of their variables."""
    return {(prefix + setting.name).upper(): setting for setting in fields(kind) if "parse" in setting.metadata}


def _warn_of_unknown(environment: Mapping[str, str]) -> None:
    """Warns of each variable that looks like a setting and is none, and names the most similar setting."""
    known = {**_variables(Settings, ""), **_variables(ModelOptions, "CLIP_"), **_variables(ModelOptions, "BIOCLIP_")}
    for name in sorted(environment):
        text = environment[name].strip()
        if not text or not name.startswith(PREFIXES) or name in known or name in RETIRED or name in READ_ELSEWHERE:
            continue
        if "://" in text or SERVICE_LINK.fullmatch(name):
            continue
        # A shorter variable is compared with the beginning of a setting's name as well.
        parts = {setting[: len(name) + 1]: setting for setting in known} | {setting: setting for setting in known}
        similar = difflib.get_close_matches(name, parts, 1, LIKENESS_MIN)
        log.warning("%s is not a setting%s", name, f"; did you mean {parts[similar[0]]}?" if similar else "")


def _read(kind: type[Settings | ModelOptions], prefix: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a dataclass that the environment sets. Raises SettingError."""
    values: dict[str, Any] = {}
    for name, setting in _variables(kind, prefix).items():
        text = environment.get(name, "").strip()
        if text:
            path = setting.metadata["path"](text)
            if setting.name == "model" and environment.get(f"{prefix}ONNX_TEXT", ""):
                path = ""  # with towers given as files, it may be only a name
            if path and "NOTIFY_SOCKET" in environment and not Path(path).is_absolute():
                allowed = "paths in systemd's environment file must be absolute"
                raise SettingError(f"{name}={text}: {path} is not an absolute path; {allowed}")
            try:
                values[setting.name] = setting.metadata["parse"](text)
            except ValueError as error:
                raise SettingError(f"{name}={text}: {error}") from None
    return values


def demo_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The demo's models in place of the operator's. Photo apps do not find it unless CLIP_MDNS_TYPE says so."""
    kept = {
        name: value
        for name, value in environment.items()
        if name.startswith("CLIP_MDNS_") or not name.startswith(("CLIP_", "BIOCLIP_"))
    }
    return {"CLIP_MDNS_TYPE": "off"} | kept | DEMO
