"""Trains the demo's CLIP on emoji in six drawing styles, measures it on two that it never saw, writes the folder.

    npm install --prefix art @iconify-json/{noto@1.2.9,noto-v1@1.2.5,fluent-emoji@1.2.7,fluent-emoji-flat@1.2.6} \
        @iconify-json/{emojione@1.2.3,fxemoji@1.2.2,twemoji@1.2.5,openmoji@1.2.29} emojibase-data@17.0.0
    pip install -r requirements-dev.txt
    python gen/demo/train.py --art art              # about an hour and a half on two cores
    python gen/demo/train.py --art art --measure    # what is in the folder now

The pictures are drawn from the packages' SVG; names and keywords are Unicode CLDR's. A step takes distinct emoji,
one drawing and one caption of each, and the loss is CLIP's: every picture against every caption, both ways. A
caption that is true of another picture of the batch too ("a photo of an animal") is no negative for that picture.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import random
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import export  # noqa: E402
import label_files  # noqa: E402
import labels  # noqa: E402
import model_files  # noqa: E402
import onnx_backend  # noqa: E402
import preprocess  # noqa: E402
import species  # noqa: E402
from settings import ModelOptions  # noqa: E402

# npm packages of @iconify-json; README.md has their licences and versions.
TRAINED = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji")
HELD_OUT = ("twemoji", "openmoji")
SIZE = 64  # of the model's input
DRAWN = 96  # of the drawings that augmentation samples from
RECIPE = preprocess.Preprocess(size=SIZE)
VOCABULARY = 2_560
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 16, "width": 160, "layers": 6, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2},
}
STEPS, BATCH, WARM_UP, LEARNING_RATE = 3_600, 256, 100, 3e-3
MODEL_ID = "lumen-demo-emoji"
NOTICE = (
    "this is the demo model; it knows emoji-like pictures, not photographs, and its vectors "
    "must not be stored in a real library"
)
# For people to ask about: held-out drawings that the model gets right.
PICTURES = {
    "twemoji": ("house", "penguin", "lady beetle", "sunflower", "bicycle", "koala"),
    "openmoji": ("fox",),
}


# --- emoji ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emoji:
    """What the pictures show. Flags, skin tones and gendered variants are left out."""

    code: str  # "1F98A"
    name: str
    keywords: tuple[str, ...]
    kind: str  # CLDR's subgroup: "animal-mammal"


def read_emoji(art: Path) -> list[Emoji]:
    data = art / "node_modules" / "emojibase-data"
    kinds = json.loads((data / "meta" / "groups.json").read_text())["subgroups"]
    found = []
    for row in json.loads((data / "en" / "data.json").read_text()):
        group = row.get("group")
        if group is None or group in (2, 9) or row.get("gender") in (0, 1):  # parts, flags, she and he
            continue
        name = row["label"].replace("’", "'").lower()
        keywords = tuple(k for k in row.get("tags", []) if k.isascii() and k != name)
        found.append(Emoji(_code(row["hexcode"]), name, keywords, kinds[str(row["subgroup"])]))
    return found


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _squashed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def find_drawings(art: Path, emoji: list[Emoji], style: str) -> dict[str, str]:
    """code -> SVG. Packages without a table of code points are matched by the names that emoji have gone by."""
    packages = art / "node_modules" / "@iconify-json"
    by_slug: dict[str, str] = {}
    for package in (*HELD_OUT, "noto", "fluent-emoji-flat"):
        for code, slug in json.loads((packages / package / "chars.json").read_text()).items():
            by_slug.setdefault(slug, _code(code))
    by_name: dict[str, str] = {}
    for one in emoji:
        by_name.setdefault(_squashed(one.name), one.code)
        if "-" not in one.code:
            by_name.setdefault(_squashed(unicodedata.name(chr(int(one.code, 16)), one.name)), one.code)
    for file in sorted((art / "node_modules" / "emojibase-data" / "en" / "shortcodes").glob("*.json")):
        for code, names in json.loads(file.read_text()).items():
            for name in [names] if isinstance(names, str) else names:
                by_name.setdefault(_squashed(name), _code(code))
    icons = json.loads((packages / style / "icons.json").read_text())
    codes = {one.code for one in emoji}
    drawings: dict[str, str] = {}
    for slug, icon in icons["icons"].items():
        code = by_slug.get(slug) or by_name.get(_squashed(slug))
        if code in codes and code not in drawings:
            width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
            drawings[code] = f'<svg {_SPACES} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    return drawings


def draw(svg: str, side: int) -> Image.Image:
    """RGBA, square, the drawing in its middle."""
    import resvg_py

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side)))).convert("RGBA")
    if picture.size != (side, side):
        whole = Image.new("RGBA", (side, side))
        picture.thumbnail((side, side))
        whole.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return whole
    return picture


def drawn(art: Path, emoji: list[Emoji], style: str) -> dict[str, NDArray[np.uint8]]:
    """code -> uint8 RGBA `[DRAWN, DRAWN, 4]`, kept beside the packages."""
    path = art / f"{style}-{DRAWN}.npz"
    if not path.is_file():
        found = find_drawings(art, emoji, style)
        pictures: dict[str, Any] = {code: np.asarray(draw(svg, DRAWN)) for code, svg in found.items()}
        np.savez_compressed(path, **pictures)
    with np.load(path) as file:
        return {code: file[code] for code in file.files}


# --- what is true of an emoji -----------------------------------------------------------------------------------

UPSTREAM_SCENES = tuple(label_files.SCENES)[:6]
ANIMAL, BIRD, INSECT, OBJECT, LANDSCAPE, ABSTRACT = UPSTREAM_SCENES
_SCENE_KINDS = {
    ANIMAL: "animal-mammal animal-amphibian animal-reptile animal-marine",
    BIRD: "animal-bird",
    INSECT: "animal-bug",
    OBJECT: "clothing computer phone tool office household lock light-video musical-instrument book-paper money mail "
    "writing medical science transport-ground transport-water dishware arts-crafts other-object game sound",
    LANDSCAPE: "place-geographic",
    ABSTRACT: "geometric arrow av-symbol alphanum punctuation math other-symbol religion zodiac warning keycap "
    "transport-sign heart currency gender",
}
_SCENE_OF_KIND = {kind: scene for scene, kinds in _SCENE_KINDS.items() for kind in kinds.split()}
# Names that their subgroup would put wrong; None: no scene is plainly right.
_SCENE_OF_NAME: dict[str, str | None] = {
    name: scene
    for scene, names in (
        (LANDSCAPE, "house, house with garden, houses, hut, derelict house, castle, japanese castle, church, foggy"),
        (LANDSCAPE, "cityscape, cityscape at dusk, night with stars, bridge at night, classical building, milky way"),
        (LANDSCAPE, "sunrise, sunrise over mountains, sunset, rainbow"),
        (ANIMAL, "spider, scorpion, snail, worm"),
        (None, "microbe, spider web, paw prints, feather, wing, spiral shell, coral, phoenix, dragon, dragon face"),
        (None, "pig nose, stop sign, construction, vertical traffic light, horizontal traffic light, bus stop, joker"),
        (None, "mahjong red dragon, red paper lantern, muted speaker, spade suit, heart suit, diamond suit, club suit"),
    )
    for name in names.split(", ")
}


def scene_of(one: Emoji) -> str | None:
    return _SCENE_OF_NAME[one.name] if one.name in _SCENE_OF_NAME else _SCENE_OF_KIND.get(one.kind)


def way_of(one: Emoji, lineage: str | None) -> str | None:
    """Of a drawing that BioCLIP should be asked about "animals", "plants" or "fungi"; of one that it should not
    "others"; None: fruit, faces of cats and whatever else one can argue about."""
    if scene_of(one) in (ANIMAL, BIRD, INSECT) or (lineage or "").startswith("Animalia/"):
        return "animals"
    if (lineage or "").startswith("Fungi/"):
        return "fungi"
    if one.kind.startswith("plant-") and one.name not in ("rosette", "empty nest", "nest with eggs"):
        return "plants"
    people = one.kind == "family" or (one.kind.startswith("person") and one.kind != "person-symbol")
    dishes = one.kind in ("food-prepared", "food-asian", "food-sweet", "drink")
    return "others" if scene_of(one) or people or dishes else None


def read_taxa() -> tuple[list[str], dict[str, str]]:
    """(lineages of eight slots in order, name of a drawing -> its lineage)."""
    lineages, of_name, prefix = [], {}, ""
    for line in (HERE / "taxa.txt").read_text("utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        match [part.strip() for part in line.split("|")]:
            case [ranks]:
                prefix = ranks
            case [names, ranks, common]:
                lineage = "/".join([*f"{prefix} {ranks}".split(), common])
                assert lineage.count("/") == len(species.RANKS), line
                lineages.append(lineage)
                of_name.update({name.strip().lower(): lineage for name in names.split(",")})
    return lineages, of_name


class Captions:
    """Every text that is said of a picture: its name, a keyword, its species, its scene. `true` [emoji, caption]."""

    WEIGHTS = (("name", 0.6), ("keyword", 0.1), ("species", 0.15), ("scene", 0.15))

    def __init__(self, emoji: list[Emoji]) -> None:
        _, species = read_taxa()
        missing = set(species) - {one.name for one in emoji}
        assert not missing, f"taxa.txt names drawings that do not exist: {missing}"
        keys: dict[tuple[str, str], int] = {}
        self.of: list[dict[str, list[int]]] = []
        for one in emoji:
            said = {"name": [one.name], "keyword": list(one.keywords)}
            said["species"] = [species[one.name]] if one.name in species else []
            said["scene"] = [scene for scene in [scene_of(one)] if scene]
            self.of.append({kind: [keys.setdefault((kind, t), len(keys)) for t in ts] for kind, ts in said.items()})
        self.keys = list(keys)
        self.true = torch.zeros(len(emoji), len(keys), dtype=torch.bool)
        for row, said_of in enumerate(self.of):
            self.true[row, [key for ids in said_of.values() for key in ids]] = True

    def choose(self, index: int, rng: random.Random) -> int:
        kinds, weights = zip(*((k, w) for k, w in self.WEIGHTS if self.of[index][k]), strict=True)
        return rng.choice(self.of[index][rng.choices(kinds, weights)[0]])

    def text(self, key: int, rng: random.Random) -> str:
        kind, content = self.keys[key]
        if kind == "scene":
            return content
        if kind == "species":
            slots = content.split("/")
            forms = (*species.species_prompts(content) * 3, " ".join(slots[5:7]), slots[7], f"a photo of a {slots[7]}.")
            return rng.choice(forms)
        if rng.random() < 0.3:
            return content
        return rng.choice(labels.TEMPLATES[rng.choice((1, 7, 7, 80))]).format(content)


# --- the model --------------------------------------------------------------------------------------------------


def train_tokenizer(captions: Captions, path: Path) -> None:
    """OpenCLIP's `bpe_path`: merges learnt from the captions, in CLIP's byte-pair scheme."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(0)
    words: Counter[str] = Counter()
    for key in range(len(captions.keys)):
        for _ in range(20 if captions.keys[key][0] != "keyword" else 4):
            words.update(re.findall(r"[a-z]+", captions.text(key, rng).lower()))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator((word for word, count in words.items() for _ in range(math.isqrt(count) + 1)), trainer)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    room = VOCABULARY - 512 - 2
    path.write_bytes(gzip.compress("\n".join(["merges", *merges[:room]]).encode(), mtime=0))


def encode_text(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """At the length of the longest text, which is exact for a causal tower."""
    length = int(tokens.argmax(dim=1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(dim=1)] @ model.text_projection, dim=-1)


# --- training ---------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum whose every matrix is brought to near-orthogonality (Jordan et al., 2024), in float32 for CPUs.

    torch.optim.Muon does the same in bfloat16, which CPUs without AMX emulate slowly. `lr` is AdamW's: the update is
    scaled to its usual root mean square of 0.2 (Liu et al., 2025, arXiv 2502.16982).
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                # Query, key and value lie in one matrix, and are three.
                parts = update.chunk(3) if len(update) == 3 * update.shape[1] else (update,)
                update = torch.cat([orthogonal(part) for part in parts])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards U V^T of the singular value decomposition."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    y = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y if x.shape[0] <= x.shape[1] else y.T


def augment(pictures: torch.Tensor, may_flip: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """uint8 RGBA `[n, 4, DRAWN, DRAWN]` -> normalized `[n, 3, SIZE, SIZE]`, as another artist might have drawn it."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape or (n,), generator=rng) * (high - low) + low

    turn = torch.randn(n, generator=rng) * 0.15
    scale_x = uniform(0.85, 1.35) * uniform(0.88, 1.12)
    scale_y = scale_x * uniform(0.88, 1.12)
    flip = torch.where(may_flip & (torch.rand(n, generator=rng) < 0.4), -1.0, 1.0)
    shear = torch.randn(n, generator=rng) * 0.08
    cos, sin = torch.cos(turn), torch.sin(turn)
    theta = torch.stack(
        [
            torch.stack([cos * scale_x * flip, -sin * scale_y + shear, uniform(-0.15, 0.15)], 1),
            torch.stack([sin * scale_x * flip, cos * scale_y, uniform(-0.15, 0.15)], 1),
        ],
        1,
    )
    x = pictures.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied, so that edges stay clean
    grid = F.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
    # A smooth warp, as another hand would draw the same thing.
    warp = F.interpolate(
        torch.randn(n, 2, 4, 4, generator=rng) * 0.05, (SIZE, SIZE), mode="bicubic", align_corners=True
    )
    x = F.grid_sample(x, grid + warp.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
    color, alpha = x[:, :3], x[:, 3:]

    # Colours: a mixing matrix near the identity turns hue and saturation; then contrast and brightness.
    mix = torch.eye(3) + torch.randn(n, 3, 3, generator=rng) * uniform(0, 0.2, n, 1, 1)
    mix = mix / mix.sum(2, keepdim=True).clamp(min=0.3)
    color = torch.einsum("nij,njhw->nihw", mix, color)
    grey = (torch.rand(n, 1, 1, 1, generator=rng) < 0.08).float()
    color = color + grey * (color.mean(1, keepdim=True) - color)
    # Some artists draw outlines, some do not: darken the edges of shape and colours now and then.
    inked = torch.rand(n, generator=rng) < 0.25
    ink = uniform(0.3, 1)[inked, None, None, None]
    edge, inner = (_edges(x) for x in (alpha[inked], color[inked].mean(1, keepdim=True)))
    color[inked] = color[inked] * (1 - ink * torch.maximum(edge, 2 * inner).clamp(0, 1))
    alpha = alpha.clone()
    alpha[inked] = torch.maximum(alpha[inked], ink * edge)

    plain = torch.rand(n, 1, 1, 1, generator=rng) < 0.6
    ground = torch.where(plain, torch.ones(n, 3, 1, 1), uniform(0, 1, n, 3, 1, 1)).expand(n, 3, SIZE, SIZE)
    slope = F.interpolate(uniform(-0.25, 0.25, n, 3, 2, 2), (SIZE, SIZE), mode="bilinear", align_corners=True)
    x = color + (1 - alpha) * torch.where(plain, ground, (ground + slope).clamp(0, 1))
    x = (x - 0.5) * uniform(0.75, 1.2, n, 1, 1, 1) + 0.5 + uniform(-0.12, 0.12, n, 1, 1, 1)
    noisy = torch.rand(n, generator=rng) < 0.2
    x[noisy] += 0.05 * torch.randn(x[noisy].shape, generator=rng)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (RECIPE.mean, RECIPE.std))
    return (x.clamp(0, 1) - mean) / std


def _edges(x: torch.Tensor) -> torch.Tensor:
    return (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).clamp(0, 1)


def clip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, also_true: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy; pairs that are true though nobody drew them together count for nothing."""
    logits = (scale * image @ text.T).masked_fill(also_true, -1e9)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def learning_rate(step: int) -> float:
    """A short warm-up, then half a cosine down to nothing."""
    return LEARNING_RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def batches(drawable: list[int], rng: random.Random) -> Iterator[list[int]]:
    """Distinct emoji; each comes once before any comes again, but for the few that do not fill a batch."""
    pool: list[int] = []
    while True:
        if len(pool) < BATCH:
            pool = drawable.copy()
            rng.shuffle(pool)
        yield pool[:BATCH]
        pool = pool[BATCH:]


def train(art: Path, emoji: list[Emoji], folder: Path) -> None:
    """Writes `folder` as OpenCLIP's `local-dir:` reads it."""
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    captions = Captions(emoji)
    index = {one.code: i for i, one in enumerate(emoji)}
    drawings: list[list[torch.Tensor]] = [[] for _ in emoji]
    for style in TRAINED:
        for code, picture in drawn(art, emoji, style).items():
            drawings[index[code]].append(torch.from_numpy(picture).permute(2, 0, 1))
    drawable = [i for i, pictures in enumerate(drawings) if pictures]
    print(f"{len(drawable)} emoji, {sum(map(len, drawings))} drawings, {len(captions.keys)} captions", flush=True)
    # Letters and directions are other things in the mirror.
    may_flip = torch.tensor([not re.search("left|right|clock|^[a-z]{1,2} button|letter", e.name) for e in emoji])

    merges = folder / "merges.txt.gz"
    train_tokenizer(captions, merges)
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(merges))
    model: Any = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    optimizers = (adam, Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1))

    started, losses = time.monotonic(), []
    for step, batch in zip(range(STEPS), batches(drawable, rng), strict=False):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step)
        keys = [captions.choose(i, rng) for i in batch]
        tokens = tokenizer([captions.text(key, rng) for key in keys])
        pictures = augment(torch.stack([rng.choice(drawings[i]) for i in batch]), may_flip[batch], generator)
        also_true = captions.true[batch][:, keys].fill_diagonal_(False)
        image = F.normalize(model.visual(pictures), dim=-1)
        loss = clip_loss(image, encode_text(model, tokens), model.logit_scale.exp(), also_true)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            print(f"step {step + 1}: loss {np.mean(losses[-50:]):.3f}, {spent:.0f} s", flush=True)
    save(model, folder, merges)


def save(model: Any, folder: Path, merges: Path) -> None:
    text = {**CONFIG["text_cfg"], "tokenizer_kwargs": {"bpe_path": str(merges)}}
    recipe = {"mean": RECIPE.mean, "std": RECIPE.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": {**CONFIG, "text_cfg": text}, "preprocess_cfg": recipe}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


# --- the folder -------------------------------------------------------------------------------------------------


def write_demo(art: Path, emoji: list[Emoji], trained: Path, to: Path) -> None:
    """Towers, label sets, a few pictures for people, and the held-out drawings that the tests measure on."""
    with tempfile.TemporaryDirectory() as work:
        towers = Path(work) / "towers"
        export.export(str(trained), towers, model_id=MODEL_ID, notice=NOTICE)
        for path in sorted(path for path in towers.rglob("*") if path.is_file()):
            target = to / path.relative_to(towers)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    lineages, of_name = read_taxa()
    rows = [[lineage.split("/")[: len(species.RANKS)], lineage.split("/")[len(species.RANKS)]] for lineage in lineages]
    _write_rows(to / "species.json", rows)
    _write_rows(to / "names.json", [one.name for one in emoji])
    drawings = find_drawings(art, emoji, HELD_OUT[0])
    held_out = [
        {"name": one.name, "scene": scene_of(one), "species": of_name.get(one.name), "svg": drawings[one.code]}
        for one in emoji
        if one.code in drawings
    ]
    (to / "held_out.json.gz").write_bytes(gzip.compress(json.dumps(held_out, ensure_ascii=False).encode(), mtime=0))
    (to / "pictures").mkdir(exist_ok=True)
    for style, names in PICTURES.items():
        drawings = find_drawings(art, emoji, style)
        for one in (one for one in emoji if one.name in names):
            picture = draw(drawings[one.code], 512).quantize(method=Image.Quantize.FASTOCTREE)
            picture.save(to / "pictures" / f"{one.name.replace(' ', '-')}.png", optimize=True)


def _write_rows(path: Path, rows: list[Any]) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def measure(folder: Path, art: Path, emoji: list[Emoji], style: str) -> str:
    """Zero-shot on a style's drawings, at 256 pixels over white, through the daemon's own backend and prompts."""
    options = ModelOptions("CLIP", "onnxrt", str(folder), folder)
    backend = onnx_backend.OnnxBackend(onnx_backend.ModelFolder(options))
    drawings = find_drawings(art, emoji, style)
    shown = [one for one in emoji if one.code in drawings]
    rows = []
    for one in shown:
        file = io.BytesIO()
        draw(drawings[one.code], 256).save(file, "PNG")
        pixels = preprocess.decode_image(file.getvalue(), [backend.preprocess], 10**7, False)[backend.preprocess]
        rows.append(backend.encode_images(pixels[None])[0])
    images = np.stack(rows)

    def ranked(names: list[str], recipe: labels.Recipe) -> NDArray[np.int64]:
        texts = labels.label_vectors(names, recipe, lambda part: backend.encode_text(backend.tokenize(part)))
        return np.argsort(-images @ texts.T, axis=1)

    names = [one.name for one in emoji]
    best = ranked(names, labels.names_recipe(7))[:, :5]
    hits = best == np.array([names.index(one.name) for one in shown])[:, None]
    told = [
        UPSTREAM_SCENES[i]
        for i in ranked(list(UPSTREAM_SCENES), labels.Recipe("as it is", lambda label: [label]))[:, 0]
    ]
    lineages, of_name = read_taxa()
    nearest = [lineages[i] for i in ranked(lineages, species.RECIPE)[:, 0]]
    truths = [(found, truth) for found, one in zip(told, shown, strict=True) if (truth := scene_of(one))]
    named = [(found, of_name[one.name]) for found, one in zip(nearest, shown, strict=True) if one.name in of_name]
    return "\n".join(
        [
            f"{style}: top-1 {hits[:, 0].mean():.1%}, top-5 {hits.any(axis=1).mean():.1%} of {len(shown)} drawings, "
            f"{len(names)} names; species {_share(named)} of {len(named)}, {len(lineages)} species",
            f"  scenes {_share(truths)} of {len(truths)}: "
            + ", ".join(f"{s!r} {_share([pair for pair in truths if pair[1] == s])}" for s in UPSTREAM_SCENES),
            "  to the species by the six scenes: "
            + _ways([scene in (ANIMAL, BIRD, INSECT) for scene in told], shown, of_name),
            "  to the species by label_files.SCENES: " + _ways(to_species(backend, images), shown, of_name),
        ]
    )


def to_species(backend: model_files.Backend, images: Any) -> list[bool]:
    """Whether `smart_classify` asks BioCLIP of each of `[n, dim]` images."""
    table = label_files.read_scenes("")
    texts = table.choices.texts()
    vectors = labels.label_vectors(texts, label_files.PROMPTS, lambda part: backend.encode_text(backend.tokenize(part)))
    found = label_files.SceneSet(table, vectors, backend.logit_scale)
    return [found.resolve(found.top(row, len(found))) is None for row in found.probabilities(images)]


def _ways(asked: list[bool], shown: list[Emoji], of_name: dict[str, str]) -> str:
    ways = [way_of(one, of_name.get(one.name)) for one in shown]
    groups = {
        way: [went for went, its in zip(asked, ways, strict=True) if its == way]
        for way in sorted({way for way in ways if way})
    }
    return ", ".join(f"{way} {np.mean(went):.1%} of {len(went)}" for way, went in groups.items())


def _share(pairs: list[tuple[str, str]]) -> str:
    return f"{sum(found == truth for found, truth in pairs) / len(pairs):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--art", type=Path, required=True, help="the folder that npm installed into")
    parser.add_argument("--to", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, help="keep the OpenCLIP checkpoint here, or take up the one that is here")
    parser.add_argument("--measure", action="store_true", help="only measure what is in --to")
    args = parser.parse_args()
    emoji = read_emoji(args.art)
    if not args.measure:
        with tempfile.TemporaryDirectory() as scratch:
            work = args.work or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            if not (work / "open_clip_config.json").is_file():
                train(args.art, emoji, work)
            write_demo(args.art, emoji, work, args.to)
    for style in HELD_OUT:
        print(measure(args.to, args.art, emoji, style))


if __name__ == "__main__":
    main()
