"""Pictures as a viewer shows them, and texts as OpenCLIP reads them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import backends
import client
import errors
import preprocess
import tokenizer
from settings import ModelOptions
from tests.kit import GREEN, RED, ROOT, Node, encoded, picture, pixels_of


@pytest.mark.parametrize(
    "size", [(300, 240), (240, 301), (224, 224), (3, 500), (100, 75), (1999, 1333), (225, 227), (80, 1000)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_preprocessing_equals_openclips_transform_to_the_last_bit(size: tuple[int, int], kind: str) -> None:
    """Lost otherwise: vectors that drift from the model's by the library that resized the picture."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    data = encoded(picture(RED, size), kind)
    expected = image_transform_v2(PreprocessCfg(), is_train=False)(Image.open(io.BytesIO(data)))
    assert np.array_equal(preprocess.normalize(pixels_of(data)[None], preprocess.Preprocess())[0], expected.numpy())


def test_a_picture_is_seen_as_a_viewer_shows_it() -> None:
    """Lost otherwise: portraits lie on their side, logos turn black, scans turn white."""
    half = Image.new("RGB", (400, 300), "blue")
    half.paste("red", (0, 0, 400, 100))  # the upper third
    upright = pixels_of(encoded(half, "PNG")).astype(int)
    turned = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        6: (Image.Transpose.ROTATE_90,),
        8: (Image.Transpose.ROTATE_270,),
    }
    for orientation, (operation,) in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen = pixels_of(encoded(half.transpose(operation), "PNG", exif=exif)).astype(int)
        assert np.abs(seen - upright).max() <= 2, orientation
    broken_exif = encoded(half, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    assert np.abs(pixels_of(broken_exif).astype(int) - upright).max() < 80
    clear = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    assert (pixels_of(encoded(clear, "PNG")) == 255).all()
    assert (pixels_of(encoded(clear.convert("LA"), "PNG")) == 255).all()
    palette = Image.new("P", (300, 300), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (pixels_of(encoded(palette, "PNG")) == (10, 20, 30)).all()
    assert (pixels_of(encoded(palette, "PNG", transparency=0)) == 255).all()
    grey16 = Image.fromarray(np.full((300, 300), 0x8000, np.uint16))
    assert (pixels_of(encoded(grey16, "PNG")) == 128).all()
    assert (pixels_of(encoded(Image.new("1", (300, 300), 1), "PNG")) == 255).all()
    assert (pixels_of(encoded(Image.new("L", (300, 300), 77), "JPEG")) == 77).all()
    assert (
        np.abs(
            pixels_of(encoded(Image.new("CMYK", (300, 300), (0, 255, 255, 0)), "JPEG")).astype(int) - (255, 0, 0)
        ).max()
        < 8
    )
    animation = encoded(
        Image.new("RGB", (300, 300), "red"),
        "WEBP",
        save_all=True,
        append_images=[Image.new("RGB", (300, 300), "blue")],
        lossless=True,
    )
    assert (pixels_of(animation) == (255, 0, 0)).all()
    phone = encoded(
        Image.new("RGB", (300, 300), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (300, 300), "blue")]
    )
    assert np.abs(pixels_of(phone).astype(int) - (254, 0, 0)).max() < 3
    if "AVIF" in preprocess.IMAGE_FORMATS:
        assert (
            np.abs(pixels_of(encoded(Image.new("RGB", (300, 300), "red"), "AVIF")).astype(int) - (255, 0, 0)).max() < 8
        )


def test_damaged_and_foreign_files_are_bad_input_and_nothing_else() -> None:
    """Lost otherwise: a crashed thread, or a secret from an exception's text."""
    rng = np.random.default_rng(3)
    refused = 0
    for kind in preprocess.IMAGE_FORMATS:
        whole = encoded(picture(RED), kind)
        with pytest.raises(errors.BadInput, match=r"damaged or cut off|not an image that can be read"):
            pixels_of(whole[: len(whole) // 2])
        for _ in range(150):
            mutant = bytearray(whole)
            for position in rng.integers(0, len(mutant), 8):
                mutant[position] = rng.integers(256)
            try:
                assert pixels_of(bytes(mutant)).shape == (224, 224, 3)
            except errors.BadInput as error:
                assert str(error).startswith("payload: ")
                refused += 1
    assert refused > 50
    for kind in ("TIFF", "GIF", "BMP"):
        with pytest.raises(errors.BadInput, match="allowed: whole files of JPEG, PNG, WEBP"):
            pixels_of(encoded(picture(RED), kind))


def test_a_heic_of_a_phone_is_the_same_picture_and_upright() -> None:
    """Lost otherwise: the photographs of every iPhone, or those that were taken upright."""
    pytest.importorskip("pillow_heif")
    photo = picture(GREEN, (1600, 1200))
    photo.paste("blue", (0, 0, 1600, 300))
    exif = Image.Exif()
    for orientation in (1, 6, 8):
        exif[0x0112] = orientation
        of_phone = encoded(photo, "HEIF", quality=95, tile_size=512, exif=exif.tobytes())
        same = pixels_of(encoded(photo, quality=95, exif=exif.tobytes()))
        assert np.abs(pixels_of(of_phone).astype(int) - same).mean() < 3, orientation
    deep = Image.fromarray(np.full((300, 300), 0x8000, np.uint16))
    assert np.abs(pixels_of(encoded(deep, "HEIF", quality=95)).astype(int) - 128).max() < 4
    glass = encoded(Image.new("RGBA", (300, 300), (255, 0, 0, 0)), "HEIF", quality=95)
    assert (pixels_of(glass) > 250).all()


@pytest.mark.parametrize("installed", [True, False])
def test_the_capability_says_whether_heic_is_read_and_so_does_the_answer(tmp_path: Path, installed: bool) -> None:
    """Lost otherwise: a client that sends what the daemon cannot read, or an owner who is not told what to install."""
    pytest.importorskip("pillow_heif")
    program = (
        f"import sys; sys.path.insert(0, sys.argv.pop(1)); {installed} or sys.modules.update(pillow_heif=None)\n"
        "import lumen_clip; sys.exit(lumen_clip.main())"
    )
    node = Node(tmp_path, ("--demo",), (sys.executable, "-c", program, str(ROOT))).ready()
    try:
        photo = encoded(Image.open(ROOT / "gen/demo/pictures/fox.png").convert("RGB"), "HEIF", quality=95)
        with client.LumenClient(node.address) as daemon:
            mimes = {mime for capability in daemon.capabilities() for mime in capability.tasks[0].input_mimes}
            assert ("image/heic" in mimes) == ("image/heif" in mimes) == installed
            if installed:
                assert daemon.classify(photo, topk=1)[0][0] == "fox"
            else:
                with pytest.raises(client.LumenError, match="payload: HEIC; this daemon reads it if pillow-heif is"):
                    daemon.classify(photo)
    finally:
        node.stop()


def test_a_scaled_jpeg_decode_sees_the_same_picture(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: either six times the decoding time, or the sense of the picture."""
    photo = picture(GREEN, (2400, 1800)).resize((4000, 3000), Image.Resampling.BICUBIC)
    backend = backends.create_backend(ModelOptions("CLIP", "onnxrt", str(tiny_onnx), tmp_path))
    full, draft = (backend.encode_images(pixels_of(encoded(photo), draft)[None])[0] for draft in (False, True))
    assert full @ draft > 0.999
    assert not np.array_equal(pixels_of(encoded(photo)), pixels_of(encoded(photo), draft=True))


HOSTILE = [
    "“curly” ‘quotes’ it’s", "&amp;lt;b&gt; &eacute;", "😀👩‍👩‍👧 emoji", "e\u0301 é", "<end_of_text> foo",
    "a<start_of_text>b", "!!<end_of_text>", "<|endoftext|>", "ﬁ ligature", "ＦＵＬＬ width", "ΣΑΣ ς", "ǅ", "'ſ it'ſ",
    "a\x0bb\x00c\x1b[31m", "word " * 200, "x" * 1000, "don't they'll I'M", "½ ² 10000", "\u200bzero\u00adwidth",
    "mojibake Ã©", "O'ahu ʻ", "", "  ", "\u0345",
]  # fmt: skip


def test_the_tokenizer_equals_openclips_on_hostile_texts(tiny_onnx: Path) -> None:
    """Lost otherwise: another vector for a label because somebody typed a curly quote."""
    import open_clip

    ours, theirs = (
        tokenizer.read_tokenizer(tiny_onnx / "textual" / "tokenizer.json", {}, 77),
        open_clip.SimpleTokenizer(),
    )
    rng = np.random.default_rng(5)
    alphabet = [
        chr(c) for c in (*range(32, 0x250), *range(0x370, 0x500), *range(0x1E00, 0x2100), 0x1F600, 0x4E2D, 0x301)
    ]
    texts = HOSTILE + ["".join(rng.choice(alphabet, 20)) for _ in range(2000)]
    differing = [
        t for t, a, b in zip(texts, ours(texts), theirs(texts).numpy(), strict=True) if not np.array_equal(a, b)
    ]
    assert not differing
    with pytest.raises(errors.BackendError, match=r"no tokenizer\.json that can be used"):
        tokenizer.read_tokenizer(tiny_onnx / "config.json", {}, 77)
