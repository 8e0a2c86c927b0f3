"""The documents: links, file names, options, settings and groups of tests that they name exist."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from settings import RETIRED, Settings
from tests.kit import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, *PAGES]
README_LINES_MAX = 200

# Variables in the documents that are no settings of the daemon, and what reads each.
OTHER_VARIABLES = {
    "LUMEN_ADDRESS": "client.py and search.py",
    "LUMEN_MDNS_INTERFACE": "client.py",
    "LUMEN_OPTIONS": "lumen-clip.service and compose.yaml",
    "LUMEN_ARM64_ROOT": "the group arm64 of the tests",
    "LUMEN_BOOT_ROOT": "the group boot of the tests",
    "LUMEN_DOCKER_ROOT": "the group docker of the tests",
    "LUMEN_RKNN_VENV": "the group rknn of the tests",
    "LUMEN_SOAK_MINUTES": "the group soak of the tests",
    "LUMEN_FUZZ": "tests with fuzz in their names",
    "LUMEN_MUTANTS": "tests of damaged pictures",
    "LUMEN_SEED": "tests of damaged pictures",
    "LUMEN_PHOTOS": "the comparison of JPEG decoding in the group measure",
}
PROGRAMS = ("client", "search", "lumen_clip", "bench", "export", "tree_of_life", "ray_embed")
SUBCOMMANDS = {"tree_of_life": ("build", "info", "verify")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def prose_of(path: Path) -> str:
    """The text of a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def code_lines_of(path: Path) -> list[str]:
    """The lines of all code blocks of a document."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def code_spans_of(path: Path) -> list[str]:
    """What stands in backticks in the text of a document."""
    return re.findall(r"`([^`]+)`", prose_of(path))


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return set(words)


def links_of(path: Path) -> list[tuple[str, str]]:
    """(file, anchor) of each link to a place in this repository; either may be empty."""
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose_of(path))
    local = (target.partition("#") for target in targets if "://" not in target)
    return [(file, anchor) for file, _, anchor in local]


# --- links --------------------------------------------------------------------------------------------------------


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    """A reader who follows a link arrives at the file and the heading that it names."""
    for file, anchor in links_of(path):
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), f"{file} does not exist"
        assert not anchor or anchor in anchors_of(target), f"{file}#{anchor}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    """A reader who begins with the README finds every page."""
    linked = {(ROOT / file).resolve() for file, _ in links_of(README) if file}
    assert set(PAGES) <= linked, sorted(map(name_of, set(PAGES) - linked))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_contents_of_a_page_list_its_sections(path: Path) -> None:
    """A reader who looks for a section sees it at the top of the page."""
    sections = re.findall(r"^## (.*)$", prose_of(path), re.MULTILINE)
    contents = prose_of(path).partition("\n## ")[0]
    listed = re.findall(r"^- \[([^\]]+)\]\(#", contents, re.MULTILINE)
    assert listed == sections


def test_the_readme_is_short() -> None:
    """A newcomer can read the README in one go."""
    assert len(text_of(README).splitlines()) <= README_LINES_MAX


# --- files --------------------------------------------------------------------------------------------------------

FILE = re.compile(
    r"(?<![\w/.*<~-])"  # not a part of another path
    r"((?:docs|gen|tests|deploy|\.ci)/[\w./*-]*|[\w.*-]+\.(?:py|md|proto|service|toml|yaml)|requirements[\w*-]*\.txt|Dockerfile)"
    r"(?![\w/*-]|\.\w)"
)


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("`a.py` and tests/kit.py, requirements-edge.txt.", ["a.py", "tests/kit.py", "requirements-edge.txt"]),
        ("/etc/systemd/system/lumen-clip.service, ~/x.py, open_clip/a.py", []),
        ("cp lumen-clip.service /etc && cp *.py gen /opt", ["lumen-clip.service", "*.py"]),
    ],
)
def test_names_of_files_are_recognized(text: str, files: list[str]) -> None:
    """The next test looks at the right words."""
    assert [name.rstrip(".") for name in FILE.findall(text)] == files


@each_document
def test_every_file_of_this_repository_that_is_named_exists(path: Path) -> None:
    """A reader who looks for a file finds it under the name that the document gives it."""
    named = {name for text in (*code_spans_of(path), *code_lines_of(path)) for name in FILE.findall(text)}
    assert not {name for name in named if "NAME" not in name and not any(ROOT.glob(name.rstrip("/.")))}


# --- commands -----------------------------------------------------------------------------------------------------


@functools.cache
def options_of(program: str) -> frozenset[str]:
    """The options of a program, with those of its subcommands."""
    found: set[str] = set()
    for subcommand in ("", *SUBCOMMANDS.get(program, ())):
        command = [sys.executable, str(ROOT / f"{program}.py"), *filter(None, [subcommand]), "--help"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", run.stdout))
    return frozenset(found)


def commands_of(path: Path) -> Iterator[tuple[str, str]]:
    """(program, arguments) of each call of one of our programs, in code blocks and in the text."""
    call = re.compile(rf"\b({'|'.join(PROGRAMS)})\.py\b([^|;#]*)")
    for text in (*code_lines_of(path), *code_spans_of(path)):
        for command in re.split(r"&&|\|", text):
            if found := call.search(command):
                yield found[1], found[2]


@each_document
def test_every_option_of_a_command_exists(path: Path) -> None:
    """A reader can type the commands of the documents."""
    for program, arguments in commands_of(path):
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments)
        unknown = set(options) - options_of(program)
        assert not unknown, f"{program}.py{arguments}"


def test_the_options_of_the_bench_are_those_that_are_documented() -> None:
    """The table of options in the page on performance names no option that bench.py does not have."""
    page = text_of(ROOT / "docs" / "performance.md")
    [table] = re.findall(r"^\| option of `bench\.py` \|.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[a-z][\w-]*", table)) <= options_of("bench")


@each_document
def test_every_group_of_tests_exists(path: Path) -> None:
    """A reader who selects tests by a marker runs some."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in config["markers"]}
    for text in (*code_lines_of(path), *code_spans_of(path)):
        if "-m pytest" in text:
            words = shlex.split(text.partition("-m pytest")[2])
            used = {words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m"}
            assert used <= markers, text


# --- settings -----------------------------------------------------------------------------------------------------


def variables() -> set[str]:
    """The variables of all settings of the daemon, the former ones included."""
    defaults = Settings.from_environment({})
    names = set(RETIRED)
    for prefix, options in (("", defaults), ("CLIP_", defaults.clip), ("BIOCLIP_", defaults.bioclip)):
        names |= {(prefix + each.name).upper() for each in dataclasses.fields(options) if "parse" in each.metadata}
    return names


@each_document
def test_every_variable_that_is_named_exists(path: Path) -> None:
    """A reader who sets a variable of the documents changes something."""
    pattern = r"(?<![\w-])(?:CLIP|BIOCLIP|LUMEN)_[A-Z0-9][A-Z0-9_]*|\b(?:BATCH_SIZE|ADVERTISE_IP)\b"
    assert set(re.findall(pattern, text_of(path))) <= variables() | OTHER_VARIABLES.keys()
