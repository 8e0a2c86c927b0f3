"""What the documents say of settings and tasks, and lint and types."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

import errors
import labels
import tasks
from settings import Settings
from tests.kit import ROOT


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
