"""Tokenizers of the kinds that SigLIP, SigLIP 2 and MobileCLIP have, trained here on a few sentences of many languages.

Special tokens, templates, normalizers and settings are those of the published files. The vocabulary is smaller.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import preprocess
import tokenizer
from tests.kit import DEMO, Drawing
from tests.test_demo import openclip_of_demo

# "a dog and a cat on the beach at sunset" or similar sentences, in 20 scripts.
SCRIPTS = {
    "Latin": "Ein Hund und eine Katze am Strand, Straße, señor, đường phố, İstanbul",
    "Greek": "ένας σκύλος και μια γάτα στην παραλία ΣΟΦΟΣ",
    "Cyrillic": "собака и кошка на пляже, їжак, ђак",
    "Armenian": "շուն և կատու լողափին",
    "Hebrew": "כלב וחתול על החוף שָׁלוֹם",
    "Arabic": "كلب وقطة على الشاطئ مُحَمَّد ۱۲۳",
    "Devanagari": "समुद्र तट पर कुत्ता और बिल्ली",
    "Bengali": "সৈকতে কুকুর এবং বিড়াল",
    "Gurmukhi": "ਬੀਚ ਤੇ ਕੁੱਤਾ ਅਤੇ ਬਿੱਲੀ",
    "Gujarati": "બીચ પર કૂતરો અને બિલાડી",
    "Tamil": "கடற்கரையில் நாய் மற்றும் பூனை",
    "Telugu": "బీచ్‌లో కుక్క మరియు పిల్లి",
    "Kannada": "ಕಡಲತೀರದಲ್ಲಿ ನಾಯಿ ಮತ್ತು ಬೆಕ್ಕು",
    "Sinhala": "වෙරළේ බල්ලෙක් සහ පූසෙක්",
    "Thai": "สุนัขและแมวบนชายหาด ๑๒๓",
    "Lao": "ໝາ ແລະ ແມວ ຢູ່ຫາດຊາຍ",
    "Georgian": "ძაღლი და კატა სანაპიროზე",
    "Ethiopic": "ውሻ እና ድመት በባህር ዳርቻ",
    "Hangul": "해변의 개와 고양이",
    "CJK": "海滩上的狗和猫、浜辺の犬と猫、パーティー ㍿ 𠮷野家",
    "Emoji": "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭 1️⃣ ☀️ 🧑🏿‍🚀 family at the beach",
}  # fmt: skip
ENGLISH = [
    f"{a} {thing} {where}"
    for a in ("a photo of a", "the", "many", "a drawing of my", "a black and white picture of one")
    for thing in ("dog", "cat", "red bicycle", "sailing boat", "fox", "house", "penguin", "sunflower", "lady beetle")
    for where in ("on the beach", "in the garden at night", "beside an old car", "")
]
GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA_CONTROLS = ("<start_of_turn>", "<end_of_turn>", "<unused0>")
GEMMA_TEXTS = ("\n\n", "▁▁", "▁▁▁", "<h1>")  # tokens that are not special, but are found before the merges


def gemma_files(folder: Path, texts: list[str] = ENGLISH, size: int = 1500, full: bool = False) -> dict[str, int]:
    """The two files of SigLIP 2: BPE with byte fallback, Gemma's tokens first. Returns the vocabulary.

    `full`: made-up tokens fill the vocabulary up to `size`, with two merges for each.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    first = [*GEMMA_SPECIALS, *GEMMA_CONTROLS, *GEMMA_TEXTS, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size - len(first), show_progress=False)
    # Some scripts only, so that the others need the bytes.
    learner.train_from_iterator(
        texts + [SCRIPTS[name] for name in ("Latin", "Greek", "Cyrillic", "Thai", "CJK")], trainer
    )
    learnt = json.loads(learner.to_str())["model"]
    words = [word for word, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if word not in first]
    vocab = {word: number for number, word in enumerate([*first, *words])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    if full:
        letters = [chr(c) for c in (*range(ord("a"), ord("z") + 1), *range(0x4E00, 0x4E00 + 34))]
        pairs = [(a, b) for a in letters for b in letters]
        triples = [split for a in letters for b in letters for c in letters for split in ((a + b, c), (a, b + c))]
        for left, right in ((letter, "") for letter in letters):
            vocab.setdefault(left + right, len(vocab))
        for left, right in (*pairs, *triples):
            if left + right in vocab or len(vocab) < size:
                vocab.setdefault(left + right, len(vocab))
                merges.append((left, right))
        for number in range(len(vocab), size):
            vocab[f"<filler{number}>"] = number
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(token, normalized=False, special=True) for token in (*GEMMA_SPECIALS, *GEMMA_CONTROLS)]
    made.add_tokens([*special, *(AddedToken(token, normalized=False) for token in GEMMA_TEXTS)])
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", vocab["<eos>"])])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    added = {str(vocab[token]): _added(token, True) for token in (*GEMMA_SPECIALS, *GEMMA_CONTROLS)}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_max_length": 64,
        "added_tokens_decoder": added | {str(vocab[token]): _added(token, False) for token in GEMMA_TEXTS},
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


def _added(token: str, special: bool) -> dict[str, Any]:
    rest = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, "special": special, **rest}


def t5_files(folder: Path, by_its_class: bool) -> None:
    """`tokenizer.json` and `tokenizer_config.json` as SigLIP has them: Unigram, with SentencePiece's NFKC.

    `by_its_class`: written by the T5 class of transformers 5. Otherwise as transformers 4 has converted them, which is
    what is published.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH, SCRIPTS["Latin"].lower()]),
        model_writer=file,
        vocab_size=260,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    learnt = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    vocab = [(piece.piece, piece.score) for piece in learnt.pieces]
    charsmap = learnt.normalizer_spec.precompiled_charsmap
    folder.mkdir(parents=True, exist_ok=True)
    if by_its_class:
        from transformers import T5Tokenizer

        made = T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=charsmap, extra_ids=0, pad_token="</s>")
        made.save_pretrained(folder)
        return
    made = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(charsmap), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    # SigLIP pads with the end token, whose id is 1.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": {**_added("</s>", True), "__type": "AddedToken"},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>", "model_max_length": 64}))


# --- models of true size ------------------------------------------------------------------------------------------

FAMILY_TAGS = {
    "MobileCLIP2-S0": "dfndr2b",
    "ViT-B-32-SigLIP2-256": "webli",
    "ViT-B-16-SigLIP2": "webli",
    "ViT-B-32": "laion2b_s34b_b79k",
}


def seeded(arch: str, folder: Path, **smaller: dict[str, Any]) -> Any:
    """An OpenCLIP folder of an architecture with seeded random weights, without its tokenizer. Returns the model.

    All parameters and statistics are random, so that no branch, bias or scale is without influence. `smaller`: values
    for `vision_cfg` or `text_cfg` that replace the architecture's.
    """
    import open_clip
    import torch

    config = open_clip.get_model_config(arch)
    for part, values in smaller.items():
        config[part] |= values
    tag = open_clip.get_pretrained_cfg(arch, FAMILY_TAGS[arch])
    recipe = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": recipe}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or name.endswith("gamma"):
                value.uniform_(0.5, 1.5)
            elif value.dtype == torch.float32 and name not in ("logit_scale", "logit_bias") and "attn_mask" not in name:
                value += 0.02 * torch.randn_like(value)
        model.logit_scale.fill_(4.7)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model.eval()


# --- a small SigLIP that knows something --------------------------------------------------------------------------

SIDE = 64
# Words in the names of drawings -> what such drawings are called in three languages. The first that fits counts.
CONCEPTS = {
    r"o'clock|-thirty": ("a clock", "eine Uhr", "時計"),
    "keycap": ("a key of a keyboard", "eine Taste", "キーボード"),
    "button": ("a sign with letters", "ein Schild", "看板"),
    "arrow": ("an arrow", "ein Pfeil", "矢印"),
    "heart": ("a heart", "ein Herz", "ハート"),
    "family": ("a family", "eine Familie", "家族"),
    "moon": ("the moon", "der Mond", "月"),
    r"\bhands?\b|finger": ("a hand", "eine Hand", "手"),
    r"person|\b(wo)?man\b": ("a person", "ein Mensch", "人"),
    "face": ("a face", "ein Gesicht", "顔"),
}
RECIPE = preprocess.Preprocess.from_config({"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}, SIDE)
SMALL_SIGLIP: dict[str, Any] = {
    "embed_dim": 128,
    "init_logit_scale": 2.3,
    "init_logit_bias": -3,
    "custom_text": True,
    "vision_cfg": {"image_size": SIDE, "layers": 6, "width": 160, "head_width": 32, "patch_size": 16},
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 0,
        "hf_tokenizer_name": "timm/ViT-B-32-SigLIP2-256",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


def known_drawings() -> tuple[list[tuple[Drawing, int]], list[tuple[Drawing, int]]]:
    """(for training, held out): drawings with the number of their concept. Of each concept every fourth is held out."""
    rows = json.loads(gzip.decompress((DEMO / "held_out.json.gz").read_bytes()))
    parts: tuple[list[tuple[Drawing, int]], list[tuple[Drawing, int]]] = [], []
    counts = [0] * len(CONCEPTS)
    for drawing in (Drawing(**row) for row in rows):
        found = next((at for at, words in enumerate(CONCEPTS) if re.search(words, drawing.name)), None)
        if found is not None:
            parts[counts[found] % 4 == 3].append((drawing, found))
            counts[found] += 1
    return parts


def squashed(drawings: list[tuple[Drawing, int]]) -> Any:
    """uint8 `[n, SIDE, SIDE, 3]`."""
    return np.stack([preprocess.decode_image(d.file(96), [RECIPE], 10**6, draft=False)[RECIPE] for d, _ in drawings])


def train_siglip(folder: Path, steps: int = 100) -> None:
    """A small SigLIP, trained on drawings and what they show; seeded, about half a minute.

    The image tower starts from the demo's, which has not seen these drawings. The loss is that of SigLIP, the sum over
    all pairs of a picture and a text; pairs of one concept are positive.
    """
    import open_clip
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    torch.set_num_threads(1)  # of a busy machine, two would wait for each other
    names = [name for concept in CONCEPTS.values() for name in concept]
    vocab = gemma_files(folder, [*ENGLISH, *names])
    config = {**SMALL_SIGLIP, "text_cfg": {**SMALL_SIGLIP["text_cfg"], "vocab_size": len(vocab)}}
    recipe = {"mean": RECIPE.mean, "std": RECIPE.std, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": recipe}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with tempfile.TemporaryDirectory() as scratch:
        openclip_of_demo(Path(scratch) / "demo")
        state = torch.load(Path(scratch) / "demo" / "open_clip_pytorch_model.bin")
    of_image = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    model.visual.load_state_dict(of_image)
    seen, _ = known_drawings()
    pictures = torch.from_numpy(preprocess.normalize(squashed(seen), RECIPE))
    shown = torch.tensor([concept for _, concept in seen])
    read = tokenizer.read_tokenizer(folder / "tokenizer.json", config["text_cfg"], 64)
    tokens, meaning = torch.from_numpy(read(names)), torch.arange(len(names)) // 3
    rest = [*model.text.parameters(), model.logit_scale, model.logit_bias]
    groups = [{"params": list(model.visual.parameters()), "lr": 3e-4}, {"params": rest, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [3e-4, 2e-3], total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(seen), (64,))
        batch = pictures[chosen].roll(tuple(torch.randint(-4, 5, (2,)).tolist()), (2, 3))
        images, texts = model.encode_image(batch, True), model.encode_text(tokens, True)
        logits = model.logit_scale.exp() * images @ texts.T + model.logit_bias
        true = 2.0 * (shown[chosen][:, None] == meaning) - 1
        loss = -F.logsigmoid(true * logits).sum() / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
