"""Checks whether the daemon can run on this machine with the current settings: `python lumen_clip.py --doctor`.

Prints one line for each requirement of the configuration, and a remedy for each problem. Settings and the files that
they name are read by the functions that the start uses. Loads no model, leaves no file behind, and imports no runtime
into this process, because on an old processor the import can end it.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import logging.handlers
import mmap
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import backends
import labels
import machine
import onnx_backend
import security
import torch_backend
import tree_of_life
from discovery import advertised_ip
from errors import DaemonError, SettingError, unreadable
from label_files import read_scenes
from model_files import quiet
from settings import DATA_DIR, HERE, SPECIES_SOURCES, ModelOptions, Settings

DEVICE_TREE = "proc/device-tree/compatible"
OLDEST_DRIVER = (0, 9, 8)  # immich's floor; older ones fail at `submit` on some cores
# Resident memory of a model while it loads and runs, as a multiple of the size of its files. Measured for ViT-B-32,
# whose buffers are as large as its weights: 1.4 (torch) to 2.1 (int8).
MEMORY_FACTOR = 2
WEIGHTS = (".onnx", ".data", ".rknn", ".safetensors", ".bin", ".pt")
FINE, NOTE, WARNING, FAILURE = "ok", "--", "!", "FAIL"
# Programs that print the version of a runtime, each run in a separate process. onnxruntime also prints its providers.
PROBES = {
    "onnxruntime": "import onnxruntime as m; print(m.__version__, *m.get_available_providers())",
    "torch": "import torch as m; print(m.__version__)",
    "open_clip": "import sys; sys.path.insert(0, sys.argv[1]); import doctor; doctor.describe_torch(sys.argv[2])",
}


def describe_torch(models: str) -> None:
    """For PROBES: prints OpenCLIP's version, and as JSON the devices of models and why they are refused.

    `models`: a JSON list of options.
    """
    import open_clip
    import torch

    report: dict[str, Any] = {"gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    for options in (ModelOptions(**values) for values in json.loads(models)):
        device, refusals = "", []
        try:
            device = str(torch_backend.chosen_device(options).torch_device)
        except SettingError as error:
            refusals.append(str(error))
        try:
            torch_backend.is_repository(options) or torch_backend.find_weights(options)
        except (SettingError, OSError) as error:
            refusals.append(str(error))
        report[options.name] = {"device": device, "refusals": refusals}
    print(open_clip.__version__)
    print(json.dumps(report))


@dataclass
class Setup:
    """The configuration and the machine that are examined."""

    settings: Settings
    host: str
    port: int
    root: Path = Path("/")  # of the files in which the system describes itself
    probes: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)  # that have run, by module

    def models(self, *backends: str) -> list[ModelOptions]:
        """The models that are served, or those of them with one of these backends."""
        return [model for model in self.settings.models().values() if not backends or model.backend in backends]

    def board_names(self) -> list[str]:
        """The names in the device tree, such as `rockchip,rk3588`; [] if it cannot be read."""
        return [name for name in _text(self.root / DEVICE_TREE).split("\0") if name]

    def npu_target(self, model: ModelOptions) -> str:
        """The chip whose programs a model runs, or "" if it is not known."""
        return model.rknn_target or machine.npu_target(" ".join(self.board_names()))

    def probe(self, module: str) -> subprocess.CompletedProcess[str]:
        """The result of one of PROBES, which runs once."""
        if module not in self.probes:
            kept = ("name", "backend", "model", "device", "precision")
            models = [{key: getattr(model, key) for key in kept} for model in self.models("torch")]
            command = [sys.executable, "-c", PROBES[module], str(HERE), json.dumps(models)]
            self.probes[module] = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return self.probes[module]

    def torch_report(self) -> dict[str, Any]:
        """The result of OpenCLIP's probe for the settings, or {} if it does not run."""
        if not self.models("torch") or importlib.util.find_spec("open_clip") is None:
            return {}
        run = self.probe("open_clip")
        return dict(json.loads(run.stdout.splitlines()[-1])) if run.returncode == 0 else {}

    def refusals(self, model: ModelOptions) -> list[str]:
        """Why the start refuses what a model's settings name, as far as that is known without a download."""
        try:
            backends.check_sources(model)
        except SettingError as error:
            return [str(error)]
        return list(self.torch_report().get(model.name, {}).get("refusals", [])) if model.backend == "torch" else []

    def folder(self, model: ModelOptions) -> Path | None:
        """Where a model's files lie (for torch perhaps one file), or None while they are not here."""
        arch, _, weights = model.model.partition(":")
        with suppress(PermissionError):  # see `refusals`
            for path in (Path(model.model), *([Path(weights)] if weights else [])):
                if path.is_dir() or (weights and path.is_file()):
                    return path
        if model.onnx_image and model.onnx_text:
            return Path(model.onnx_image).parent
        # A download's folder has the repository's name, in which architecture and tag come in one spelling or another.
        wanted = [_letters(part) for part in ((weights,) if arch == "hf-hub" else (arch, weights))]
        for marker in model.data_dir.glob(f"models/*/.complete-{model.backend}*.json"):
            if all(part in _letters(marker.parent.name) for part in wanted):
                return marker.parent
        return None

    def weights(self, model: ModelOptions) -> list[Path]:
        """The files of a model that are here and take memory."""
        folder = self.folder(model)
        if folder is None:
            return []
        files = [folder] if folder.is_file() else folder.rglob("*")
        weights = [path for path in files if path.suffix in WEIGHTS and path.is_file()]
        if model.backend == "rknn":
            program = f"rknpu/{self.npu_target(model)}/"
            return [path for path in weights if "textual" in path.parts or program in path.as_posix()]
        return [path for path in weights if "rknpu" not in path.parts]

    def to_download(self) -> list[str]:
        """What is not here yet and comes from the hub."""
        absent = [model for model in self.models() if self.folder(model) is None]
        missing = [f"{model.name}'s model" for model in absent if not self.refusals(model)]
        files = {"clip": "imagenet_class_names.json", "bioclip": "txt_emb_species.json"}
        for model, options in self.settings.models().items():
            folder = self.settings.lumen_data_dir / model
            published = any(folder.glob("*/*/published/text_vectors.npz"))  # which bring their own names
            if not (options.labels or published or (folder / files[model]).is_file()):
                missing.append(f"{model.upper()}'s labels")
        return missing

    def npu_severity(self) -> str:
        """The severity of a finding that prevents the use of the NPU: FAILURE if a model has no ONNX tower instead."""
        for model in self.models("rknn"):
            folder = self.folder(model)  # None: the download brings an ONNX tower along
            if folder and not (model.onnx_image or (folder / "visual" / "model.onnx").is_file()):
                return FAILURE
        return WARNING


Finding = tuple[str, str]  # mark, text
Line = tuple[str, str, str]  # what, mark, text


# --- the checks -------------------------------------------------------------------------------------------------


def board(setup: Setup) -> Iterator[Finding]:
    names = setup.board_names()
    target = machine.npu_target(" ".join(names))
    named = {model.rknn_target for model in setup.models("rknn") if model.rknn_target}
    if target:
        cores = machine.NPU_CORES[target]
        yield FINE, f"{', '.join(names)}: runs programs for {target}, on {cores} NPU core{'s' * (cores > 1)}"
    elif named:
        yield FINE, f"{', '.join(sorted(named))}, as CLIP_RKNN_TARGET or BIOCLIP_RKNN_TARGET says"
    elif not setup.models("rknn"):
        yield NOTE, f"{', '.join(names) or platform.machine()}: no Rockchip NPU, and no model uses one"
    elif names:
        yield setup.npu_severity(), f"{', '.join(names)}: no Rockchip NPU that we know; set CLIP_BACKEND=onnxrt"
    else:
        remedy = "in a container: --security-opt systempaths=unconfined, or set CLIP_RKNN_TARGET"
        yield setup.npu_severity(), f"{setup.root / DEVICE_TREE} is not readable; {remedy}"


def npu_driver(setup: Setup) -> Iterator[Finding]:
    for path in ("kernel/debug/rknpu/version", "module/rknpu/version"):
        if match := re.search(r"(\d+)\.(\d+)\.(\d+)", _text(setup.root / "sys" / path)):
            if tuple(map(int, match.groups())) >= OLDEST_DRIVER:
                yield FINE, match[0]
            else:
                yield setup.npu_severity(), f"{match[0]} is too old; 0.9.8 and later work: update the vendor's kernel"
            return
    if _nodes(setup.root):
        yield FINE, "there, of unknown version (its number is in /sys/kernel/debug/rknpu/version, for root)"
    elif (setup.root / "dev" / "accel").exists():
        text = "mainline's rocket driver; Rockchip's library wants the vendor's kernel (5.10 or 6.1)"
        yield setup.npu_severity(), text
    else:
        yield setup.npu_severity(), "no rknpu driver; boot the vendor's kernel (5.10 or 6.1 with rknpu)"


def npu_library(setup: Setup) -> Iterator[Finding]:
    if importlib.util.find_spec("rknnlite") is None:
        remedy = "it has wheels for aarch64 and Python up to 3.12: pip install -r requirements-edge.txt there"
        yield FAILURE, f"rknn-toolkit-lite2 is not installed; {remedy}, or set CLIP_BACKEND=onnxrt"
    else:
        package = next(iter(importlib.metadata.distributions(name="rknn-toolkit-lite2")), None)
        yield FINE, f"rknn-toolkit-lite2 {package.version if package else 'of unknown version'}"
    found = [path for name in ("lib", "lib64") if (path := setup.root / "usr" / name / "librknnrt.so").is_file()]
    if not found:
        yield setup.npu_severity(), "librknnrt.so is not in /usr/lib; copy it there from rknn-toolkit2's rknpu2/runtime"
        return
    version = _search(found[0], rb"librknnrt version: (\d+\.\d+\.\d+)")
    yield FINE, f"librknnrt {version or 'of unknown version'} ({found[0]})"


def npu_programs(setup: Setup) -> Iterator[Finding]:
    for model in setup.models("rknn"):
        target, folder = setup.npu_target(model), setup.folder(model)
        path = Path(model.rknn_model) if model.rknn_model else None
        if path is None and folder is not None and target:
            path = folder / "visual" / "rknpu" / target / "model.rknn"
        if path is None:
            yield NOTE, f"{model.name}: {'not downloaded yet' if target else 'no target'}"
        elif not path.is_file():
            mark = FAILURE if model.rknn_model else setup.npu_severity()
            yield mark, f"{model.name}: {path} is missing; make it on a PC: export.py --rknn {target}"
        else:
            # The file says both of itself, in the JSON that it carries.
            toolkit = _search(path, rb'"version":"(\d+\.\d+\.\d+)"')
            made_for = _search(path, rb'"target_platform":\["(\w+)"')
            if made_for and target and made_for != target:
                yield setup.npu_severity(), f"{model.name}: {path} is for {made_for}, the board wants {target}"
            else:
                yield FINE, f"{model.name}: {path}, made by toolkit {toolkit or 'of unknown version'}"


def npu_nodes(setup: Setup) -> Iterator[Finding]:
    nodes = _nodes(setup.root)
    if not nodes:
        text = "no device node of the NPU in /dev/dri; in a container: --device /dev/dri (never link /dev/rknpu to one)"
        yield setup.npu_severity(), text
    for node in nodes:
        if os.access(node, os.R_OK | os.W_OK):
            yield FINE, f"{node} can be read and written"
            continue
        remedy = "it is not in /dev; in a container: --device /dev/dri"
        if node.exists():
            try:
                group = node.group()
            except KeyError:  # it has no name here
                group = str(node.stat().st_gid)
            remedy = f"add the daemon's user to the group {group}: usermod -aG {group} USER"
            remedy += f" (systemd: SupplementaryGroups={group})"
        yield setup.npu_severity(), f"{node} is not accessible; {remedy}"


def runtimes(setup: Setup) -> Iterator[Finding]:
    on_onnx = setup.models("onnxrt", "rknn")
    wanted = ["onnxruntime"] if on_onnx else []
    wanted += ["open_clip", "torch"] if setup.models("torch") else []
    for module in wanted:
        if importlib.util.find_spec(module) is None:
            file = "requirements.txt" if module != "onnxruntime" else "requirements-edge.txt"
            yield FAILURE, f"{module} is not installed; pip install -r {file}"
            continue
        run = setup.probe(module)
        if run.returncode < 0:
            cause = "the processor lacks a feature, see CPU"
            yield FAILURE, f"importing {module} ends with signal {-run.returncode}; {cause}"
        elif run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            yield FAILURE, f"{module} cannot be imported ({last[:200]}); install it again"
        else:
            version, *providers = run.stdout.splitlines()[0].split()
            yield FINE, f"{module} {version}" + (f": {', '.join(providers)}" if providers else "")
            for model in on_onnx if module == "onnxruntime" else []:
                try:
                    onnx_backend.wanted_providers(model, providers)
                except SettingError as error:
                    yield FAILURE, str(error)


def gpu(setup: Setup) -> Iterator[Finding]:
    names = machine.nvidia_gpus(setup.root / "proc" / "driver" / "nvidia" / "gpus")
    there, devices = names or "no NVIDIA GPU", setup.torch_report()
    for model in setup.models():
        setting = f"{model.name}_{'DEVICE' if model.backend == 'torch' else 'ORT_PROVIDERS'}"
        if model.backend == "torch":
            device = devices.get(model.name, {}).get("device", "")
        else:  # of the NPU's model the texts
            device = next(iter(model.ort_providers), "CPU").removesuffix("ExecutionProvider")
        kind, _, number = device.partition(":")
        place = "the CPU" if kind.lower() == "cpu" else device
        where = f"{model.name} {'runs' if model.backend != 'rknn' else 'has its texts'} on {place}"
        if not device:
            yield NOTE, f"{there}; where {model.name} runs is not known, see runtime and models"
        elif model.backend == "torch" and kind == "cuda" and int(number or 0) >= devices["gpus"]:
            remedy = "in a container: --gpus all; or set it to cpu"
            yield FAILURE, f"{setting}={device}: torch finds {devices['gpus']} GPUs; repair the driver; {remedy}"
        elif kind.lower() != "cpu":  # torch runs on it, so it exists, also if it is not from NVIDIA
            yield (FINE if names or model.backend == "torch" else WARNING), f"{there}; {where}"
        elif names and model.backend == "torch" and not model.device:
            yield WARNING, f"{there}: torch cannot use it; {where}. Install a torch whose CUDA the driver knows"
        else:
            yield NOTE, f"{there}{f': not used; {setting} chooses it' if names else ''}; {where}"


def processor(setup: Setup) -> Iterator[Finding]:
    lines = re.findall(r"^(?:flags|Features).*?:(.*)", _text(setup.root / "proc" / "cpuinfo"), re.MULTILINE)
    flags = " ".join(lines).split()
    machine = platform.machine()
    # What runs only slowly without, and what the wheels of x86-64 were seen to need.
    wanted = {"x86_64": ("avx", "avx2", "fma"), "aarch64": ("asimd", "asimddp", "fphp")}.get(machine, ())
    if not flags or not wanted:
        yield NOTE, f"{machine}, of unknown features"
        return
    missing = [flag for flag in wanted if flag not in flags]
    if not missing:
        yield FINE, f"{machine} with {', '.join(wanted)}"
    elif machine == "x86_64" and setup.models("torch") and "avx2" in missing:
        yield WARNING, f"{machine} without {', '.join(missing)}; torch may die of SIGILL: CLIP_BACKEND=onnxrt"
    else:
        yield WARNING, f"{machine} without {', '.join(missing)}; it works, only slower"


def cores(setup: Setup) -> Iterator[Finding]:
    there, usable = os.cpu_count() or 1, machine.usable_cores()
    text = f"{usable} of {there} usable, by affinity and quota"
    yield (FINE, text) if usable > 1 else (WARNING, f"{text}; pictures will be decoded and embedded in turn")


def memory(setup: Setup) -> Iterator[Finding]:
    groups = machine.control_groups(setup.root / "sys" / "fs" / "cgroup", setup.root / "proc" / "self" / "cgroup")
    have, total = machine.memory(groups, setup.root / "proc" / "meminfo")
    if not total:
        yield NOTE, "the system does not say how much is available"
        return
    need = MEMORY_FACTOR * sum(path.stat().st_size for model in setup.models() for path in setup.weights(model))
    text = f"{have / 1e9:.1f} GB available"
    if unknown := [model.name for model in setup.models() if setup.folder(model) is None]:
        text += f"; the memory for {' and '.join(unknown)} is known after the download"
    if need:
        text += f", the models need about {need / 1e9:.1f} GB"
    yield (WARNING, f"{text}; an int8 export needs less") if need > have else (FINE, text)


def cache(setup: Setup) -> Iterator[Finding]:
    data, missing = setup.settings.lumen_data_dir, setup.to_download()
    for model in setup.models():
        for refusal in (refusals := setup.refusals(model)):
            yield FAILURE, refusal
        if not refusals and (folder := setup.folder(model)):
            yield FINE, f"{model.name}: {folder}"
    for what in missing:
        yield NOTE, f"{what} will be downloaded"
    existing = next(path for path in (data, *data.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # the disk may be read-only for root as well; leaves nothing behind
            yield FINE, f"{data} can be written"
    except OSError:
        if missing:
            yield FAILURE, f"{data} cannot be written, and something is to be downloaded; set LUMEN_DATA_DIR"
        else:
            yield WARNING, f"{data} cannot be written; what is computed is computed again at each start"


def hub(setup: Setup) -> Iterator[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    missing = setup.to_download()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=3):
            yield FINE, f"{endpoint} answers"
    except urllib.error.HTTPError as error:
        yield FINE, f"{endpoint} answers ({error.code})"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if missing:
            text = f"{endpoint} does not answer ({reason}), and {', '.join(missing)} must be downloaded"
            yield FAILURE, f"{text}; copy a folder here and name it in CLIP_MODEL, or set HF_ENDPOINT"
        else:
            yield NOTE, f"{endpoint} does not answer ({reason}); nothing is to be downloaded"


def scenes(setup: Setup) -> Iterator[Finding]:
    count, own = len(read_scenes(setup.settings.lumen_scenes).choices.names), setup.settings.lumen_scenes
    yield (FINE, f"{own}: {count} scenes") if own else (NOTE, f"the built-in table of {count}")


def classes(setup: Setup) -> Iterator[Finding]:
    settings, own = setup.settings, setup.settings.clip.labels
    served = "clip" in settings.models()
    if served and own:
        yield FINE, f"{own}: {len(labels.class_names(settings.lumen_data_dir, own, quiet))} names"
    else:
        yield NOTE, "ImageNet-1k" if served else "none: CLIP is not served"


def species(setup: Setup) -> Iterator[Finding]:
    source, served = setup.settings.bioclip.labels, "bioclip" in setup.settings.models()
    if not served or source in ("", *SPECIES_SOURCES):
        yield NOTE, source or "chosen at the start" if served else "none: BioCLIP is not served"
        return
    try:
        if tree_of_life.is_folder(source):  # `tree_of_life.py verify` reads the checksums of a large one
            count = len(tree_of_life.open_folder(Path(source), quick=True).vecs)
        else:
            count = len(tree_of_life.lineages_of(tree_of_life.names_file(source, DATA_DIR), own=True))
        yield FINE, f"{source}: {count:,} species"
    except PermissionError as error:
        yield FAILURE, str(unreadable(error))


def tls(setup: Setup) -> Iterator[Finding]:
    used = security.tls_credentials(setup.settings)
    yield (FINE, f"{setup.settings.lumen_tls_cert} with its key") if used else (NOTE, "off")


def token(setup: Setup) -> Iterator[Finding]:
    used = security.read_token(setup.settings, setup.host)
    yield (FINE, "every call must carry it") if used else (NOTE, "none; every client that reaches the port is served")


def ports(setup: Setup) -> Iterator[Finding]:
    family = socket.AF_INET6 if ":" in setup.host else socket.AF_INET
    others = ((name.upper(), getattr(setup.settings, name)) for name in ("lumen_metrics_port", "lumen_immich_port"))
    for option, number in (("--port", setup.port), *(other for other in others if other[1])):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((setup.host, number))
            except OSError as error:
                text = f"{setup.host} port {number}: {error.strerror or error}"
                taken = f"stop what uses it, or set {option}"
                yield FAILURE, f"{text}; {taken if error.errno == errno.EADDRINUSE else 'set --host'}"
            else:
                yield FINE, f"{setup.host} port {number} is free"


def immich(setup: Setup) -> Iterator[Finding]:
    port, fallback = setup.settings.lumen_immich_port, setup.settings.lumen_immich_fallback
    security.check_immich_port(setup.settings, setup.host)
    if port and importlib.util.find_spec("aiohttp") is None:
        yield FAILURE, f"LUMEN_IMMICH_PORT={port}: aiohttp is missing; pip install -r requirements-immich.txt"
    elif not (port and fallback):
        yield (WARNING, "faces and text in pictures are refused; set LUMEN_IMMICH_FALLBACK") if port else (NOTE, "off")
    else:
        try:
            urllib.request.urlopen(f"{fallback}/ping", timeout=5).close()
            yield FINE, f"{fallback} answers"
        except (OSError, ValueError) as error:
            yield WARNING, f"{fallback} does not answer ({getattr(error, 'reason', error)}); is immich's service there?"


def discovery(setup: Setup) -> Iterator[Finding]:
    if not setup.settings.clip_mdns_type:
        yield NOTE, "off"
    elif address := setup.settings.advertise_ip or advertised_ip(setup.host):
        yield FINE, f"{setup.settings.clip_mdns_name} will be announced at {address}"
    else:
        yield WARNING, "no address that others could reach; set ADVERTISE_IP to be found"


CHECKS: tuple[tuple[str, Callable[[Setup], Iterator[Finding]]], ...] = (
    ("board", board),
    ("NPU driver", npu_driver),
    ("NPU library", npu_library),
    ("NPU programs", npu_programs),
    ("NPU nodes", npu_nodes),
    ("runtime", runtimes),
    ("GPU", gpu),
    ("CPU", processor),
    ("cores", cores),
    ("memory", memory),
    ("models", cache),
    ("hub", hub),
    ("scenes", scenes),
    ("labels", classes),
    ("species", species),
    ("TLS", tls),
    ("token", token),
    ("port", ports),
    ("immich", immich),
    ("mDNS", discovery),
)


def read_settings(environment: Mapping[str, str]) -> tuple[Settings, list[Line]]:
    """The settings, with the default for each that is not allowed, and what there is to say about them."""
    lines: list[Line] = []
    valid = dict(environment)
    with _warnings_in(lines, "settings"):
        while True:
            try:
                return Settings.from_environment(valid), lines
            except SettingError as error:
                lines.append(("settings", FAILURE, f"{error}; the other checks use the default"))
                if valid.pop(str(error).partition("=")[0], None) is None:  # the error names no variable that is set
                    valid = {}


def examine(setup: Setup) -> list[Line]:
    """Never raises: what cannot be checked says so."""
    lines: list[Line] = []
    for name, check in CHECKS:
        if name.startswith("NPU") and not setup.models("rknn"):
            continue
        with _warnings_in(lines, name):
            try:
                for mark, text in check(setup):
                    lines.append((name, mark, text))
            except DaemonError as error:  # the start ends with it
                lines.append((name, FAILURE, str(error)))
            except Exception as error:  # one failed check must not prevent the others; the line says what happened
                lines.append((name, WARNING, f"could not be checked ({type(error).__name__}: {error})"))
    return lines


@contextmanager
def _warnings_in(lines: list[Line], name: str) -> Iterator[None]:
    """Adds what our loggers warn of to the lines, and keeps it out of the log."""
    ours, listener = logging.getLogger("lumen"), logging.handlers.BufferingHandler(sys.maxsize)
    level, ours.propagate = ours.level, False
    ours.addHandler(listener)
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        lines += [(name, WARNING, record.getMessage()) for record in listener.buffer]
        ours.removeHandler(listener)
        ours.setLevel(level)
        ours.propagate = True


def run(environment: Mapping[str, str], host: str, port: int) -> int:
    """Checks everything and prints the findings; -> the exit status of `report`."""
    settings, findings = read_settings(environment)
    return report(findings + examine(Setup(settings, host, port)))


def report(findings: list[Line]) -> int:
    """Prints them; -> the exit status: 1 if something keeps the daemon from running as it is configured."""
    for name, mark, text in findings:
        line = f"{mark:<4} {name:<13} {' '.join(text.split())}"
        print(line.encode(sys.stdout.encoding or "ascii", "backslashreplace").decode(sys.stdout.encoding or "ascii"))
    return int(any(mark == FAILURE for _, mark, _ in findings))


# --- what the checks read ---------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    """A file's text, or "" if there is none to be read."""
    try:
        return path.read_bytes()[: 1 << 20].decode("utf-8", "replace")
    except OSError:
        return ""


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _search(path: Path, pattern: bytes) -> str:
    """The first group of the first match in a large file, or ""."""
    if not path.stat().st_size:
        return ""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = re.search(pattern, content)
        return match[1].decode("ascii", "replace") if match else ""


def _nodes(root: Path) -> list[Path]:
    """The NPU's device nodes: those of DRM by their driver's name, for their numbers vary, or the older one."""
    nodes = []
    for entry in sorted((root / "sys" / "class" / "drm").glob("*")):
        if "DRIVER=RKNPU" in _text(entry / "device" / "uevent").upper():
            nodes.append(root / "dev" / "dri" / entry.name)
    older = root / "dev" / "rknpu"
    return nodes or ([older] if older.exists() else [])
