"""Checks the structure of an encoded picture before a decoder reads it: JPEG, PNG, WebP, AVIF, HEIC.

Decoders spend time and memory on each scan, segment, chunk and box, even if it is empty, and have no limit on their
number. A small file can therefore occupy a decode thread for minutes. The limits here are several times what cameras
and editors write. Damaged files pass: the decoder reports what is wrong with them. Nothing is decoded here.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from errors import BadInput

# Scans of a progressive JPEG. libjpeg writes 10 for colour and 18 for CMYK; optimisers choose about as many. One scan
# without data costs libjpeg up to 26 ms at 40 megapixels.
SCANS_MAX = 64
# Scans of a sequential or lossless JPEG: one for each component, and a picture has at most four.
SEQUENTIAL_SCANS_MAX = 4
# Segments, chunks or boxes that are not picture data. Cameras write about 20; a JPEG with METADATA_BYTES_MAX of
# metadata has 256, an AVIF grid of 40 megapixels about 1,000.
PARTS_MAX = 2048
# Parts of picture data: IDAT chunks, frames of an animation, AV1 units. 64 MiB in the 8 KiB chunks of libpng are 8,192.
DATA_PARTS_MAX = 65_536
# Bytes of metadata: EXIF, ICC (up to 4 MB), XMP (depth maps and second pictures of phones, about 10 MB), Photoshop.
METADATA_BYTES_MAX = 16 << 20
# Bytes of EXIF. A JPEG segment holds 64 KiB, and EXIF has one; Pillow needs 6 µs for each entry of 12 bytes.
EXIF_BYTES_MAX = 1 << 20
# EXIF segments of a JPEG. Pillow joins them, which takes time in the square of their number.
EXIF_SEGMENTS_MAX = 8
# Compressed chunks of a PNG (texts, ICC profile). Pillow unpacks each to at most 1 MB, in 2 ms; editors write a few.
PACKED_CHUNKS_MAX = 256
# Bytes of JPEG tables (Huffman, quantization) and headers: a scan has at most 4 Huffman tables of 280 bytes. Bytes of
# HEVC parameters: a camera writes 100 to 200, an encoder with a comment 2,500.
TABLE_BYTES_MAX = 256 << 10
# Bytes before the first scan of a JPEG that belong to no segment. Pillow reads them one at a time.
PADDING_BYTES_MAX = 64 << 10
# Bytes of AVIF item tables (iloc, iref, ipma, grpl); 1,000 items have 30 KB. libavif searches all items for each entry.
ITEM_TABLE_BYTES_MAX = 64 << 10
# Bytes of the sample tables of an AVIF animation: ten minutes at 30 frames a second have 600 KB.
SAMPLE_TABLE_BYTES_MAX = 1 << 20
# Frames of an AVIF or HEIC, in pictures of the pixel limit: colour, alpha, gain map, and up to four layers of each.
FRAMES_MAX = 8
# Bytes of entity groups of an AVIF or HEIC. pillow-heif copies all groups for each image; a camera writes one of 24.
GROUP_BYTES_MAX = 1024
# libheif refuses HEVC data of more pixels than the item says, unless it has fewer than these: ImageItem::get_decoder.
HEVC_PIXELS_MIN = 65_536

SEARCH_BYTES = 1 << 20  # of one search; other threads run between two searches


def check_structure(data: bytes, max_pixels: int) -> int:
    """Raises BadInput if decoding `data` could cost far more than a real picture of `max_pixels` pixels.

    Also raises for WebP, AVIF and HEIC files whose coded size is above `max_pixels`: libwebp allocates memory for it
    before Pillow reports the size, and the size that an AVIF reports can be smaller. Bytes of other formats pass.

    Returns for how many pixels the decoder may need memory, if that can be more than the picture has: those of the
    largest frame of an AVIF or HEIC; `max_pixels` for a WebP with lossless data, so that such files are decoded one at
    a time; else 0.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return max_pixels if _check_webp(data, max_pixels) else 0
    elif data[4:8] == b"ftyp":
        return _BoxFileCheck(data, max_pixels).run()
    return 0


def _limit(value: int, limit: int, what: str) -> None:
    if value > limit:
        raise BadInput(f"payload: the {what}: more than {limit:,}, which no real picture has")


class _Totals(dict[str, int]):
    """Sums of one file, each under the name that the error gives it."""

    def add(self, value: int, limit: int, what: str) -> None:
        self[what] = total = self.get(what, 0) + value
        if total > limit:
            _limit(total, limit, what)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadInput if the picture has more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise BadInput(f"payload: the image has {width} x {height} pixels; allowed: {max_pixels} in all")


# --- JPEG ---------------------------------------------------------------------------------------------------------

# A marker, as libjpeg and Pillow find it: stuffed bytes (FF 00), restart markers and fill bytes (FF FF) are none.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _PROGRESSIVE = 0xD8, 0xD9, 0xDA, 0xC2
_FRAMES = {0xC0, 0xC1, _PROGRESSIVE, 0xC3}  # baseline, extended, progressive, lossless; all with Huffman coding
# Arithmetic coding decodes without data at full cost, and libjpeg has no hierarchical coding. No camera writes either.
_UNSUPPORTED = {*range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xDE, 0xDF}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SOS, *_FRAMES}
_METADATA = {*range(0xE0, 0xF0), 0xFE}  # APP0 to APP15, COM


def _next_marker(data: bytes, position: int) -> int:
    """Position of the next marker, or the length of `data`."""
    while position < len(data):
        if found := _MARKER.search(data, position, position + SEARCH_BYTES + 1):
            return found.start()
        position += SEARCH_BYTES
    return len(data)


def _check_jpeg(data: bytes) -> None:
    """Follows the markers up to the end of the first image, which is all that Pillow decodes.

    Must find each segment that Pillow (up to the first scan) or libjpeg finds, also in a damaged file.
    """
    totals, position, scans, scans_max = _Totals(), 2, 0, SEQUENTIAL_SCANS_MAX
    while (at := _next_marker(data, position)) + 4 <= len(data):
        if at > position and not scans:
            totals.add(at - position, PADDING_BYTES_MAX, "bytes between the segments of the JPEG")
        totals.add(1, PARTS_MAX, "segments of the JPEG")
        kind, position = data[at + 1], at + 2
        if kind == _EOI and scans:
            return
        if kind in _UNSUPPORTED:
            raise BadInput("payload: JPEG with arithmetic or hierarchical coding is not supported")
        if kind not in _TABLES and kind not in _METADATA:
            continue  # has no length; libjpeg and Pillow stop there or ignore it
        length = max(2, int.from_bytes(data[position : position + 2], "big"))
        if kind in _TABLES:
            totals.add(length, TABLE_BYTES_MAX, "bytes of tables of the JPEG")
        else:
            totals.add(length, METADATA_BYTES_MAX, "bytes of metadata of the JPEG")
        if kind == 0xE1 and data.startswith(b"Exif\0\0", position + 2):
            totals.add(1, EXIF_SEGMENTS_MAX, "EXIF segments of the JPEG")
        if kind in _FRAMES:
            totals.add(1, 1, "frame headers of the JPEG")
            scans_max = SCANS_MAX if kind == _PROGRESSIVE else SEQUENTIAL_SCANS_MAX
        if kind == _SOS:
            scans += 1
            _limit(scans, scans_max, "scans of the JPEG")
        position += length


# --- PNG ----------------------------------------------------------------------------------------------------------


def _check_png(data: bytes) -> None:
    totals, position = _Totals(), 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (b"IDAT", b"DDAT", b"fdAT", b"fcTL"):
            totals.add(1, DATA_PARTS_MAX, "data chunks of the PNG")
        else:
            totals.add(1, PARTS_MAX, "chunks of the PNG")
            totals.add(length, METADATA_BYTES_MAX, "bytes of metadata of the PNG")
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            totals.add(1, PACKED_CHUNKS_MAX, "texts of the PNG")
        if kind == b"eXIf" or data.startswith((b"exif\0", b"Raw profile type exif\0"), position + 8):
            _limit(length, EXIF_BYTES_MAX, "bytes of EXIF of the PNG")
        if kind == b"IEND":
            return
        position += 12 + length


# --- WebP ---------------------------------------------------------------------------------------------------------


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk; (0, 0) if libwebp cannot read it either."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def _check_webp(data: bytes, max_pixels: int) -> bool:
    """Whether any data is lossless or may be, as alpha and the frames of an animation.

    Such data can have 65,536 sets of Huffman tables, for which libwebp needs several hundred megabytes however small
    the picture is. Their number is known only once a part of the data is decoded.
    """
    check_size(*_webp_size(data), max_pixels)
    totals, position, lossless = _Totals(), 12, False
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"ANMF":
            totals.add(1, DATA_PARTS_MAX, "frames of the WebP")
        else:
            totals.add(1, PARTS_MAX, "chunks of the WebP")
        if kind not in (b"ANMF", b"VP8 ", b"VP8L", b"ALPH"):
            totals.add(length, METADATA_BYTES_MAX, "bytes of metadata of the WebP")
        if kind == b"EXIF":
            _limit(length, EXIF_BYTES_MAX, "bytes of EXIF of the WebP")
        lossless |= kind in (b"ANMF", b"VP8L", b"ALPH")
        position += 8 + length + (length & 1)
    return lossless


# --- AVIF and HEIC ------------------------------------------------------------------------------------------------

# Boxes with boxes in them -> bytes of their own before these (ISO/IEC 14496-12); `iinf` is longer from version 1 on.
_CONTAINERS = {b"meta": 4, b"iinf": 6, b"iprp": 0, b"ipco": 0, b"stsd": 8, b"av01": 78}
_CONTAINERS |= dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl"), 0)
_ITEM_TABLES = {b"iloc", b"iref", b"ipma", b"grpl", b"stsc"}
_DERIVED = {b"grid", b"iden"}  # items that are made of other items


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start of the content, end) of each box in a row of boxes."""
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:
            size, content = int.from_bytes(data[content : content + 8], "big"), content + 8
        elif size == 0:
            size = stop - start
        if size < content - start:
            return
        yield kind, content, min(start + size, stop)
        start += size


class _Integers:
    """Reads big-endian unsigned integers one after the other; 0 past the end, as in a damaged file."""

    def __init__(self, data: bytes | memoryview, position: int) -> None:
        self._data, self.position = data, position

    def next(self, size: int) -> int:
        self.position += size
        return int.from_bytes(self._data[self.position - size : self.position], "big")


@dataclass
class _Item:
    """An item of the `iloc` box."""

    number: int
    base: int  # bytes from the start of the file, or of the `idat` box
    in_idat: bool
    extents: list[tuple[int, int]]  # offset, length


@dataclass
class _Track:
    """What a track's sample table says."""

    offset: int = 0  # of the first sample, from the start of the file
    size: int = 0  # of the first sample
    chunks: int = 0
    samples_per_chunk: int = 0  # at most

    def read(self, kind: bytes, integers: _Integers) -> None:
        if kind == b"stsz":
            _limit(self.size, 0, "second sample table of an AVIF track")
            same, _ = integers.next(4), integers.next(4)
            self.size = same or integers.next(4)
        elif kind in (b"stco", b"co64"):
            _limit(self.chunks, 0, "second chunk table of an AVIF track")
            self.chunks = integers.next(4)
            self.offset = integers.next(8 if kind == b"co64" else 4)
        elif kind == b"stsc":
            for number in range(min(integers.next(4), ITEM_TABLE_BYTES_MAX // 12)):
                first, each, _ = (integers.next(4) for _ in range(3))
                if not each or (number == 0 and first != 1):
                    raise BadInput("payload: the AVIF has chunks without samples")  # the first sample is elsewhere then
                self.samples_per_chunk = max(self.samples_per_chunk, each)


class _BoxFileCheck:
    """One walk over the boxes of an AVIF or HEIC, then over the data of its items and of each track's first sample.

    Pillow decodes the first frame only. libavif scales AV1 data of any size to the size that the boxes say, so the
    size is read from the AV1 data itself. libheif compares the size of HEVC data with the boxes before it decodes.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data, self._max_pixels = data, max_pixels
        # Item number -> types, places of `idat` boxes: several only in a file that is to deceive the check.
        self._kinds: defaultdict[int, set[bytes]] = defaultdict(set)
        self._idats: list[int] = []
        self._items: list[_Item] = []
        self._tracks: list[_Track] = []
        self._properties: list[tuple[bytes, int, int]] = []  # kind, start and end of each box in `ipco`
        self._associations: list[tuple[int, int]] = []  # item number, number of its property from 1 on
        # Kind, item, other items: it consists of them ("dimg") or describes them ("cdsc").
        self._references: list[tuple[bytes, int, list[int]]] = []
        self._has_av1_track = False
        self._totals = _Totals()
        self._units = self._pixels = self._largest = 0  # AV1 or HEVC units; pixels of all frames and of the largest

    def run(self) -> int:
        self._walk()
        data = memoryview(self._data)
        slices: Counter[int] = Counter()  # HEVC item -> slices
        sizes: Counter[int] = Counter()  # item -> bytes
        for item in self._items:
            size = sum(length for _, length in item.extents)
            limit = len(data) + (1 << 20)  # identical tiles are stored once
            self._totals.add(size, limit, "bytes of items of the file")
            kinds = self._kinds[item.number]
            sizes[item.number] += size
            for payload in self._payloads(item) if kinds & {b"av01", b"hvc1", b"grid"} else ():
                if b"av01" in kinds:
                    self._check_av1(payload)
                if b"hvc1" in kinds:
                    slices[item.number] += self._count_slices(payload)
                if b"grid" in kinds:
                    integers = _Integers(payload, 1)
                    side = 4 if integers.next(1) & 1 else 2
                    integers.next(2)  # rows and columns
                    check_size(integers.next(side), integers.next(side), self._max_pixels)
            if kinds & {b"av01", b"hvc1"}:
                continue
            self._totals.add(size, METADATA_BYTES_MAX, "bytes of metadata of the file")
            if b"Exif" in kinds:
                _limit(size, EXIF_BYTES_MAX, "bytes of EXIF of the file")
        for track in self._tracks if self._has_av1_track else ():  # not the video behind a phone's photograph
            _limit(track.chunks * track.samples_per_chunk, DATA_PARTS_MAX, "frames of the file")
            self._check_av1(data[track.offset : track.offset + track.size])
        if slices:
            self._check_hevc(slices, sizes)
        return self._largest

    def _payloads(self, item: _Item) -> Iterator[memoryview]:
        data = memoryview(self._data)
        for start in self._idats if item.in_idat else [0]:
            base = start + item.base
            parts = [data[base + offset : base + offset + length] for offset, length in item.extents]
            yield parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _walk(self) -> None:
        """Counts the boxes, and reads those that say where the AV1 data is."""
        waiting = [(b"", 0, len(self._data))]  # no recursion: boxes can be nested deeper than Python's stack
        while waiting:
            parent, *row = waiting.pop()
            if parent == b"stbl":
                self._tracks.append(_Track())
            if parent == b"ipco":
                _limit(len(self._properties), 0, "second ipco box of the file")
            for kind, start, stop in _boxes(self._data, *row):
                self._totals.add(1, PARTS_MAX, "boxes of the file")
                version = _Integers(self._data, start).next(1)
                if kind in (b"meta", b"moov"):
                    _limit(stop - start, METADATA_BYTES_MAX, "bytes of metadata of the file")
                if kind in _ITEM_TABLES:
                    self._totals.add(stop - start, ITEM_TABLE_BYTES_MAX, "bytes of tables of the file")
                if parent == b"stbl":
                    self._totals.add(stop - start, SAMPLE_TABLE_BYTES_MAX, "bytes of sample tables of the file")
                    self._tracks[-1].read(kind, _Integers(self._data, start + 4))
                if parent == b"ipco":
                    self._properties.append((kind, start, stop))
                self._has_av1_track |= kind == b"av01"
                if kind == b"grpl":
                    _limit(stop - start, GROUP_BYTES_MAX, "bytes of entity groups of the file")
                if kind in _CONTAINERS:
                    longer = 2 if kind == b"iinf" and version else 0
                    waiting.append((kind, start + _CONTAINERS[kind] + longer, stop))
                else:
                    self._read_item_box(kind, start, stop, version)

    def _read_item_box(self, kind: bytes, start: int, stop: int, version: int) -> None:
        integers = _Integers(self._data, start + 4)
        if kind == b"idat":
            self._idats.append(start)
            _limit(len(self._idats), 2, "idat boxes of the file")
        elif kind == b"infe":
            number = integers.next(4 if version > 2 else 2)
            integers.next(2)  # protection
            item_kind = integers.next(4).to_bytes(4, "big")
            self._kinds[number].add(item_kind)
            if item_kind == b"iovl":
                raise BadInput("payload: pictures that are composed of overlays are not supported")
            if item_kind == b"mime" and any(self._data[integers.position : stop].split(b"\0")[2:]):
                raise BadInput("payload: compressed metadata is not supported")  # its size is not known
        elif kind == b"iloc":
            self._read_iloc(integers, version)
        elif kind == b"ipma":
            size = 2 if self._data[start + 3 : start + 4] > b"\0" else 1
            for _ in range(integers.next(4)):
                if integers.position >= stop:
                    break
                number = integers.next(4 if version else 2)
                for _ in range(integers.next(1)):
                    self._associations.append((number, integers.next(size) & (1 << 8 * size - 1) - 1))
        elif kind == b"iref":
            for reference, inner, inner_stop in _boxes(self._data, start + 4, stop):
                size, integers = 4 if version else 2, _Integers(self._data, inner)
                source = integers.next(size)
                count = min(integers.next(2), (inner_stop - inner) // size)
                self._references.append((reference, source, [integers.next(size) for _ in range(count)]))

    def _read_iloc(self, integers: _Integers, version: int) -> None:
        sizes = integers.next(2)
        offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index_size = sizes & 15 if version in (1, 2) else 0
        long = 4 if version == 2 else 2
        count = integers.next(long)
        _limit(count, PARTS_MAX, "items of the file")
        for _ in range(count):
            number = integers.next(long)
            in_idat = version in (1, 2) and integers.next(2) & 15 == 1
            integers.next(2)  # data reference
            item = _Item(number, integers.next(base_size), in_idat, [])
            count = integers.next(2)
            self._totals.add(count, PARTS_MAX, "extents of the file")
            for _ in range(count):
                integers.next(index_size)
                item.extents.append((integers.next(offset_size), integers.next(length_size)))
            self._items.append(item)

    def _count_slices(self, payload: memoryview) -> int:
        """The slices of an HEVC item, each of which can cover the whole picture. H.265, section 7.3.1.2."""
        position = slices = 0
        while position + 5 <= len(payload):
            self._units += 1
            _limit(self._units, DATA_PARTS_MAX, "HEVC units of the HEIC")
            slices += payload[position + 4] >> 1 & 63 < 32
            position += 4 + int.from_bytes(payload[position : position + 4], "big")
        return slices

    def _check_hevc(self, slices: Counter[int], sizes: Counter[int]) -> None:
        """Adds up the pixels that libheif decodes and the bytes that pillow-heif copies for each image of the file."""
        areas: dict[int, int] = {}
        for number, index in self._associations:
            kind, start, stop = self._properties[index - 1] if 0 < index <= len(self._properties) else (b"", 0, 0)
            self._totals.add(stop - start, METADATA_BYTES_MAX, "bytes of metadata of the HEIC")
            if kind == b"ispe":
                integers = _Integers(self._data, start + 4)
                areas[number] = max(areas.get(number, 0), integers.next(4) * integers.next(4))
        for kind, start, stop in self._properties:
            if kind == b"hvcC":
                self._totals.add(stop - start, TABLE_BYTES_MAX, "bytes of parameters of the HEIC")
                self._check_parameters(start, stop)
        frames: Counter[int] = Counter()  # item -> pixels of its slices
        for number, count in slices.items():
            frames[number] = count * max(areas.get(number, self._max_pixels), HEVC_PIXELS_MIN)
            self._largest = max(self._largest, areas.get(number, 0))
        self._pixels += frames.total()
        for kind, source, targets in self._references:
            if kind == b"cdsc":
                size = sizes[source] * len(targets)
                self._totals.add(size, METADATA_BYTES_MAX, "bytes of metadata of the HEIC")
            if kind == b"dimg":
                self._pixels += sum(frames[target] for target in targets)
                if self._kinds[source] & _DERIVED and any(self._kinds[target] & _DERIVED for target in targets):
                    raise BadInput("payload: HEIC with grids in grids is not supported")
        _limit(self._pixels, FRAMES_MAX * self._max_pixels, "pixels of all frames of the HEIC")

    def _check_parameters(self, start: int, stop: int) -> None:
        """Refuses picture data in an `hvcC` box, where it is decoded as well. ISO/IEC 14496-15, section 8.3.3.1.2."""
        integers = _Integers(self._data, start + 22)
        for _ in range(integers.next(1)):
            integers.next(1)
            for _ in range(integers.next(2)):
                if integers.position >= stop:
                    return
                length = integers.next(2)
                if integers.next(1) >> 1 & 63 < 32:
                    raise BadInput("payload: the HEIC has picture data among its parameters")
                integers.next(length - 1)

    def _check_av1(self, payload: memoryview) -> None:
        """Adds the frames of one item or sample to `_pixels`. AV1 specification, section 5.3 to 5.5."""
        integers, frame = _Integers(payload, 0), 0
        while integers.position < len(payload):
            self._units += 1
            _limit(self._units, DATA_PARTS_MAX, "AV1 units of the file")
            header = integers.next(1)
            integers.next(header >> 2 & 1)  # an extension
            if header & 2:  # the size follows, seven bits a byte
                size = 0
                for shift in range(0, 56, 7):
                    byte = integers.next(1)
                    size |= (byte & 127) << shift
                    if byte < 128:
                        break
            else:
                size = len(payload) - integers.position
            if header >> 3 & 15 == 1:
                width, height = _av1_size(payload[integers.position : integers.position + min(size, 512)])
                check_size(width, height, self._max_pixels)
                frame = width * height
                self._largest = max(self._largest, frame)
            elif header >> 3 & 15 in (3, 6, 7):  # a frame header alone, with its frame, or repeated
                self._pixels += frame
                _limit(self._pixels, FRAMES_MAX * self._max_pixels, "pixels of all AV1 frames of the file")
            integers.position += size


def _av1_size(header: memoryview) -> tuple[int, int]:
    """Largest width and height of the frames after a sequence header. AV1 specification, section 5.5.1."""
    value, left = int.from_bytes(header, "big"), 8 * len(header)

    def bits(count: int) -> int:
        nonlocal left
        left -= count
        return value >> left & (1 << count) - 1 if left >= 0 else 0

    bits(4)  # profile, still picture
    if bits(1):  # the short header of still pictures
        bits(5)
    else:
        delay = 0  # bits of the decoder model's delays
        if bits(1):  # timing
            bits(64)
            if bits(1):
                zeros = 0
                while left > 0 and not bits(1):
                    zeros += 1
                bits(zeros)
            if bits(1):  # decoder model
                delay = bits(5) + 1
                bits(42)
        display_delay = bits(1)
        for _ in range(bits(5) + 1):  # operating points
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delay and bits(1):
                bits(2 * delay + 1)
            if display_delay and bits(1):
                bits(4)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    return bits(width_bits) + 1, bits(height_bits) + 1
