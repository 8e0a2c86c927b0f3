"""The contact sheet of `search.py --html`, in a real browser."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import contact_sheet
from client_files import readable
from tests import browser
from tests.kit import DEMO, ROOT, Node, picture, run_client

pytestmark = pytest.mark.browser

HOSTILE = [
    "\"quotes\" and 'quotes'.png",
    "<script>document.title = 'harmed'<!--.png",
    "<img src=x onerror=document.title='harmed'>.png",
    "&lt;b&gt; & {query} %41 #frag?.png",
    "</figcaption></main><style>body{display:none}<!--.png",
    "\U0001f98a emoji \u202egnp.png",
    "new\nline and \x07bell.png",
    os.fsdecode(b"caf\xe9 \xff.png"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if not browser.WHERE:
        pytest.skip("needs Chromium: apt install chromium")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contact sheet of a search in the pictures of the demo."""
    folder = tmp_path_factory.mktemp("sheet")
    node = Node(folder / "data", ("--demo",)).ready()
    arguments = [str(DEMO / "pictures"), "a bird", "--html", str(folder / "page.html")]
    run = run_client(*arguments, address=node.address, program="search.py", XDG_CACHE_HOME=str(folder))
    assert run.returncode == 0, run.stderr
    (folder / "page.txt").write_text(run.stdout)
    assert node.stop() == 0, node.log
    return folder / "page.html"


NAMES = "[...document.querySelectorAll('bdi')].map(e => e.textContent)"
LOADED = "[...document.images].map(e => e.complete && e.naturalWidth > 0)"


def test_the_sheet_shows_the_photographs_in_order_and_loads_nothing_else(
    chromium: browser.Browser, sheet: Path
) -> None:
    """Lost otherwise: a page that shows something else than the search has found, or that tells somebody else of it."""
    chromium.open(sheet.as_uri(), 1200)
    lines = [line.split(maxsplit=1) for line in sheet.with_suffix(".txt").read_text().splitlines()]
    assert chromium.evaluate(NAMES) == [name for _, name in lines] and len(lines) == 7
    assert chromium.evaluate("[...document.querySelectorAll('b')].map(e => e.textContent)") == [s for s, _ in lines]
    assert chromium.evaluate(LOADED) == [True] * 7
    assert chromium.evaluate("[document.title, document.querySelector('h1').textContent]") == ["a bird"] * 2
    assert {url.partition(":")[0] for url in chromium.requests} == {"file", "data"}
    assert [url for url in chromium.requests if url.startswith("file")] == [sheet.as_uri()]
    assert chromium.logged == []  # no message of the policy, or of a damaged document
    links = chromium.evaluate("[...document.links].map(e => e.href)")
    assert links == [(ROOT / name).as_uri() for _, name in lines]


def test_hostile_names_are_shown_and_harmless(chromium: browser.Browser, tmp_path: Path) -> None:
    """Lost otherwise: a page that a photograph from somebody else takes over, or a photograph that is not in it."""
    found = []
    for number, name in enumerate(HOSTILE):
        path = os.path.join(tmp_path, name.replace("/", "\u2044"))  # noqa: PTH118 - a name that is not UTF-8
        picture((30 * number, 90, 90), (64, 48), number).save(path)
        found.append((readable(name), path, 1 - number / 10))
    query = "<script>document.title = 'harmed'</script> \"&amp;' {query}"
    contact_sheet.write(tmp_path / "page.html", query, found)
    chromium.open((tmp_path / "page.html").as_uri(), 1200)
    assert chromium.evaluate(NAMES) == [name for name, _, _ in found]
    assert chromium.evaluate(LOADED) == [True] * len(HOSTILE)
    assert chromium.evaluate("[document.title, document.querySelector('h1').textContent]") == [query] * 2
    foreign = "script, body > :not(h1, main), main > :not(figure)"
    assert chromium.evaluate(f"document.querySelectorAll('{foreign}').length") == 0
    assert chromium.evaluate("document.querySelectorAll('style').length") == 1
    assert all(url.startswith(("file:", "data:")) for url in chromium.requests) and chromium.logged == []
    for number in range(len(HOSTILE)):  # each link leads to its photograph
        href = chromium.evaluate(f"document.links[{number}].href")
        chromium.open(href, 1200)
        assert chromium.evaluate("document.images[0].naturalWidth") == 64, href
        chromium.open((tmp_path / "page.html").as_uri(), 1200)


def brightness(png: bytes) -> float:
    """Of the page's background and text, without the thumbnails, which have white grounds: its left margin."""
    with Image.open(io.BytesIO(png)) as image:
        return float(np.asarray(image.convert("L"))[:, :8].mean())


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_sheet_follows_the_colours_that_the_user_prefers(
    chromium: browser.Browser, sheet: Path, scheme: str, dark: bool
) -> None:
    """Lost otherwise: a page that dazzles at night, or text that cannot be read on its ground."""
    chromium.open(sheet.as_uri(), 1200, scheme=scheme)
    assert (brightness(chromium.screenshot()) < 64) == dark
    for element in ("h1", "b", "a"):
        colours = f"document.querySelector('{element}')"
        text = chromium.evaluate(f"getComputedStyle({colours}).color")
        red = int(re.findall(r"\d+", text)[0])
        assert (red > 180) == dark and (red < 70) != dark, (element, text)


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_sheet_fits_the_screen(chromium: browser.Browser, sheet: Path, width: int) -> None:
    """Lost otherwise: the page on a phone, which has to be moved sideways or shows one picture at a time."""
    chromium.open(sheet.as_uri(), width)
    assert chromium.evaluate("document.documentElement.scrollWidth") == width
    boxes = chromium.evaluate("[...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().toJSON())")
    columns = sum(box["top"] == boxes[0]["top"] for box in boxes)
    assert columns == 2 if width < 600 else 4 <= columns <= 7
    assert all(box["left"] >= 0 and box["right"] <= width for box in boxes)
    sides = chromium.evaluate("[...document.images].map(e => [e.clientWidth, e.clientHeight])")
    assert all(130 <= w <= 330 and abs(w - h) <= 1 for w, h in sides)


def test_photographs_are_upright_and_small(chromium: browser.Browser, tmp_path: Path) -> None:
    """Lost otherwise: portraits that lie on their side, and a page of hundreds of megabytes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture((200, 30, 30), (4000, 3000)).save(tmp_path / "portrait.jpg", exif=exif)
    Image.new("LA", (500, 100), (0, 0)).save(tmp_path / "transparent.png")
    (tmp_path / "damaged.jpg").write_bytes(b"not a picture")
    names = ("portrait.jpg", "transparent.png", "damaged.jpg")
    found = [(name, str(tmp_path / name), 0.5) for name in names]
    contact_sheet.write(tmp_path / "page.html", "a portrait", found)
    chromium.open((tmp_path / "page.html").as_uri(), 1200)
    sizes = chromium.evaluate("[...document.images].map(e => [e.naturalWidth, e.naturalHeight])")
    assert sizes == [[240, 320], [320, 64]]
    assert chromium.evaluate("document.querySelectorAll('figure').length") == 3
    assert "no thumbnail: " in chromium.evaluate("document.querySelectorAll('figure')[2].textContent")
    assert (tmp_path / "page.html").stat().st_size < 60_000
    assert [path.name for path in tmp_path.glob("*partial*")] == []


def test_the_picture_in_the_readme_is_the_sheet(chromium: browser.Browser, sheet: Path) -> None:
    """Lost otherwise: a picture of a page that the program does not make, or a repository that grows with it."""
    path = ROOT / "docs" / "contact-sheet.png"
    assert path.stat().st_size < 60_000 and "](docs/contact-sheet.png)" in (ROOT / "README.md").read_text()
    with Image.open(path) as image:
        chromium.open(sheet.as_uri(), *image.size)
        drawn = Image.open(io.BytesIO(chromium.screenshot()))
        # Letters may look different on another machine, so both are compared at a tenth of their size.
        shown, now = (np.asarray(each.convert("RGB").reduce(10), np.float32) for each in (image, drawn))
    assert np.abs(shown - now).mean() < 8
