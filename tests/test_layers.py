"""The shape of the program: each file stands on those above it."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT

LINES_MAX = 600  # of a file
FUNCTION_LINES_MAX = 60
OWN = sorted(path.stem for path in ROOT.glob("*.py") if not path.name.startswith("test_"))
DAEMON_ENDS_WITH = "lumen_clip"  # what stands below it are tools, which a device can do without


def layers() -> list[str]:
    """The files at the top, in the order of the README's table."""
    table = re.search(r"^\| file \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert table
    return [name for row in table[0].split("\n") if row for name in re.findall(r"`(\w+)\.py`", row.split("|")[1])]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import statement, also of those in functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            found.append((node.lineno, str(node.module).partition(".")[0]))
    return found


def test_the_table_has_every_file_once() -> None:
    """Lost otherwise: a file that the reader does not know of, or one that the order says nothing about."""
    assert sorted(name for name in layers() if not name.startswith("test_")) == OWN


@pytest.mark.parametrize("name", OWN)
def test_a_file_imports_only_files_above_it(name: str) -> None:
    """Lost otherwise: circles, and a reader who must know all files to understand one."""
    order = layers()
    above = order[: order.index(name)]
    for line, module in imports_of(ROOT / f"{name}.py"):
        assert module not in OWN or module in above, f"{name}.py:{line} imports {module}.py, which stands below it"


@pytest.mark.parametrize("name", OWN)
def test_files_and_functions_are_short(name: str) -> None:
    """Lost otherwise: an evening, which should be enough for all of it."""
    text = (ROOT / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LINES_MAX, f"{name}.py has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{name}.py:{node.lineno} {node.name} has {lines} lines"


def test_exceptions_that_cross_a_file_are_in_one_place() -> None:
    """Lost otherwise: a reader who has to search for what may be raised, and one base class to catch it by."""
    order = layers()
    plain = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    for name in order[: order.index(DAEMON_ENDS_WITH) + 1]:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & plain:
                allowed = node.name.startswith("_") or (name, node.name) == ("errors", "DaemonError")
                assert allowed, f"{name}.py:{node.lineno} {node.name} belongs into errors.py"


def test_what_makes_jobs_of_requests_knows_no_grpc() -> None:
    """Lost otherwise: a second server, such as an HTTP one, that has to bring gRPC along."""
    script = "import intake, sys; print(*{name.partition('.')[0] for name in sys.modules} & {'grpc', 'google', 'gen'})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")
