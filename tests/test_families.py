"""Families of models beyond CLIP: SigLIP, SigLIP 2 and MobileCLIP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import errors
import preprocess
import tokenizer
from tests.families import ENGLISH, SCRIPTS, gemma_files, t5_files
from tests.kit import RED, encoded, picture, shared
from tests.test_inputs import HOSTILE

# The recipes of OpenCLIP's tags: SigLIP, MobileCLIP, MobileCLIP2-S3 and -L-14, CLIP with 256 pixels.
RECIPES = {
    "siglip": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    "mobileclip": {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "resize_mode": "shortest"},
    "bilinear": {"interpolation": "bilinear"},
    "clip": {},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("side", [224, 256, 384, 512])
def test_each_familys_preprocessing_equals_openclips_to_the_last_bit(name: str, side: int) -> None:
    """Lost otherwise: vectors that drift from the model's, because its pictures are squashed or not bicubic."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    recipe = preprocess.Preprocess.from_config(RECIPES[name], side)
    transform = image_transform_v2(PreprocessCfg(size=side, **RECIPES[name]), is_train=False)
    for size in ((300, 240), (240, 301), (side, side), (30, 500), (1999, 1333), (side, 700)):
        data = encoded(picture(RED, size), "PNG")
        [pixels] = preprocess.decode_image(data, [recipe], 40_000_000, draft=False).values()
        expected = transform(Image.open(io.BytesIO(data))).numpy()
        assert np.array_equal(preprocess.normalize(pixels[None], recipe)[0], expected), size


def test_a_mean_may_be_one_number_for_all_channels() -> None:
    """Lost otherwise: a configuration that OpenCLIP takes."""
    assert preprocess.Preprocess.from_config({"mean": 0.5, "std": 0.25}).mean == (0.5, 0.5, 0.5)


@pytest.fixture(scope="session", params=["gemma", "t5", "t5 by transformers 5"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `tokenizer.json` of each kind."""
    makers: dict[str, Any] = {
        "gemma": gemma_files,
        "t5": lambda folder: t5_files(folder, by_its_class=False),
        "t5 by transformers 5": lambda folder: t5_files(folder, by_its_class=True),
    }
    name = request.param
    return shared(tmp_path_factory, f"tokenizer-{name.replace(' ', '-')}", makers[name])


def hard_texts() -> list[str]:
    rng = np.random.default_rng(5)
    ranges = range(32, 0x250), range(0x370, 0x500), range(0x900, 0x1000), range(0x1E00, 0x2100), range(0xFE00, 0xFFE0)
    alphabet = [chr(c) for part in ranges for c in part] + ["😀", "中", "\u0301", "\u200d", "\ufe0f", "𠮷", " ", "\t"]
    controls = ["a <eos> b", "<bos>", "x<pad>", "<0x41>", "</s> end", "one\n\ntwo", "▁▁ ▁", "snake_case_name", "<h1>"]
    long = [" ".join(ENGLISH[:40]), "".join(SCRIPTS.values()), SCRIPTS["Thai"] * 30, "a " * 63, "a " * 64, "a " * 65]
    return [*HOSTILE, *SCRIPTS.values(), *controls, *long, *("".join(rng.choice(alphabet, 20)) for _ in range(2000))]


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_tokens_equal_openclips_for_each_kind_of_tokenizer(tokenizer_folder: Path, clean: str) -> None:
    """Lost otherwise: searches in one's own language that find something else, because their tokens differ."""
    from open_clip.tokenizer import HFTokenizer

    config = {"hf_tokenizer_name": "timm/ViT-B-32-SigLIP2-256", "tokenizer_kwargs": {"clean": clean}}
    ours = tokenizer.read_tokenizer(tokenizer_folder / "tokenizer.json", config, 64)
    texts = hard_texts()
    expected = HFTokenizer(tokenizer_folder, context_length=64, clean=clean)(texts).numpy()
    found = ours(texts)
    assert [t for t, a, b in zip(texts, found, expected, strict=True) if not np.array_equal(a, b)] == []
    assert found.max() <= ours.highest_id and found.shape == (len(texts), 64)
    # Our exports have no tokenizer_config.json.
    again = tokenizer.HubTokenizer(ours.to_json(), {}, 64, tokenizer.CLEANERS[clean])
    assert np.array_equal(again(texts), found)


def test_tokens_of_mobileclip_equal_openclips_with_each_cleaning(tiny_onnx: Path) -> None:
    """Lost otherwise: the same, for models with CLIP's vocabulary."""
    import open_clip

    texts = hard_texts()
    for clean in ("canonicalize", "lower", "whitespace"):
        config = {"context_length": 77, "tokenizer_kwargs": {"clean": clean}}
        ours = tokenizer.read_tokenizer(tiny_onnx / "textual" / "tokenizer.json", config, 77)
        assert np.array_equal(ours(texts), open_clip.SimpleTokenizer(clean=clean)(texts).numpy()), clean


def test_cleaning_equals_openclips() -> None:
    """Lost otherwise: the same, before the tokenizer."""
    from open_clip.tokenizer import get_clean_fn

    for name, clean in tokenizer.CLEANERS.items():
        theirs = get_clean_fn(name)
        assert [text for text in hard_texts() if clean(text) != theirs(text)] == [], name


def test_a_tokenizer_that_is_not_the_models_is_refused_by_name(tiny_onnx: Path, tmp_path: Path) -> None:
    """Lost otherwise: a library that is searched with the wrong tokens, where every text finds something."""
    gemma_files(tmp_path)
    siglip = {"hf_tokenizer_name": "timm/ViT-B-32-SigLIP2-256", "tokenizer_kwargs": {"clean": "canonicalize"}}
    of_clip, of_gemma = tiny_onnx / "textual" / "tokenizer.json", tmp_path / "tokenizer.json"
    content = json.loads(of_gemma.read_text())
    unpadded = tmp_path / "unpadded" / "tokenizer.json"
    unpadded.parent.mkdir()
    unpadded.write_text(json.dumps(content))
    unpadded.with_name("tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content | {"model": {"type": "BPE", "vocab": []}}))
    for path, config, complaint in (
        (of_clip, siglip, "it is CLIP's tokenizer, and the model needs timm/ViT-B-32-SigLIP2-256"),
        (of_gemma, {"context_length": 64}, "it is not CLIP's tokenizer, and the model needs CLIP's"),
        (tmp_path / "none.json", siglip, "no tokenizer.json that can be used (FileNotFoundError"),
        (damaged, siglip, "no tokenizer.json that can be used"),
        (unpadded, siglip, "the vocabulary lacks the padding token '[PAD]'"),
        (of_gemma, siglip | {"tokenizer_kwargs": {"clean": "upper"}}, "allowed: canonicalize, lower, whitespace"),
        (of_gemma, siglip | {"tokenizer_mode": "clips"}, "text towers with tokenizer_mode ('clips') are not supported"),
        (of_gemma, siglip | {"hf_model_name": "roberta-base"}, "text towers with hf_model_name ('roberta-base')"),
    ):
        with pytest.raises(errors.BackendError) as caught:
            tokenizer.read_tokenizer(path, config, 64)
        assert complaint in str(caught.value) and str(path.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
