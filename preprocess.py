"""Pictures and ready-made tensors to pixels: uint8 RGB `[size, size, 3]`.

Pixels are bit-identical to those of OpenCLIP's transform if the picture is decoded in full. Thread-safe.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, features

try:
    import pillow_heif
except ImportError:  # optional: there are no wheels for some platforms
    pillow_heif = None

from errors import BackendError, BadInput
from image_structure import check_size, check_structure

log = logging.getLogger("lumen.preprocess")

Pixels = NDArray[np.uint8]  # [n, size, size, 3], RGB

# OpenAI's CLIP statistics; open_clip/constants.py has the same.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Names of preprocessings in the Lumen SDK
BIOCLIP_TENSOR, SIGLIP_TENSOR = "bioclip2_224_image_v1", "siglip2_base_patch16_224_image_v1"
DRAFT_MARGIN = 2  # scaled JPEG decoding keeps at least so many times the side of the model's input
STRIP_LINES = 256  # lines of a picture with alpha that are blended at a time
Image.MAX_IMAGE_PIXELS = None  # disables Pillow's limit; `decode_image` applies the configured one
# Characters of a PNG's decompressed texts; Pillow's default is four times as much
PngImagePlugin.MAX_TEXT_MEMORY = 16 << 20
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP") + (("AVIF",) if features.check("avif") else ())
if pillow_heif is not None:
    # Pictures are decoded one on each thread, and of each the primary image alone.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    IMAGE_FORMATS += ("HEIF",)


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of a model. Fields and defaults are those of OpenCLIP's `PreprocessCfg`."""

    size: int = 224
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int | None = None) -> Preprocess:
        """Reads a `preprocess_cfg`. `size`: the side of the model's input in pixels, which overrides the config's.

        Raises BackendError if the preprocessing is not supported.
        """
        side = size if size is not None else config.get("size", cls.size)
        if isinstance(side, Sequence):
            if len(set(side)) != 1:
                raise BackendError(f"preprocess size {list(side)}: only square inputs are supported")
            side = side[0]
        mode = config.get("resize_mode") or cls.resize_mode
        filter_name = config.get("interpolation") or cls.interpolation
        if mode not in ("shortest", "squash"):
            raise BackendError(f"preprocess resize_mode {mode!r}: only 'shortest' and 'squash' are supported")
        if filter_name not in ("bicubic", "bilinear"):
            raise BackendError(f"preprocess interpolation {filter_name!r}: only 'bicubic' and 'bilinear'")
        mean, std = (_of_channels(config.get(name) or getattr(cls, name)) for name in ("mean", "std"))
        return cls(int(side), mean, std, filter_name, mode)

    @property
    def tensor_id(self) -> str:
        """The id of this preprocessing in the Lumen SDK, or "" if it has none.

        The SDK's tensors for SigLIP 2 are resized by the bilinear filter, and OpenCLIP's recipe is bicubic.
        """
        siglip = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
        return {Preprocess(): BIOCLIP_TENSOR, siglip: SIGLIP_TENSOR}.get(self, "")


def _of_channels(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, Sequence) else (float(values),) * 3


Room = Callable[[int], AbstractContextManager[object]]


def decode_image(
    data: bytes,
    recipes: Collection[Preprocess],
    max_pixels: int,
    draft: bool,
    room: Room = nullcontext,
    sized: Callable[[tuple[int, int]], None] = lambda size: None,
) -> dict[Preprocess, Pixels]:
    """Decodes a picture, whose format is detected from its content, for each recipe: uint8 RGB `[size, size, 3]`.

    `draft`: a JPEG may be decoded at a fraction of its size, but at least DRAFT_MARGIN times the largest side of a
    recipe. `room`: a context that is entered with the number of pixels while they are in memory, 4 to 20 bytes each.
    `sized`: called with the width and height as stored, before the EXIF orientation is applied. Raises BadInput.
    """
    try:
        coded = check_structure(data, max_pixels)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except BadInput:
        raise
    except Exception as error:  # Pillow raises various exceptions for damaged files
        log.debug("not an image: %r", error)
        if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev") and pillow_heif is None:
            raise BadInput("payload: HEIC; this daemon reads it if pillow-heif is installed") from error
        allowed = f"whole files of {', '.join(IMAGE_FORMATS)}"
        raise BadInput(f"payload: not an image that can be read; allowed: {allowed}") from error
    width, height = image.size
    check_size(width, height, max_pixels)
    sized((width, height))
    try:
        if draft and image.format in ("JPEG", "MPO"):
            side = DRAFT_MARGIN * max(recipe.size for recipe in recipes)
            image.draft(None, (side, side))
        # All coefficients of a progressive JPEG are in memory, whatever the scale.
        with room(max(image.width * image.height, width * height // 4, coded)):
            image.load()  # before `getexif`, which may load a PNG and ignore damage
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            return {recipe: _resize(rgb, recipe, orientation, max_pixels) for recipe in recipes}
    except BadInput:
        raise
    except Exception as error:
        log.debug("undecodable %s: %r", image.format, error)
        raise BadInput(f"payload: the {image.format} image is damaged or cut off") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the EXIF is damaged, because the picture may still be good."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception as error:
        log.debug("unreadable EXIF: %r", error)
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB: alpha blended over white, 16 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion clips at 255.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgb = Image.new("RGB", image.size)
        for top in range(0, image.height, STRIP_LINES):  # all at once, a small file could take 600 MB
            strip = image.crop((0, top, image.width, min(top + STRIP_LINES, image.height))).convert("RGBA")
            over_white = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
            rgb.paste(over_white.convert("RGB"), (0, top))
        return rgb
    return image.convert("RGB")


# EXIF orientation -> the operation that makes the picture upright, as in Pillow's ImageOps.exif_transpose.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _resize(image: Image.Image, recipe: Preprocess, orientation: int, max_pixels: int) -> Pixels:
    """torchvision's Resize and CenterCrop, with the same truncation and rounding. Raises BadInput."""
    side = recipe.size
    width, height = image.size
    if recipe.resize_mode == "squash":
        target = (side, side)
    elif width <= height:
        target = (side, int(side * height / width))
    else:
        target = (int(side * width / height), side)
    if target[0] * target[1] > max_pixels:
        raise BadInput(f"payload: the image is too narrow ({width} x {height} pixels)")
    if target != image.size:
        image = image.resize(target, _FILTERS[recipe.interpolation])
    # After the resize, because the picture is small then.
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    left, top = (round((length - side) / 2.0) for length in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


TENSOR_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}


def pixels_from_tensor(payload: bytes, meta: Mapping[str, str], recipe: Preprocess) -> Pixels:
    """Converts a client's tensor `[1, 3, size, size]` back to pixels: uint8 `[size, size, 3]`.

    Exact for every tensor that is `(pixel / 255 - mean) / std`. Raises BadInput, which names the meta key.
    """
    shape = [1, 3, recipe.size, recipe.size]
    expected = {
        "lumen.tensor.layout": "NCHW",
        "lumen.tensor.format": "contiguous",
        "lumen.tensor.byte_order": "little",
        "lumen.preprocess.id": recipe.tensor_id,
        "lumen.preprocess.skip": "true",
    }
    for key, value in expected.items():
        if meta.get(key) != value:
            raise BadInput(f"meta {key}: {meta.get(key, '')[:80]!r}; allowed: {value!r}")
    name, text = meta.get("lumen.tensor.dtype", ""), meta.get("lumen.tensor.shape", "")
    if name not in TENSOR_DTYPES:
        raise BadInput(f"meta lumen.tensor.dtype: {name[:80]!r}; allowed: fp32, fp16")
    try:
        sent: object = json.loads(text) if len(text) < 100 else None
    except (ValueError, RecursionError):
        sent = None
    if sent != shape:
        raise BadInput(f"meta lumen.tensor.shape: {text[:80]!r}; allowed: {shape}")
    dtype = TENSOR_DTYPES[name]
    size = 3 * recipe.size**2 * dtype.itemsize
    if len(payload) != size:
        raise BadInput(f"payload: {len(payload)} bytes; a tensor {shape} has {size}")
    values = np.frombuffer(payload, dtype).reshape(shape[1:]).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (recipe.mean, recipe.std))
    with np.errstate(all="ignore"):  # overflow is checked below
        levels = np.rint((values * std + mean) * 255)
        valid = bool(np.all((levels >= -1) & (levels <= 256)))  # false for NaN as well
    if not valid:
        raise BadInput("payload: tensor values outside (pixel/255 - mean)/std of an image")
    return np.ascontiguousarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def normalize(pixels: Pixels, recipe: Preprocess) -> NDArray[np.float32]:
    """uint8 `[n, h, w, 3]` -> float32 `[n, 3, h, w]`, `(x / 255 - mean) / std` in OpenCLIP's order of operations."""
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    x /= np.float32(255)
    x -= np.array(recipe.mean, np.float32)[:, None, None]
    x /= np.array(recipe.std, np.float32)[:, None, None]
    return x
