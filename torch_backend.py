"""OpenCLIP on torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import model_files
from errors import one_line
from machine import sha256_of, usable_cores
from model_files import Backend, Say, Vectors, fetch_repository, quiet, split_model, unit_rows
from preprocess import Pixels, Preprocess
from settings import ModelOptions
from tokenizer import ClipTokenizer, TextTokenizer, Tokens, cleaner_of, is_cut_at_the_end, read_tokenizer, true_length
from torch_device import Device, DeviceRows

log = logging.getLogger("lumen.torch_backend")

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of torch, by `Backend.precision`
# What `auto` tries on a GPU, in this order: float16 is more exact, but numbers above 65,504 do not exist in it.
HALF_PRECISIONS = ("fp16", "bf16")
# The least cosine to the vectors of fp32. Two vectors that differ so from a third have 0.999, which is the floor of an
# export's self-test and of a cache; see `label_cache.PROBE_COSINE`.
HALF_FLOOR = 0.9995
SAMPLE_TEXTS = ("a", "a photo of a red bicycle.", "“curly” &amp; café, 山, 🦊", "a photo of many things " * 20)
TORCH_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def chosen_device(options: ModelOptions) -> Device:
    """CUDA (ROCm shows as CUDA), then MPS, then CPU, unless the device is given. Raises SettingError."""
    import torch

    name = options.device
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = Device(name)
    except RuntimeError as error:
        raise options.error("DEVICE", name, f"not a device of torch ({one_line(error)})") from error
    if options.precision == "fp16" and not device.is_gpu:
        raise options.error("PRECISION", options.precision, "half precision runs on a GPU only; here: fp32 or auto")
    return device


def is_repository(options: ModelOptions) -> bool:
    """Whether the model is a folder or a hub repository, and not `ARCH:weights`. Raises SettingError for a folder that
    is not OpenCLIP's."""
    folder = Path(options.model)
    if folder.is_dir() and not (folder / "open_clip_config.json").is_file():
        raise options.error("MODEL", options.model, "the folder has no open_clip_config.json, which torch needs")
    return folder.is_dir() or options.model.startswith("hf-hub:")


def find_weights(options: ModelOptions) -> tuple[str, str, Mapping[str, Any]]:
    """Of `ARCH:weights`: (architecture, file or tag, what OpenCLIP knows of the tag). Downloads nothing.

    Raises SettingError.
    """
    import open_clip

    arch, tag = split_model(options)
    if arch not in open_clip.list_models():
        raise options.error("MODEL", options.model, f"OpenCLIP has no architecture {arch!r}")
    if Path(tag).is_file():
        return arch, tag, {}
    config = open_clip.get_pretrained_cfg(arch, tag)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        text = f"{tag!r} is neither a file nor a tag of {arch}; tags: {tags}"
        raise options.error("MODEL", options.model, text)
    return arch, tag, config


class TorchBackend(Backend):
    """OpenCLIP on torch.

    `prepare_single` has nothing to do, because threads of torch share the weights. `unload_text` has not, because both
    towers are one model, and building it again would take long.
    """

    def __init__(self, options: ModelOptions, say: Say = quiet) -> None:
        """Raises SettingError or BackendError."""
        # Threads that spin while they wait occupy cores: a text among other work took up to ten times its core time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import open_clip
        import torch

        self._options, self._torch, self._cores = options, torch, usable_cores()
        self.device = chosen_device(options)
        self.on_gpu, device = self.device.is_gpu, self.device.torch_device
        name, arguments, self.model_id, self.weights = self._resolve(options, say)
        texts = open_clip.get_model_config(name).get("text_cfg", {})
        self.tokenizer = self.tokenize = _tokenizer_of(name, texts, self.weights)
        self.open_length = is_cut_at_the_end(texts)
        # OpenCLIP's model as it was trained
        self.build = partial(open_clip.create_model, name, device=device, require_pretrained=True, **arguments)
        self.runtime = "torch" if device.type == "cpu" else f"torch-{device.type}"
        self.accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        # On a CPU a batch on all cores is never faster: its threads spin while they wait, and decoding needs the cores.
        self.workers = self.device.batches if self.on_gpu else self._cores
        self.stack = self.device.stack
        self.single_image_cores = self._cores
        if options.precision == "auto":
            self._choose_precision()
        else:
            self._load(options.precision)
        self.space = model_files.space_of(sha256_of(self.weights), self.preprocess, self.precision)
        self.dim = int(self.encode_text(self.tokenize(["a photo"])).shape[1])

    def _load(self, precision: str) -> None:
        """Loads the model in a precision, in place of the one before. Raises SettingError or BackendError."""
        import open_clip

        torch, options, device = self._torch, self._options, self.device.torch_device
        self.model: Any = None
        self._text: Any = None  # so that two models are never in memory
        try:
            model: Any = self.build(precision=precision)
            self.was_reparameterized = _reparameterize(model.visual)
        except Exception as error:
            log.debug("OpenCLIP could not build %s", self.model_id, exc_info=True)
            text = f"OpenCLIP cannot load it on {device} ({one_line(error)})"
            raise options.failure("MODEL", options.model, text) from error
        self.model, self.precision, self.dtype = model.eval(), precision, getattr(torch, DTYPES[precision])
        self.logit_scale = float(model.logit_scale.detach().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self.preprocess = Preprocess.from_config(model.visual.preprocess_cfg, model.visual.image_size)
        self._mean, self._std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (self.preprocess.mean, self.preprocess.std)
        )
        self._text = text = getattr(model, "text", model)  # OpenCLIP's CLIP has the parts of the text tower itself
        rows, highest = text.token_embedding.num_embeddings, self.tokenizer.highest_id
        if highest >= rows:
            reason = f"its tokenizer has ids up to {highest}, and its embedding table {rows} rows"
            raise options.error("MODEL", options.model, reason)
        visual = model.visual
        self._pools_one_token = (
            type(visual) is open_clip.transformer.VisionTransformer
            and (visual.pool_type, visual.attn_pool, visual.transformer.batch_first) == ("tok", None, True)
            and type(visual.transformer.resblocks[-1]) is open_clip.transformer.ResidualAttentionBlock
        )
        self.device.synchronize()

    def _choose_precision(self) -> None:
        """Loads the model in half precision, if this is a GPU and the vectors of samples agree with those of fp32."""
        self._load("fp32")
        if not self.on_gpu:
            return
        expected = self._sample_vectors()
        for precision in HALF_PRECISIONS:
            try:
                self._load(precision)
                cosine = float((expected * self._sample_vectors()).sum(axis=1).min())
                difference = f"cosine {cosine:.6f} to fp32; allowed: {HALF_FLOOR} and more"
            except Exception as error:  # a vector that is not finite, or an operator that the device does not have
                cosine, difference = 0.0, one_line(error)
            if cosine >= HALF_FLOOR:
                self.self_test_cosine = cosine
                log.info("%s: %s, worst cosine to fp32 %.7f", self.model_id, precision, cosine)
                return
            log.warning("%s: %s is not used: self-test: %s", self.model_id, precision, difference)
        self._load("fp32")

    def _sample_vectors(self) -> Vectors:
        """float32 `[n, dim]`, unit rows: of a picture of noise, a smooth one, and SAMPLE_TEXTS. Raises ValueError."""
        side = self.preprocess.size
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        smooth = np.linspace(0, 255, side * side * 3).reshape(side, side, 3).astype(np.uint8)
        images, texts = self.encode_images(np.stack([noise, smooth])), self.encode_text(self.tokenize(SAMPLE_TEXTS))
        return np.concatenate([images, texts])

    @staticmethod
    def _resolve(options: ModelOptions, say: Say) -> tuple[str, dict[str, Any], str, Path]:
        """(name, arguments, model_id, weights) for OpenCLIP, after all files were downloaded. Raises BackendError."""
        import open_clip

        value = options.model
        if is_repository(options):
            repo = value.removeprefix("hf-hub:")
            local = Path(value).is_dir()
            folder = Path(value) if local else fetch_repository(options, repo, _torch_files, say)
            weights = next((folder / name for name in TORCH_WEIGHTS if (folder / name).is_file()), folder)
            return f"local-dir:{folder}", {}, folder.resolve().name if local else repo, weights
        arch, tag, config = find_weights(options)
        if not config:
            arguments = {"pretrained": tag, "force_preprocess_cfg": _recipe_of(arch)}
            return arch, arguments, f"{arch}:{Path(tag).stem}", Path(tag)
        if config.get("hf_hub"):
            repo, file = os.path.split(config["hf_hub"])
            folder = fetch_repository(options, repo, (lambda files: [file]) if file else _torch_files, say)
            path = folder / (file or next(name for name in TORCH_WEIGHTS if (folder / name).is_file()))
        else:  # a plain URL; OpenCLIP downloads it once and verifies its sha-256
            try:
                folder = options.data_dir / "models"
                with model_files.report_download(say, value, folder, {Path(config["url"]).name: 0}):
                    path = Path(open_clip.download_pretrained(config, cache_dir=str(folder)))
            except Exception as error:
                raise options.failure("MODEL", value, f"cannot download the weights ({one_line(error)})") from error
        # OpenCLIP knows these for a tag, but not for a path.
        known = {"force_quick_gelu": bool(config.get("quick_gelu", False)), "force_preprocess_cfg": _recipe(config)}
        return arch, {"pretrained": str(path), **known}, value, path

    def encode_images(self, pixels: Pixels) -> Vectors:
        return self._run(pixels, self.image_tower, self._cores if self.workers == 1 else 1)

    def encode_single(self, pixels: Pixels) -> Vectors:
        return self._run(pixels, self.image_tower, self._cores)

    def encode_text(self, tokens: Tokens) -> Vectors:
        if self.open_length:
            tokens = tokens[:, : true_length(tokens)]
        return self._run(tokens, self.text_tower, self._cores, urgent=True)

    def _run(self, batch: NDArray[Any], tower: Callable[[Any], Any], cores: int, urgent: bool = False) -> Vectors:
        if self._torch.get_num_threads() != cores:  # a property of the calling thread
            self._torch.set_num_threads(cores)
        return unit_rows(self.device.run(batch, tower, urgent))

    def hold_rows(self, rows: NDArray[Any]) -> DeviceRows | None:
        return self.device.hold(rows)

    def image_tower(self, pixels: Any) -> Any:
        """uint8 tensor `[n, size, size, 3]` -> `[n, dim]`, not of unit length yet. `export.py` traces it."""
        x = pixels.permute(0, 3, 1, 2).contiguous().float()
        x = ((x / 255 - self._mean) / self._std).to(self.dtype)
        if not self._pools_one_token:
            return self.model.encode_image(x)
        # Only one token of the last block is used. Computing only that one saves most of the block.
        visual = self.model.visual
        x = visual._embeds(x)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        seen = last.ln_1(x)
        x = x[:, :1] + last.ls_1(last.attention(seen[:, :1], seen, seen))
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
        pooled = visual._pool(x)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    def text_tower(self, tokens: Any) -> Any:
        """int64 tensor `[n, length]` -> `[n, dim]`. A causal tower takes any length up to its context length.

        For such a tower this is OpenCLIP's `encode_text` without its demand for the full context. Other towers need it.
        """
        text, length = self._text, tokens.shape[1]
        if not self.open_length:
            return self.model.encode_text(tokens)
        x = text.token_embedding(tokens).to(self.dtype) + text.positional_embedding[:length].to(self.dtype)
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
        x = x[self._torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]
        projection = text.text_projection
        if projection is None:
            return x
        return projection(x) if callable(projection) else x @ projection


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}


def _recipe_of(arch: str) -> dict[str, Any]:
    """The preprocessing of an architecture's published weights, for weights from a file; {} if they have several."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(arch)
    recipes = [_recipe(open_clip.get_pretrained_cfg(arch, tag)) for tag in tags]
    return recipes[0] if recipes and all(recipe == recipes[0] for recipe in recipes) else {}


def _tokenizer_of(name: str, config: Mapping[str, Any], weights: Path) -> TextTokenizer:
    """The tokenizer for a `text_cfg`: OpenCLIP's own vocabulary, or the `tokenizer.json` beside the weights.

    OpenCLIP's classes are not used: one caches every word without a limit, and the other needs `transformers`. Raises
    BackendError.
    """
    import open_clip

    context, clean = int(config.get("context_length", 77)), cleaner_of(config, name)
    if config.get("hf_tokenizer_name"):
        folder = weights if weights.is_dir() else weights.parent
        return read_tokenizer(folder / "tokenizer.json", config, context)
    own: Any = open_clip.get_tokenizer(name)
    return ClipTokenizer(own.encoder, list(own.bpe_ranks), context, clean)


def _reparameterize(visual: Any) -> bool:
    """Merges the branches that an image tower of timm has for training only. Returns whether it has such branches."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return False
    from timm.utils.model import reparameterize_model

    before = sum(1 for _ in trunk.parameters())
    visual.trunk = reparameterize_model(trunk, inplace=True)
    return sum(1 for _ in visual.trunk.parameters()) != before


def _torch_files(files: list[str]) -> list[str]:
    """The files to download: one weights file (safetensors if there is one), the config, the tokenizer's files."""
    weights = next((name for name in TORCH_WEIGHTS if name in files), None)
    if weights is None:
        raise ValueError(f"it has none of {', '.join(TORCH_WEIGHTS)}")
    return [weights] + [name for name in files if "/" not in name and name.endswith((".json", ".txt", ".model"))]
