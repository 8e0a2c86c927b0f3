"""The contact sheet of `search.py --html`: one HTML file with the query, thumbnails and scores. It loads nothing else.

Needs Pillow, and pillow-heif for thumbnails of HEIC files.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from client_files import create_partial, reason_of

THUMBNAIL_SIDE = 320  # pixels: twice the least width of a column, for screens with two pixels to a CSS pixel
JPEG_QUALITY = 80

# The policy allows the pictures and the style in the file, and no script: a second line of defence behind escaping.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{query}</title>
<style>
:root {{ color-scheme: light dark; --text: #222; --page: #fff; --tile: #f0f0f0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #ddd; --page: #111; --tile: #222; }} }}
body {{ margin: 1rem; font: 0.875rem/1.4 system-ui, sans-serif; color: var(--text); background: var(--page); }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere; }}
main {{ display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fill, minmax(min(10rem, 45%), 1fr)); }}
figure {{ margin: 0; overflow: hidden; border-radius: 0.5rem; background: var(--tile); }}
figure > * {{ display: block; padding: 0.5rem; overflow-wrap: anywhere; }}
img {{ width: 100%; height: auto; aspect-ratio: 1; padding: 0; object-fit: contain; }}
a {{ color: inherit; }}
</style>
</head>
<body>
<h1>{query}</h1>
<main>
"""
FIGURE = (
    '<figure>{picture}<figcaption><b>{score:.3f}</b> <a href="{link}"><bdi>{name}</bdi></a></figcaption></figure>\n'
)
PICTURE = '<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="">'


def write(out: Path, query: str, found: Sequence[tuple[str, str, float]]) -> None:
    """Writes the page: (name to show, path, score) of each photograph, in this order. Raises OSError.

    The file is complete or is not there: it is renamed when it has been written.
    """
    partial, file = create_partial(out)
    try:
        with io.BufferedWriter(file) as buffered:
            buffered.write(HEAD.format(query=html.escape(query)).encode())
            for name, path, score in found:
                link = html.escape(Path(path).absolute().as_uri())
                shown = html.escape(name).replace("/", "/<wbr>")  # where a long path may be broken
                figure = FIGURE.format(picture=thumbnail(path), score=score, link=link, name=shown)
                buffered.write(figure.encode())
            buffered.write(b"</main>\n</body>\n</html>\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def thumbnail(path: str) -> str:
    """The `img` element of a photograph, or a text with the reason if it cannot be read any more."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # Pillow raises many kinds; the other photographs are shown
        return f"<span>no thumbnail: {html.escape(reason_of(error))}</span>"
    white = Image.new("RGBA", upright.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(white, upright).convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return PICTURE.format(data=data, width=upright.width, height=upright.height)
