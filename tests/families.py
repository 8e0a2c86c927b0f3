"""Tokenizers of the kinds that SigLIP, SigLIP 2 and MobileCLIP have, trained here on a few sentences of many languages.

Special tokens, templates, normalizers and settings are those of the published files. The vocabulary is smaller.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

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


def gemma_files(folder: Path, texts: list[str] = ENGLISH, size: int = 1500) -> dict[str, int]:
    """The two files of SigLIP 2: BPE with byte fallback, Gemma's tokens first. Returns the vocabulary."""
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
