"""What the documents say of settings and tasks, and lint and types."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import errors
import labels
import tasks
from settings import Settings
from tests.kit import ROOT, Node


def test_the_documented_table_of_settings_is_the_programs() -> None:
    """Lost otherwise: a setting that nobody can find, or one that does nothing."""
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    table = {name: default.strip("`") for name, default, _ in rows}
    shown = {"tuple": lambda v: ",".join(v), "bool": lambda v: str(int(v))}
    defaults = Settings.from_environment({})
    expected = {}
    for prefix, options in (("", defaults), ("CLIP_", defaults.clip), ("BIOCLIP_", defaults.bioclip)):
        for setting in dataclasses.fields(options):
            if "parse" in setting.metadata:
                default = getattr(options, setting.name)
                text = shown.get(type(default).__name__, str)(default)
                expected[(prefix + setting.name).upper()] = text
    expected |= {
        "LUMEN_DATA_DIR": "data",
        "CLIP_MAX_BATCH_SIZE": "BATCH_SIZE",
        "BIOCLIP_MAX_BATCH_SIZE": "BATCH_SIZE",
        "BIOCLIP_BACKEND": "CLIP_BACKEND",
    }
    assert table == expected


def test_a_former_setting_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: an operator who does not learn that a line of the environment file does nothing any more."""
    Settings.from_environment({"CLIP_MDNS_STATUS": "busy", "CLIP_MDNS_VERSION": ""})
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("CLIP_MDNS_STATUS is no longer a setting and has no effect: ")


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("CLIP_BACKNED", "CLIP_BACKEND"),
        ("BIOCLIP_LABLES", "BIOCLIP_LABELS"),
        ("BIOCLIP_TEMPLATES", "CLIP_TEMPLATES"),
        ("CLIP_BATCH_SIZE", "CLIP_MAX_BATCH_SIZE"),
        ("LUMEN_MAX_MPIXELS", "LUMEN_MAX_MEGAPIXELS"),
        ("LUMEN_CLIP_MODEL", "CLIP_MODEL"),
        ("LUMEN_TOKEN", "LUMEN_TOKEN_FILE"),
        ("LUMEN_TOKN", "LUMEN_TOKEN_FILE"),
        ("LUMEN_PORT", ""),
        ("LUMEN_LOG_LEVEL", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_warned_of(name: str, similar: str, caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: an operator whose misspelt setting never had an effect. A value may be a secret."""
    Settings.from_environment({name: "s3cret", "BATCHSIZE": "2", f"{name}X": "", f"{name}Y": " "})
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == f"{name} is not a setting" + f"; did you mean {similar}?" * bool(similar)


def test_variables_that_other_programs_read_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: warnings that are always there, and hide the one that matters."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("*.service"), ROOT / "compose.yaml"]
    text = "\n".join(path.read_text() for path in files if path.name != Path(__file__).name)
    read = set(re.findall(r"environ(?:\.get\(|\[|\.setdefault\()\"((?:BIO)?CLIP_\w+|LUMEN_\w+)\"", text))
    read |= set(re.findall(r"\$\{?((?:BIO)?CLIP_\w+|LUMEN_\w+)", text))
    assert {"LUMEN_OPTIONS", "LUMEN_ADDRESS", "LUMEN_MDNS_INTERFACE", "LUMEN_TOKEN_FILE", "LUMEN_SEED"} <= read
    kubernetes = {
        "LUMEN_CLIP_SERVICE_HOST": "10.0.0.7",
        "LUMEN_CLIP_SERVICE_PORT_GRPC": "50051",
        "LUMEN_CLIP_PORT": "tcp://10.0.0.7:50051",
        "LUMEN_CLIP_PORT_50051_TCP": "tcp://10.0.0.7:50051",
        "LUMEN_CLIP_PORT_50051_TCP_ADDR": "10.0.0.7",
        "CLIP_SERVICE_PORT": "50051",
    }
    Settings.from_environment({**dict.fromkeys(read, "/x"), **kubernetes})
    assert [record.getMessage() for record in caplog.records] == []


def test_a_misspelt_setting_explains_the_error_that_it_causes(tmp_path: Path) -> None:
    """Lost otherwise: a start that fails for a setting which is there, so it seems."""
    node = Node(tmp_path, CLIP_BACKEND="none", BIOCLIP_BACKNED="onnxrt")
    assert node.ended() == 2
    node.stop()
    warning, error = node.log.splitlines()
    assert warning.endswith("WARNING lumen.settings: BIOCLIP_BACKNED is not a setting; did you mean BIOCLIP_BACKEND?")
    assert error.startswith("lumen-clip: CLIP_BACKEND=none: there is nothing to serve")


IDLE: list[tuple[dict[str, str], str]] = [
    ({"CLIP_BACKEND": "onnxrt", "CLIP_DEVICE": "cuda"}, "CLIP_DEVICE=cuda has no effect with CLIP_BACKEND=onnxrt"),
    ({"CLIP_BACKEND": "rknn", "BIOCLIP_DEVICE": "cpu"}, "BIOCLIP_DEVICE=cpu has no effect with BIOCLIP_BACKEND=rknn"),
    ({"CLIP_BACKEND": "rknn", "CLIP_PRECISION": "fp16"}, "CLIP_PRECISION=fp16 has no effect with CLIP_BACKEND=rknn"),
    ({"CLIP_ONNX_IMAGE": "/x"}, "CLIP_ONNX_IMAGE=/x has no effect with CLIP_BACKEND=torch"),
    ({"BIOCLIP_ONNX_TEXT": "/x"}, "BIOCLIP_ONNX_TEXT=/x has no effect with BIOCLIP_BACKEND=torch"),
    ({"CLIP_ORT_PROVIDERS": "X"}, "CLIP_ORT_PROVIDERS=X has no effect with CLIP_BACKEND=torch"),
    ({"CLIP_RKNN_MODEL": "/x"}, "CLIP_RKNN_MODEL=/x has no effect with CLIP_BACKEND=torch"),
    (
        {"CLIP_BACKEND": "onnxrt", "CLIP_RKNN_TARGET": "rk3588"},
        "CLIP_RKNN_TARGET=rk3588 has no effect with CLIP_BACKEND=onnxrt",
    ),
    ({"CLIP_RKNN_CORES": "0"}, "CLIP_RKNN_CORES=0 has no effect with CLIP_BACKEND=torch"),
    *(
        (
            {"BIOCLIP_BACKEND": "none", f"BIOCLIP_{name}": value},
            f"BIOCLIP_{name}={value} has no effect with BIOCLIP_BACKEND=none",
        )
        for name, value in (("MODEL", "x:y"), ("LABELS", "/x"), ("MAX_BATCH_SIZE", "4"), ("PRECISION", "fp16"))
    ),
    (
        {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "torch", "CLIP_TEMPLATES": "80"},
        "CLIP_TEMPLATES=80 has no effect with CLIP_BACKEND=none",
    ),
    ({"BIOCLIP_BACKEND": "none", "LUMEN_SCENES": "/x"}, "LUMEN_SCENES=/x has no effect with BIOCLIP_BACKEND=none"),
    (
        {"CLIP_BACKEND": "none", "BIOCLIP_BACKEND": "onnxrt", "LUMEN_SCENES": "/x"},
        "LUMEN_SCENES=/x has no effect with CLIP_BACKEND=none",
    ),
    (
        {"LUMEN_IMMICH_FALLBACK": "http://nas:3003"},
        "LUMEN_IMMICH_FALLBACK=http://nas:3003 has no effect with LUMEN_IMMICH_PORT=0",
    ),
    *(
        ({"CLIP_MDNS_TYPE": "off", name: value}, f"{name}={value} has no effect with CLIP_MDNS_TYPE=off")
        for name, value in (("CLIP_MDNS_NAME", "x"), ("CLIP_MDNS_UUID", "x"), ("ADVERTISE_IP", "192.0.2.7"))
    ),
]


@pytest.mark.parametrize(("environment", "said"), IDLE, ids=[said.partition(" ")[0] for _, said in IDLE])
def test_a_setting_without_effect_is_warned_of(
    environment: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost otherwise: an operator who believes that the GPU is used, or that photographs go to BioCLIP."""
    Settings.from_environment(environment)
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize("backend", ["torch", "onnxrt", "rknn"])
def test_settings_with_an_effect_are_not_warned_of(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: warnings that are always there, and hide the one that matters."""
    used = {"torch": ("DEVICE",), "onnxrt": ("ONNX_IMAGE", "ORT_PROVIDERS"), "rknn": ("ONNX_TEXT", "RKNN_MODEL")}
    environment = {"CLIP_BACKEND": backend, "CLIP_MODEL": "x:y", "BIOCLIP_LABELS": "/x", "LUMEN_SCENES": "/x"}
    for model in ("CLIP", "BIOCLIP"):
        environment |= {f"{model}_{name}": "/x" for name in used[backend]} | {f"{model}_MAX_BATCH_SIZE": "4"}
    Settings.from_environment({**environment, "ADVERTISE_IP": "192.0.2.7", "CLIP_RKNN_CORES": " "})
    assert [record.getMessage() for record in caplog.records] == []


def test_the_numbers_of_templates_are_those_that_labels_has() -> None:
    """Lost otherwise: a start that fails where the settings said that all is well."""
    with pytest.raises(errors.SettingError, match=f"allowed: {', '.join(map(str, labels.TEMPLATES))}$"):
        Settings.from_environment({"CLIP_TEMPLATES": "0"})


@pytest.mark.parametrize("document", ["README.md", "docs/protocol.md"])
def test_every_task_is_in_the_documents(document: str) -> None:
    """Lost otherwise: a task that nobody knows of."""
    [table] = re.findall(r"^\| task \|.*?\n\n", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.split("\n") if row))) == set(
        tasks.TASKS
    )


@pytest.mark.parametrize("program", ["lumen_clip.py", "client.py"])
def test_a_python_without_the_requirements_is_one_line(program: str) -> None:
    """Lost otherwise: an evening, when somebody runs `python` instead of `.venv/bin/python`."""
    run = subprocess.run([sys.executable, "-S", str(ROOT / program)], capture_output=True, text=True)
    name = program.removesuffix(".py").replace("_", "-") if program == "lumen_clip.py" else program
    text = f"{name}: grpcio is not installed for {sys.executable}; run .venv/bin/python\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", text)


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy", *sorted(p.name for p in ROOT.glob("*.py")), "gen/demo/train.py", "tests"),
    ],
)
def test_lint_and_types(command: tuple[str, ...]) -> None:
    """Lost otherwise: the reader's trust."""
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
