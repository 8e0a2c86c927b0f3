"""Pictures whose structure is an attack on the decoders, and honest pictures with unusual structures."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

import errors
import image_structure
import logs
import preprocess
from gen import ml_service_pb2 as pb
from tests.kit import BLUE, FULL, GREEN, LIMIT_S, RED, Node, encoded, picture, pixels_of
from tests.structures import (
    SIZE,
    av1_of,
    av1_units,
    avif,
    box,
    chunk,
    exif,
    flat_progressive,
    full_box,
    heic,
    item,
    jpeg,
    many_scans,
    png,
    png_of_small_parts,
    riff,
    scan,
    segment,
    split_over_segments,
    webp,
    webp_frames,
)

PHOTO = encoded(picture(RED, SIZE))
WITH_AVIF = "AVIF" in preprocess.IMAGE_FORMATS
WITH_HEIC = "HEIF" in preprocess.IMAGE_FORMATS


@functools.cache
def honest() -> bytes:
    """A progressive JPEG of the pixel limit: a photograph's noise."""
    return encoded(Image.fromarray(np.tile(np.asarray(picture(GREEN, (1000, 1000))), (5, 8, 1))), progressive=True)


def cost(data: bytes) -> float:
    """Seconds of CPU time that the process needs for a picture, accepted or not; libavif has threads of its own."""
    before = time.process_time()
    with contextlib.suppress(errors.BadInput):
        pixels_of(data, draft=True)
    return time.process_time() - before


@functools.cache
def honest_cost() -> float:
    return min(cost(honest()) for _ in range(2))


# --- honest pictures ----------------------------------------------------------------------------------------------


def honest_jpegs() -> dict[str, bytes]:
    photo = picture(RED, SIZE)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tiff = exif(40)
    noise = np.random.default_rng(1).bytes
    resource = b"8BIM\4\4\0\0" + struct.pack(">I", 60_000)
    extension = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 40
    files = {
        "baseline": encoded(photo),
        "progressive": encoded(photo, progressive=True, optimize=True),
        "restart markers": encoded(photo, restart_marker_blocks=1),
        "progressive with restart markers": encoded(photo, progressive=True, restart_marker_rows=1),
        "no subsampling": encoded(photo, subsampling=0, quality=98),
        "grey": encoded(photo.convert("L"), progressive=True),
        "CMYK": encoded(photo.convert("CMYK"), progressive=True),
        "ICC profile": encoded(photo, icc_profile=profile),
        "ICC profile of 4 MB": jpeg(*split_over_segments(0xE2, b"ICC_PROFILE\0", noise(4 << 20), numbered=True)),
        "EXIF": encoded(photo, exif=b"Exif\0\0" + tiff + noise(40_000)),
        "EXIF in two segments": jpeg(segment(0xE1, b"Exif\0\0" + tiff), segment(0xE1, b"Exif\0\0" + noise(60_000))),
        "depth map in 12 MB of XMP": jpeg(*split_over_segments(0xE1, extension, noise(12 << 20))),
        "Photoshop": jpeg(*[segment(0xED, b"Photoshop 3.0\0" + resource + noise(60_000))] * 20),
        "several images": encoded(photo, "MPO", save_all=True, append_images=[picture(BLUE, SIZE)] * 3),
        "a film behind it": PHOTO + box(b"ftyp", b"mp42") + box(b"mdat", noise(8 << 20)),
        "a maker's data behind it": PHOTO + noise(200_000) + b"SEFT",
        "fill bytes": jpeg(b"\xff" * 200 + segment(0xFE, b"comment") + b"\xff" * 30),
    }  # fmt: skip
    grey = encoded(photo.convert("L"), progressive=True)  # 6 scans, whose last one is split over the coefficients
    files["one scan a coefficient"] = grey[:-2] + b"".join(scan([1], i, i, 1, 0) for i in range(1, 50)) + b"\xff\xd9"
    return files


def with_video(photo: bytes, sample: bytes, codec: bytes = b"hvc1") -> bytes:
    """A photograph, and the video that some phones append to it."""
    tables = full_box(b"stsd", struct.pack(">I", 1) + box(codec, bytes(78)))
    tables += full_box(b"stsz", struct.pack(">II", len(sample), 1))
    tables += full_box(b"stco", struct.pack(">II", 1, len(photo) + 8))
    tables += full_box(b"stsc", struct.pack(">IIII", 1, 1, 1, 1))
    track = box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", tables))))
    return photo + box(b"mdat", sample) + box(b"moov", track)


def honest_others() -> dict[str, bytes]:
    photo = picture(RED, SIZE)
    noise = np.random.default_rng(1).bytes
    frames = [picture(colour, SIZE) for colour in (BLUE, GREEN)] * 20
    info = b"XML:com.adobe.xmp\0\0\0\0\0"
    files = {
        "PNG": encoded(photo, "PNG"),
        "interlaced PNG": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1))
        + chunk(b"IDAT", zlib.compress(b"\0\7")) + chunk(b"IEND"),
        "PNG of small IDAT chunks": png_of_small_parts((8000, 5000), 1024),
        "PNG with an ICC profile": png(chunk(b"iCCP", b"x\0\0" + zlib.compress(noise(900_000)))),
        "PNG with 10 MB of XMP": png(chunk(b"iTXt", info + b"<x:xmpmeta>" + b" " * (10 << 20))),
        "PNG with EXIF": encoded(photo, "PNG", exif=b"Exif\0\0" + exif(40)),
        "PNG of an image editor": png(*[chunk(b"mkBT", noise(6000))] * 1500),
        "PNG with texts": png(*[chunk(b"zTXt", b"key %d\0\0" % i + zlib.compress(b"text" * 1000)) for i in range(99)]),
        "animated PNG": encoded(photo, "PNG", save_all=True, append_images=frames),
        "WebP": encoded(photo, "WEBP"),
        "lossless WebP": encoded(photo.convert("RGBA"), "WEBP", lossless=True),
        "WebP with metadata": encoded(photo, "WEBP", icc_profile=noise(3 << 20), exif=exif(40), xmp=noise(9 << 20)),
        "animated WebP": encoded(photo, "WEBP", save_all=True, append_images=frames),
        "long animated WebP": webp_frames(5000),
    }  # fmt: skip
    if WITH_AVIF:
        more = {"icc_profile": noise(3 << 20), "exif": b"Exif\0\0" + exif(40), "xmp": noise(9 << 20)}
        files |= {
            "AVIF": encoded(photo, "AVIF"),
            "AVIF with alpha": encoded(photo.convert("RGBA"), "AVIF"),
            "AVIF with metadata": encoded(photo, "AVIF", **more),
            "animated AVIF": encoded(photo, "AVIF", save_all=True, append_images=frames),
            "AVIF of many items": avif(items=b"".join(map(item, range(2, 1200))), item_count=1198),
        }
    if WITH_HEIC:
        large = picture(RED, (4032, 3024))
        more = {"icc_profile": noise(1 << 20), "exif": b"Exif\0\0" + exif(40), "xmp": noise(3 << 20)}
        files |= {
            "HEIC": encoded(photo, "HEIF"),
            "HEIC of a phone": encoded(large, "HEIF", tile_size=512, thumbnails=[320], exif=b"Exif\0\0" + exif(40)),
            "HEIC with alpha": encoded(photo.convert("RGBA"), "HEIF"),
            "HEIC with metadata": encoded(photo, "HEIF", **more),
            "HEIC of several pictures": encoded(photo, "HEIF", save_all=True, append_images=frames[:5]),
            "HEIC of the general brand": encoded(photo, "HEIF").replace(b"ftypheic", b"ftypmif1"),
            "HEIC that repeats a tile": heic(b"grid", (640, 640), coded=(64, 64), grid=(10, 10), targets=[2] * 100),
        }
    return files


@pytest.mark.parametrize("make", [honest_jpegs, honest_others])
def test_honest_pictures_with_much_metadata_are_accepted(make: Callable[[], dict[str, bytes]]) -> None:
    """A user loses his photograph if its camera or editor writes more than others do."""
    for name, data in make().items():
        image_structure.check_structure(data, FULL)
        assert pixels_of(data).shape == (224, 224, 3), name
        assert pixels_of(data, draft=True).shape == (224, 224, 3), name


@pytest.mark.skipif(not (WITH_AVIF and WITH_HEIC), reason="this Pillow reads no AVIF or no HEIC")
def test_a_video_behind_a_photograph_is_not_taken_for_av1() -> None:
    """Lost otherwise: a phone's photograph, if the bytes of its video look like the header of a large picture."""
    sample = b"\x0a\x07\x08\x3f" + b"\xff" * 5  # as AV1: a sequence header of 65,536 x 65,536 pixels
    image_structure.check_structure(with_video(heic(), sample), FULL)
    with pytest.raises(errors.BadInput, match="65536 x 65536 pixels"):
        image_structure.check_structure(with_video(avif(), sample, b"av01"), FULL)


def test_the_check_costs_little_beside_the_decode() -> None:
    """An import loses speed if every photograph is read twice."""
    data = honest()
    before = time.thread_time()
    image_structure.check_structure(data, FULL)
    assert time.thread_time() - before < honest_cost() / 10


# --- attacks ------------------------------------------------------------------------------------------------------


def sized_webp(kind: bytes) -> bytes:
    """A WebP header of 16,000 x 16,000 pixels."""
    if kind == b"VP8X":
        return webp(size=(16_000, 16_000))
    sides = struct.pack("<HH", 16_000, 16_000)
    body = b"\x30\1\0\x9d\1\x2a" + sides if kind == b"VP8 " else b"\x2f" + (15_999 | 15_999 << 14).to_bytes(4, "little")
    return riff(b"RIFF", b"WEBP" + riff(kind, body + bytes(20)))


def attacks() -> dict[str, tuple[str, Callable[[], bytes]]]:
    """By name: what the answer says, and how the file is made."""
    empty = {kind: segment(kind) for kind in (0xE0, 0xE1, 0xEF, 0xFE)}
    end, whole_png = b"\xff\xd9", encoded(picture(RED, SIZE), "PNG")
    tables = segment(0xDB, (b"\0" + bytes(range(1, 65))) * 900)
    arithmetic = PHOTO.replace(b"\xff\xc0", b"\xff\xc9", 1)
    made = {
        "3,000 empty scans": ("scans", lambda: many_scans(3000)),
        "scans one above the limit": ("scans", lambda: many_scans(image_structure.SCANS_MAX - 9)),
        "scans of a sequential JPEG": ("scans", lambda: PHOTO[:-2] + scan([1], 0, 63) * 4 + end),
        "scans behind fill bytes": ("scans", lambda: flat_progressive(SIZE) + (b"\xff" + scan([1], 1, 63)) * 99 + end),
        "scans behind a broken marker": ("scans", lambda: flat_progressive(SIZE) + b"\xff\1" + scan([1], 1, 63) * 99),
        "arithmetic coding": ("arithmetic", lambda: arithmetic),
        "two frame headers": ("frame headers", lambda: jpeg(PHOTO[PHOTO.index(b"\xff\xc0"):][:19])),
        "12 million empty segments": ("segments", lambda: jpeg(*[empty[0xEF] * 12_000_000])),
        "empty comments": ("segments", lambda: jpeg(empty[0xFE] * 100_000)),
        "segments between scans": ("segments", lambda: flat_progressive(SIZE) + empty[0xE1] * 100_000 + end),
        "segments behind an early end": ("segments", lambda: jpeg(end + empty[0xE0] * 100_000)),
        "tiny EXIF segments": ("EXIF", lambda: jpeg(segment(0xE1, b"Exif\0\0") * 800_000)),
        "60 MB of application segments": ("metadata", lambda: jpeg(segment(0xE4, bytes(65_000)) * 920)),
        "quantization tables": ("tables", lambda: jpeg(tables * 900)),
        "50 MB between segments": ("between", lambda: jpeg(b"\xff\xd0" * 25_000_000)),
        "50 MB of fill bytes": ("between", lambda: jpeg(b"\xff" * 50_000_000)),
        "empty PNG chunks": ("chunks", lambda: png(chunk(b"abCd") * 2_000_000)),
        "empty PNG chunks behind the data": ("chunks", lambda: whole_png[:-12] + chunk(b"abCd") * 9999),
        "empty IDAT chunks": ("data chunks", lambda: png(chunk(b"IDAT") * 2_000_000)),
        "frames of a PNG": ("data chunks", lambda: png(chunk(b"fcTL", bytes(26)) * 500_000)),
        "packed texts": ("texts", lambda: png(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"\xff" * 10**6)) * 4000)),
        "60 MB of PNG texts": ("metadata", lambda: png(chunk(b"tEXt", b"k\0" + bytes(60_000_000)))),
        "EXIF of a PNG": ("EXIF", lambda: png(chunk(b"eXIf", exif(600_000)))),
        "EXIF in a PNG text": ("EXIF", lambda: png(chunk(b"tEXt", b"exif\0" + exif(600_000)))),
        "empty WebP chunks": ("chunks", lambda: webp(riff(b"abcd") * 6_000_000)),
        "frames of a WebP": ("frames", lambda: webp(riff(b"ANMF") * 2_000_000)),
        "60 MB of WebP metadata": ("metadata", lambda: webp(riff(b"XMP ", bytes(60_000_000)))),
        "EXIF of a WebP": ("EXIF", lambda: webp(riff(b"EXIF", exif(600_000)))),
        "pixels of a WebP": ("16000 x 16000 pixels", lambda: sized_webp(b"VP8X")),
        "pixels of a lossy WebP": ("16000 x 16000 pixels", lambda: sized_webp(b"VP8 ")),
        "pixels of a lossless WebP": ("16000 x 16000 pixels", lambda: sized_webp(b"VP8L")),
    }  # fmt: skip
    return made | (avif_attacks() if WITH_AVIF else {}) | (heic_attacks() if WITH_HEIC else {})


def nested_boxes() -> bytes:
    """An AVIF file with boxes nested deeper than Python's recursion limit."""
    inner = b""
    for _ in range(3000):
        inner = box(b"moov", inner)
    return avif() + inner


def avif_attacks() -> dict[str, tuple[str, Callable[[], bytes]]]:
    many, size = range(2, 60_002), (8000, 5000)
    big = functools.cache(lambda side: encoded(Image.new("RGB", side, RED), "AVIF", speed=10))

    def repeated() -> bytes:
        units = av1_units(av1_of(big(size)))
        return avif(base=big(size), size=size, av1=b"".join(units[:-1]) + units[-1] * 50)

    def constant() -> bytes:
        """An animation whose sample table says that 2,500,000 frames have one byte each."""
        frames = encoded(picture(RED, SIZE), "AVIF", save_all=True, append_images=[picture(BLUE, SIZE)])
        data = bytearray(frames + bytes(2_500_000))
        at = data.index(b"stsz") + 8
        data[at : at + 4] = struct.pack(">I", 1)
        at = data.index(b"stsc") + 16
        data[at : at + 4] = struct.pack(">I", 2_500_000)
        return bytes(data)

    def no_bytes() -> bytes:
        """400 items of 65,535 extents, which take no byte each."""
        rows = b"".join(struct.pack(">HHH", number, 0, 65_535) for number in range(2, 402))
        return avif(full_box(b"iloc", b"\0\0" + struct.pack(">H", 400) + rows))

    def disguised() -> bytes:
        """A second item table, of a track, says that the picture is text."""
        inner = full_box(b"meta", full_box(b"iinf", b"\0\1" + item(1, b"mime")))
        return avif(base=big((8000, 6000)), size=(100, 100)) + box(b"moov", box(b"trak", inner))

    def elsewhere() -> bytes:
        """The first sample of the track is in its second chunk."""
        data = bytearray(encoded(picture(RED, SIZE), "AVIF", save_all=True, append_images=[picture(BLUE, SIZE)]))
        at = data.index(b"stsc") + 12
        data[at : at + 4] = struct.pack(">I", 2)
        return bytes(data)

    def references() -> bytes:
        rows = [
            struct.pack(">HH", i * 100 + 1, 99) + struct.pack(">99H", *range(i * 100 + 2, i * 100 + 101))
            for i in range(650)
        ]
        return avif(full_box(b"iref", b"".join(box(b"dimg", row) for row in rows)))

    return {
        "50 frames in one AVIF picture": ("frames", repeated),
        "48 megapixels in 100 x 100": ("8000 x 6000 pixels", lambda: avif(base=big((8000, 6000)), size=(100, 100))),
        "a picture disguised as text": ("8000 x 6000 pixels", disguised),
        "a first sample elsewhere": ("without samples", elsewhere),
        "frames of an AVIF": ("frames", constant),
        "extents of an AVIF": ("extents", no_bytes),
        "references of an AVIF": ("tables", references),
        "items of an AVIF": ("boxes", lambda: avif(items=b"".join(map(item, many)), item_count=len(many))),
        "properties of an AVIF": ("boxes", lambda: avif(properties=box(b"abcd") * 1_000_000)),
        "boxes of an AVIF": ("boxes", lambda: avif() + box(b"abcd") * 6_000_000),
        "boxes in boxes": ("boxes", nested_boxes),
    }  # fmt: skip


def heic_attacks() -> dict[str, tuple[str, Callable[[], bytes]]]:
    many = range(4, 900)
    size = (8000, 5000)
    images = {"items": b"".join(item(number, b"hvc1") for number in many), "item_count": len(many)}
    metadata, described = item(3, b"mime") + bytes(2), struct.pack(f">HH{len(many)}H", 3, len(many), *many)
    numbers = [struct.pack(">H2B", number, 1, 6) for number in many]
    profile = {"properties": full_box(b"colr", b"prof" + bytes(1 << 20)), "associations": b"".join(numbers)}
    slice_of_parameters = struct.pack(">BHH", 0xA0, 1, 2) + b"\x28\1"
    group = full_box(b"altr", struct.pack(">II", 1, 15_000) + bytes(60_000))
    boxes = {name: full_box(name, b"\xff" * 60_000) for name in (b"ipma", b"iref")}
    return {
        "one tile in 65,536 places": ("frames", lambda: heic(b"grid", (64, 64), coded=(4000, 3000), grid=(100, 100),
                                                              targets=[2] * 10_000)),
        "small tiles in 65,536 places": ("frames", lambda: heic(b"grid", (64, 64), grid=(200, 120),
                                                                 targets=[2] * 24_000)),
        "a canvas of 900 megapixels": ("30000 x 30000", lambda: heic(b"grid", (99, 99), canvas=(30_000, 30_000),
                                                                      coded=(4096, 4096), grid=(8, 8), targets=[2])),
        "slices of a HEIC": ("frames", lambda: heic(b"iden", size, coded=size, slices=99)),
        "picture data among the parameters": ("parameters", lambda: heic(parameters=slice_of_parameters)),
        "parameters of a HEIC": ("parameters", lambda: heic(properties=box(b"hvcC", bytes(1 << 20)))),
        "units of a HEIC": ("units", lambda: heic(b"iden", slices=70_000)),
        "grids in grids": ("grids", lambda: heic(b"grid", targets=[1, 2], grid=(1, 2))),
        "a grid in an identical picture": ("grids", lambda: heic(b"iden", items=item(3, b"grid"), item_count=1,
                                                                   targets=[3])),
        "overlays": ("overlays", lambda: heic(b"iovl", targets=[2] * 500)),
        "metadata of all pictures": ("metadata", lambda: heic(
            items=metadata + images["items"], item_count=1 + len(many), more=bytes(1 << 20),
            references=box(b"cdsc", described))),
        "a profile of all pictures": ("metadata", lambda: heic(**images, **profile, association_count=len(many))),
        "groups of a HEIC": ("groups", lambda: heic(**images, meta_boxes=box(b"grpl", group))),
        "compressed metadata": ("compressed", lambda: heic(items=full_box(
            b"infe", b"\0\3\0\0mime\0text/xml\0deflate\0", 2), item_count=1)),
        "associations of nothing": ("metadata|frames", lambda: heic(meta_boxes=boxes[b"ipma"], slices=9000)),
        "references to nothing": ("frames", lambda: heic(meta_boxes=boxes[b"iref"], slices=9000)),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks())
def test_structures_that_no_camera_writes_are_refused_at_once(name: str) -> None:
    """All clients lose the server for minutes, or it is killed for its memory, if one such file is decoded."""
    said, make = attacks()[name]
    data = make()
    before = time.thread_time()
    with pytest.raises(errors.BadInput, match=f"payload: .*{said}"):
        pixels_of(data)
    assert time.thread_time() - before < 4 * honest_cost()


def most_expensive() -> dict[str, Callable[[], bytes]]:
    """Files just within the limits that cost the decoders most."""
    restart = segment(0xDD, b"\0\1")
    limit, size = image_structure.SCANS_MAX, (8000, 5000)
    flat = flat_progressive
    photoshop = segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\0\0\0\0\0\0\0" * 5400)
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 1))
    files = {
        "scans": lambda: many_scans(limit - 10),
        "scans with restarts": lambda: flat() + restart + scan([1], 1, 63, 1, 0) * (limit - 10) + b"\xff\xd9",
        "scans of all components": lambda: flat() + scan([1, 2, 3], 0, 0, 1, 0) * (limit - 10) + b"\xff\xd9",
        "scan data": lambda: many_scans(limit - 11)[:-2] + scan([1], 1, 63, 1, 0, b"\x55" * 50_000_000) + b"\xff\xd9",
        "stuffed bytes": lambda: flat() + scan([1], 1, 63, 1, 0, b"\xff\0" * 25_000_000) + b"\xff\xd9",
        "segments": lambda: jpeg(segment(0xE4) * 2000),
        "resources": lambda: jpeg(photoshop * 250),
        "EXIF entries": lambda: jpeg(*split_over_segments(0xE1, b"Exif\0\0", exif(43_000, 99))),
        "PNG chunks": lambda: png(chunk(b"abCd") * 2000),
        "PNG data chunks": lambda: png(chunk(b"IDAT") * 65_000),
        "PNG texts": lambda: png(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"\xff" * 10**6)) * 250),
        "PNG in a deflated row": lambda: header + chunk(b"IDAT", zlib.compress(bytes(120_100_000))) + chunk(b"IEND"),
        "WebP": lambda: encoded(Image.new("RGB", size, RED), "WEBP", method=0),
    }
    if WITH_AVIF:
        files["AVIF"] = lambda: avif(items=b"".join(map(item, range(2, 2000))), item_count=1998)
    if WITH_HEIC:
        tile = (4000, 2500)
        images = b"".join(item(number, b"hvc1") for number in range(4, 900))
        files |= {
            "HEIC tiles": lambda: heic(b"grid", (64, 64), coded=tile, grid=(5, 6), targets=[2] * 30),
            "HEIC slices": lambda: heic(b"iden", tile, coded=tile, slices=15),
            "HEIC units": lambda: heic(b"iden", slices=2400),
            "HEIC pictures": lambda: heic(items=images, item_count=896),
            "HEIC data larger than it says": lambda: heic(size=SIZE, coded=size).replace(
                struct.pack(">II", *size), struct.pack(">II", *SIZE)
            ),
        }
    return files


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", most_expensive())
def test_no_accepted_file_costs_more_than_ten_honest_pictures(name: str) -> None:
    """Other clients lose their turn for longer than any photograph would need."""
    data = most_expensive()[name]()
    image_structure.check_structure(data, FULL)
    assert cost(data) < 10 * honest_cost()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_structures_are_checked_at_once_and_cost_no_more() -> None:
    """All clients lose the server if a file can hide its scans or segments from the check by being damaged."""
    rng = np.random.default_rng(2)
    photo, profile = picture(RED, SIZE), bytes(70_000)
    kinds = [
        encoded(photo, progressive=True, icc_profile=profile, exif=b"Exif\0\0" + exif(20)),
        encoded(photo, "PNG", icc_profile=profile, save_all=True, append_images=[picture(BLUE, SIZE)]),
        encoded(photo, "WEBP", icc_profile=profile, save_all=True, append_images=[picture(BLUE, SIZE)]),
    ]
    kinds += [encoded(photo.convert("RGBA"), "AVIF", icc_profile=profile)] * WITH_AVIF
    kinds += [encoded(photo, "HEIF", icc_profile=profile, tile_size=64)] * WITH_HEIC
    marks = [rb"\xff[\xc0-\xfe]", rb"IHDR|IDAT|acTL|fcTL|iCCP|IEND", rb"VP8X|ANIM|ANMF|ICCP"] + [rb"[a-z]{4}"] * 2
    lengths = [b"\0\0", b"\0\1", b"\xff\xff", b"\0\0\0\0", b"\0\0\0\1", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]
    accepted = 0
    for number in range(500):
        kind = number % len(kinds)
        data = bytearray(kinds[kind])
        for _ in range(int(rng.integers(1, 6))):
            places = [found.start() for found in re.finditer(marks[kind], bytes(data))] or [0]
            at, to = (int(rng.choice(places)) for _ in range(2))
            part = bytes(data[at : at + int(rng.integers(4, 60))])
            match int(rng.integers(5)):
                case 0:
                    data[at + 2 : at + 4] = lengths[int(rng.integers(3))]
                case 1:
                    data[max(0, at - 4) : at] = lengths[int(rng.integers(3, 7))]
                case 2:
                    data[to:to] = part * int(rng.integers(1, 500))
                case 3:
                    data[at : at + 2] = bytes([0xFF, int(rng.integers(256))])
                case 4:
                    del data[at : at + int(rng.integers(1, 9))]
        before = time.thread_time()
        try:
            image_structure.check_structure(bytes(data), FULL)
            accepted += 1
        except errors.BadInput:
            continue
        finally:
            assert time.thread_time() - before < 4 * honest_cost()
        assert cost(bytes(data)) < 10 * honest_cost()
    assert 60 < accepted < 500


@pytest.mark.skipif(not WITH_AVIF, reason="this Pillow reads no AVIF")
def test_an_avif_takes_room_for_what_it_codes_and_not_for_what_it_says() -> None:
    """A board runs out of memory if four pictures of 2 KB, each of 12 megapixels, are taken for small ones."""
    taken: list[int] = []

    @contextlib.contextmanager
    def room(pixels: int) -> Iterator[None]:
        taken.append(pixels)
        yield

    data = avif(base=encoded(Image.new("RGB", (4000, 3000), RED), "AVIF", speed=10), size=(100, 100))
    preprocess.decode_image(data, [preprocess.Preprocess()], FULL, draft=True, room=room)
    assert taken == [12_000_000]


# --- the pixel limit and the log ----------------------------------------------------------------------------------


def test_only_the_configured_limit_of_pixels_counts() -> None:
    """An operator who allows 400 megapixels loses his panoramas to a limit of Pillow's that no document names."""
    panorama = PHOTO.replace(struct.pack(">HH", 72, 96), struct.pack(">HH", 18_000, 20_000), 1)
    with pytest.raises(errors.BadInput, match="20000 x 18000 pixels; allowed: 40000000"):
        pixels_of(panorama, draft=True)
    recipe = preprocess.Preprocess()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = preprocess.decode_image(panorama, [recipe], 400_000_000, draft=True)[recipe]
    assert pixels.shape == (224, 224, 3)


# --- a server under attack ----------------------------------------------------------------------------------------


ATTACK_S = 5


def resident(node: Node) -> float:
    """Megabytes of memory that the process has in use."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@pytest.mark.measure
def test_a_server_under_attack_answers_others(tmp_path: Path, measuring: bool) -> None:
    """All other clients lose the server while one client sends such files, or the machine runs out of memory."""
    broken_exif = segment(0xE1, b"Exif\0\0" + exif(4900, 60_000))
    files = [many_scans(3000), jpeg(segment(0xEF) * 6_000_000), jpeg(segment(0xE1, b"Exif\0\0") * 800_000)]
    files += [png(chunk(b"abCd") * 2_000_000), webp(riff(b"abcd") * 3_000_000), jpeg(broken_exif)]
    good = encoded(picture(GREEN, (1600, 1200)))
    node = Node(tmp_path, ("--demo",)).ready()
    try:
        for _ in range(3):
            node.result("clip_image_embed", good)
        base, most, times, end = resident(node), 0.0, [], time.monotonic() + ATTACK_S

        def attack(first: int) -> list[str]:
            answers: list[str] = []
            while time.monotonic() < end or len(answers) < len(files):
                data = files[(first + len(answers)) % len(files)]
                answers.append(node.ask("clip_image_embed", data).error.message)
            return answers

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(attack, first) for first in (0, 2, 4)]
            while not all(call.done() for call in calls):
                began = time.monotonic()
                [answer] = node.stub.Infer(
                    iter([pb.InferRequest(task="clip_image_embed", payload=good)]), timeout=LIMIT_S
                )
                times.append(time.monotonic() - began)
                assert not answer.error.message
                most = max(most, resident(node))
        said = {message for call in calls for message in call.result()}
        print(f"\n{len(times)} pictures, the slowest in {max(times):.2f} s; {most - base:.0f} MB more")
        assert not measuring or max(times) < 2
        for part in ("scans of the JPEG", "segments of the JPEG", "chunks of the PNG", "chunks of the WebP"):
            assert any(re.match(f"payload: the .*{part}", message) for message in said), said
        assert "" in said  # a picture with broken EXIF is a picture
        sent = sum(sorted(map(len, files))[-3:])  # at any moment, one request of each client
        assert most - base < 200 + sent / 2**20
        warned = [line for line in node.log.splitlines() if "Warning" in line]
        assert 1 <= len(warned) <= logs.RepeatLimiter.PER_MINUTE
    finally:
        node.process.kill()
        node.stop()


@pytest.mark.parametrize(("options", "alone"), [({"lossless": True}, True), ({"quality": 80}, False)])
def test_lossless_webp_is_decoded_alone(options: dict[str, Any], alone: bool) -> None:
    """Lost otherwise: a board's memory, to several small files at once whose tables are several hundred megabytes."""
    rooms: list[int] = []

    def room(pixels: int) -> contextlib.AbstractContextManager[None]:
        rooms.append(pixels)
        return contextlib.nullcontext()

    data = encoded(picture(RED, (64, 64)), "WEBP", **options)
    preprocess.decode_image(data, [preprocess.Preprocess()], FULL, draft=True, room=room)
    assert rooms == [FULL if alone else 64 * 64]
