"""Builds picture files part by part: honest ones with much metadata, and ones whose structure is an attack."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

from PIL import Image

from tests.kit import RED, encoded, picture

SIZE = (96, 72)


# --- JPEG ---------------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes = b"") -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*segments: bytes, base: bytes = b"") -> bytes:
    """A JPEG with these segments after its start."""
    base = base or encoded(picture(RED, SIZE))
    return base[:2] + b"".join(segments) + base[2:]


def split_over_segments(marker: int, header: bytes, body: bytes, numbered: bool = False) -> list[bytes]:
    """A long block in segments of 64 KiB; `numbered`: as ICC profiles are, with number and count."""
    parts = [body[i : i + 65_000] for i in range(0, len(body), 65_000)]
    counts = [bytes([i + 1, len(parts)]) if numbered else b"" for i in range(len(parts))]
    return [segment(marker, header + count + part) for count, part in zip(counts, parts, strict=True)]


def scan(components: Iterable[int], first: int, last: int, high: int = 0, low: int = 0, body: bytes = b"") -> bytes:
    selected = b"".join(bytes([component, 0]) for component in components)
    return segment(0xDA, bytes([len(selected) // 2]) + selected + bytes([first, last, high << 4 | low])) + body


def flat_progressive(size: tuple[int, int] = (8000, 5000)) -> bytes:
    """A progressive JPEG of 40 megapixels in 0.5 MB, without its end."""
    grey = Image.new("RGB", size, (120, 130, 140))
    return encoded(grey, progressive=True, subsampling=0)[:-2]


def many_scans(count: int, size: tuple[int, int] = (8000, 5000)) -> bytes:
    """A JPEG with `count` more scans, each of which costs libjpeg most for its bytes: one symbol ends 16,384 blocks."""
    table = segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    return flat_progressive(size) + table + scan([1], 1, 63, 1, 0, bytes(100)) * count + b"\xff\xd9"


def exif(entries: int, size: int = 4) -> bytes:
    """An EXIF block of so many entries, each of which claims `size` bytes."""
    rows = b"".join(struct.pack("<HHLL", i & 0xFFFF, 7, size, 8) for i in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", min(entries, 65_535)) + rows + bytes(4)


# --- PNG ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, base: bytes = b"") -> bytes:
    """A PNG with these chunks after its IHDR."""
    base = base or encoded(picture(RED, SIZE), "PNG")
    return base[:33] + b"".join(chunks) + base[33:]


def png_of_small_parts(size: tuple[int, int], part: int) -> bytes:
    """A grey PNG whose picture data is in IDAT chunks of `part` bytes."""
    body = zlib.compress(bytes((size[0] + 1) * size[1]), 0)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    parts = [chunk(b"IDAT", body[i : i + part]) for i in range(0, len(body), part)]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + chunk(b"IEND")


# --- WebP ---------------------------------------------------------------------------------------------------------


def riff(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def webp(*chunks: bytes, flags: int = 0, size: tuple[int, int] = SIZE, picture_first: bool = True) -> bytes:
    """A WebP of the extended form with these chunks behind its picture (or in its place)."""
    width, height = ((side - 1).to_bytes(3, "little") for side in size)
    base = encoded(picture(RED, SIZE), "WEBP")[12:] if picture_first else b""
    return riff(b"RIFF", b"WEBP" + riff(b"VP8X", bytes([flags, 0, 0, 0]) + width + height) + base + b"".join(chunks))


def webp_frames(count: int) -> bytes:
    """An animated WebP of small equal frames."""
    sides = b"".join((side - 1).to_bytes(3, "little") for side in SIZE)
    frame = riff(b"ANMF", bytes(6) + sides + b"\x40\0\0\0" + encoded(picture(RED, SIZE), "WEBP")[12:])
    return webp(riff(b"ANIM", bytes(6)), *[frame] * count, flags=2, picture_first=False)


# --- AVIF ---------------------------------------------------------------------------------------------------------


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def full_box(kind: bytes, body: bytes = b"", version: int = 0) -> bytes:
    return box(kind, bytes([version, 0, 0, 0]) + body)


def box_of(data: bytes, kind: bytes) -> bytes:
    start = data.index(kind) - 4
    return data[start : start + int.from_bytes(data[start : start + 4], "big")]


def av1_of(data: bytes) -> bytes:
    """The AV1 data of a plain AVIF file, whose last box it fills."""
    return data[data.index(b"mdat") + 4 :]


def avif(
    *meta_boxes: bytes,
    properties: bytes = b"",
    items: bytes = b"",
    item_count: int = 0,
    associations: bytes = b"",
    extents: bytes = b"",
    extent_count: int = 0,
    size: tuple[int, int] = SIZE,
    base: bytes = b"",
    av1: bytes = b"",
) -> bytes:
    """An AVIF file of one picture, and of what is added to its tables. The data comes first, so its place is known."""
    base = base or encoded(picture(RED, SIZE), "AVIF")
    av1 = av1 or av1_of(base)
    start = box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    own = b"".join(box_of(base, kind) for kind in (b"pixi", b"av1C", b"colr"))
    own = full_box(b"ispe", struct.pack(">II", *size)) + own
    meta = full_box(b"hdlr", bytes(4) + b"pict" + bytes(13)) + full_box(b"pitm", b"\0\1")
    meta += full_box(
        b"iloc", struct.pack(">BBHHHHII", 0x44, 0, 1 + extent_count, 1, 0, 1, len(start) + 8, len(av1)) + extents
    )
    meta += full_box(b"iinf", struct.pack(">H", 1 + item_count) + item(1) + items)
    associated = full_box(b"ipma", struct.pack(">IHB4B", 1, 1, 4, 1, 2, 0x83, 4) + associations)
    meta += box(b"iprp", box(b"ipco", own + properties) + associated)
    return start + box(b"mdat", av1) + full_box(b"meta", meta + b"".join(meta_boxes))


def item(number: int, kind: bytes = b"av01") -> bytes:
    return full_box(b"infe", struct.pack(">HH", number, 0) + kind + b"\0", 2)


def leb128(value: int) -> bytes:
    made = b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])


def av1_units(av1: bytes) -> list[bytes]:
    """The units of AV1 data, each with its header."""
    units, position = [], 0
    while position < len(av1):
        start, position, size, shift = position, position + 1, 0, 0
        while True:
            byte = av1[position]
            size, shift, position = size | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                break
        position += size
        units.append(av1[start:position])
    return units


# --- HEIC ---------------------------------------------------------------------------------------------------------


def heic(
    kind: bytes = b"hvc1",
    size: tuple[int, int] = SIZE,
    *,
    coded: tuple[int, int] = SIZE,
    canvas: tuple[int, int] | None = None,
    grid: tuple[int, int] = (1, 1),
    targets: Sequence[int] = (2,),
    slices: int = 1,
    parameters: bytes = b"",
    properties: bytes = b"",
    associations: bytes = b"",
    association_count: int = 0,
    items: bytes = b"",
    item_count: int = 0,
    more: bytes = b"",
    references: bytes = b"",
    meta_boxes: bytes = b"",
) -> bytes:
    """A HEIC file. Item 2 is HEVC data of `coded` pixels; item 1 has the same, or is made of `targets`.

    `size`: what the boxes say of the picture; `coded`: what they say of item 2, and what the data has; `canvas`: what
    a grid of `grid` rows and columns has, if not `size`; `slices`: how often the data is repeated; `parameters`: added
    to the data's own; `more`: the bytes of item 3.
    """
    base = encoded(Image.new("RGB", coded, RED), "HEIF", quality=50)
    hevc = base[base.index(b"mdat") + 4 :] * slices
    body = struct.pack(">BBBBHH", 0, 0, grid[0] - 1, grid[1] - 1, *(canvas or size))
    start = box(b"ftyp", b"heic\0\0\0\0mif1heicmiaf")
    first = len(start) + 8
    places = [(1, first, len(hevc)), (2, first, len(hevc)), (3, first + len(hevc) + len(body), len(more))]
    if kind != b"hvc1":
        places[0] = (1, first + len(hevc), len(body))
    own = full_box(b"ispe", struct.pack(">II", *size)) + full_box(b"ispe", struct.pack(">II", *coded))
    headers = bytearray(box_of(base, b"hvcC") + parameters)
    headers[:4] = len(headers).to_bytes(4, "big")
    headers[30] += bool(parameters)  # one array more
    own += bytes(headers) + box_of(base, b"colr") + box_of(base, b"pixi")
    meta = full_box(b"hdlr", bytes(4) + b"pict" + bytes(13)) + full_box(b"pitm", b"\0\1")
    rows = b"".join(struct.pack(">HHHII", number, 0, 1, *place) for number, *place in places)
    meta += full_box(b"iloc", struct.pack(">BBH", 0x44, 0, len(places)) + rows)
    meta += full_box(b"iinf", struct.pack(">H", 2 + item_count) + item(1, kind) + item(2, b"hvc1") + items)
    associated = struct.pack(">H5B", 1, 4, 1, 0x83, 4, 5) + struct.pack(">H5B", 2, 4, 2, 0x83, 4, 5) + associations
    associated = full_box(b"ipma", struct.pack(">I", 2 + association_count) + associated)
    meta += box(b"iprp", box(b"ipco", own + properties) + associated)
    made_of = b"" if kind == b"hvc1" else struct.pack(f">HH{len(targets)}H", 1, len(targets), *targets)
    meta += full_box(b"iref", (box(b"dimg", made_of) if made_of else b"") + references)
    return start + box(b"mdat", hevc + body + more) + full_box(b"meta", meta + meta_boxes)
