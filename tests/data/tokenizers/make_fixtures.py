#!/usr/bin/env python3
"""Makes the tokenizer fixtures: small tokenizers of every supported kind, and what
huggingface/tokenizers (pip install tokenizers; 0.23 was used) makes of some texts with them.

Usage: make_fixtures.py [DIRECTORY]"""
import json
import pathlib
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = """The mill by the river grinds wheat, rye and barley. It's slow work; we've always known that.
They'll grind 12345 sacks in 2024, and 67 more in 3.5 years. Don't you think it'd be quicker?
  Indented lines, tabs\tand double  spaces appear too.\r\n\r\nWINDOWS line ends, as well.\n\n\n
def grind(sack_count=3): return [flour for flour in range(sack_count) if flour % 2 == 0]
Über die Mühle fließt der Fluß; le café est à côté; ein Jäger lief naiv vorbei. 你好，世界。 こんにちは
the the the then there these those that than river rivers riverbank mill mills miller milling
""" * 3

TEXTS = [
    "", "a", " ", "  ", "\n", "Hello, world!", "The miller's mills, 12345 sacks & 3.5 rivers.",
    "  leading and trailing  ", "tabs\tand\n\nnew\r\nlines \n  x", "IT'S we'Ll DON'T they'd",
    "Ünïcödé — naïve café “quotes”", "cafe\u0301 versus caf\u00e9, A\u030a \u212b \u1e9b\u0323",
    "你好，世界 こんにちは", "emoji 😀👩‍👩‍👧 and math ∑∫ x²½Ⅷ٣", "\u00a0nbsp\u2003em\u3000wide\u180eend",
    "snake_case CamelCase kebab-case", "1234567890 1,000,000 ⅷ", "<s>special</s> <s> twice<s><s>",
    "<|bos|>x<|eos|> y", "▁already ▁▁ marked▁", "a\u0000b", "don't'll've '' 'S 'ſ",
    "x" * 100, "the " * 30, "aaaa bbbb " * 12, "\ufeffbom", "wordTOKword TOK word TOK", "  <strip>  both",
    "[sep][sep] [sep]", "zażółć gęślą jaźń", "…", "   \n\n\t  \n", "a.b.c--d", "ﬁ ligature № Å",
]

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(use_regex, prefix=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def sequence(key, *items):
    return {"type": "Sequence", key: list(items)}


def template(before, after=()):
    tokens = [*before, *after]
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t, _ in before]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": t, "type_id": 0}} for t, _ in after]
    return {"type": "TemplateProcessing", "single": single,
            "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens}}


def added(token, index, **flags):
    base = {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}
    return {**base, **flags}


def trained(pre_tokenizer, size, specials, alphabet=(), **model):
    """The model of a BPE tokenizer trained on CORPUS."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=list(alphabet))
    tok.train_from_iterator([CORPUS], trainer)
    return {**json.loads(tok.to_str())["model"], **model}


def byte_model(pattern, size=420, **options):
    pre = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return trained(pre, size, ["<|bos|>", "<|eos|>"], pre_tokenizers.ByteLevel.alphabet(), **options)


def piece_model(size=520, **options):
    """SentencePiece style: specials, 256 byte tokens, then characters and merges."""
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    pre = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return trained(pre, size, ["<unk>", "<s>", "</s>", *fallback], unk_token="<unk>", fuse_unk=True,
                   byte_fallback=True, **options)


def document(model, pre_tokenizer=None, normalizer=None, post_processor=None, decoder=None, tokens=()):
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(tokens),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": decoder, "model": model}


BOS_EOS = [added("<|bos|>", 0), added("<|eos|>", 1)]
PIECE_TOKENS = [added("<unk>", 0), added("<s>", 1), added("</s>", 2)]
LEGACY_DECODER = sequence("decoders", {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                          {"type": "ByteFallback"}, {"type": "Fuse"},
                          {"type": "Strip", "content": " ", "start": 1, "stop": 0})
LEGACY_NORMALIZER = sequence("normalizers", {"type": "Prepend", "prepend": "▁"},
                             {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})


def metaspace(scheme, split_pieces):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split_pieces}


def old_style(model):
    """Merges as strings, as files of 2023 have them."""
    return {**model, "merges": [" ".join(pair) for pair in model["merges"]]}


def cut_vocab(model, unwanted):
    """Without tokens that contain a character of `unwanted`, and without their merges."""
    bad = lambda token: any(c in token for c in unwanted)
    vocab = {t: i for t, i in model["vocab"].items() if not bad(t)}
    merges = [m for m in model["merges"] if not bad("".join(m))]
    return {**model, "vocab": vocab, "merges": merges}


def whole_words(model):
    """Tokens that no merge reaches, found only with ignore_merges."""
    vocab = dict(model["vocab"])
    for token in ["Ġquicker", "zażółć", "ĠSACKS", "12", "Hello"]:
        mapped = "".join(c if ord(c) < 0x100 or c == "Ġ" else "?" for c in token)
        vocab.setdefault(mapped, len(vocab))
    return {**model, "vocab": vocab}


def fixtures():
    llama3 = sequence("pretokenizers", split(LLAMA3), byte_level(False))
    qwen = sequence("pretokenizers", split(QWEN), byte_level(False))
    smollm = sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, byte_level(True))
    bos = template([("<|bos|>", 0)])
    yield "llama3", document(byte_model(LLAMA3), llama3, None,
                             sequence("processors", byte_level(True), bos), byte_level(True), BOS_EOS)
    yield "qwen", document(byte_model(QWEN), qwen, {"type": "NFC"}, byte_level(False), byte_level(False),
                           BOS_EOS)
    yield "smollm", document(old_style(byte_model(QWEN, 380)), smollm, None, None,
                             byte_level(True, prefix=True), BOS_EOS)
    yield "llama2_legacy", document(piece_model(), None, LEGACY_NORMALIZER, template([("<s>", 1)]),
                                    LEGACY_DECODER, PIECE_TOKENS)
    yield "metaspace_first", document(piece_model(), metaspace("first", False), None,
                                      template([("<s>", 1)], [("</s>", 2)]), LEGACY_DECODER, PIECE_TOKENS)
    yield "metaspace_split", document(piece_model(480), metaspace("always", True), None, None,
                                      metaspace("always", True), PIECE_TOKENS)
    yield "added_tokens", document(
        byte_model(LLAMA3), sequence("pretokenizers", split(LLAMA3), byte_level(False, prefix=True)),
        {"type": "NFKC"}, bos, byte_level(True),
        [*BOS_EOS, added("TOK", 420, single_word=True, special=False),
         added("<strip>", 421, lstrip=True, rstrip=True), added("[sep]", 422, lstrip=True, special=False),
         added("[sep][sep]", 423, special=False), added("fi lig", 424, normalized=True, special=False),
         added("caf\u00e9", 425, normalized=True, special=False)])
    yield "ignore_merges", document(whole_words(byte_model(LLAMA3, ignore_merges=True)), llama3, None, bos,
                                    byte_level(True), BOS_EOS)
    yield "unknown", document({**cut_vocab(piece_model(), "ü你é12"), "byte_fallback": False}, metaspace("never", True),
                              None, None, None, PIECE_TOKENS)
    yield "split_behaviors", document(
        byte_model(LLAMA3),
        sequence("pretokenizers", split(r"[\r\n]+", "Removed"), split(r"-", "MergedWithPrevious"),
                 split(r"\.", "MergedWithNext"), split(r"[\p{L}\p{M}]+|\s", "Isolated", invert=True),
                 {"type": "Digits", "individual_digits": False}, byte_level(False)),
        {"type": "Replace", "pattern": {"Regex": r"\s{2,}"}, "content": " "}, None, byte_level(True), BOS_EOS)


def case(tok, text):
    with_special = tok.encode(text).ids
    return {"text": text, "ids": tok.encode(text, add_special_tokens=False).ids,
            "ids_with_special": with_special, "decoded": tok.decode(with_special, skip_special_tokens=False),
            "decoded_without_special": tok.decode(with_special, skip_special_tokens=True)}


def main():
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    for name, doc in fixtures():
        tok = Tokenizer.from_str(json.dumps(doc))
        fixture = {"tokenizer": doc, "cases": [case(tok, text) for text in TEXTS]}
        text = json.dumps(fixture, ensure_ascii=False, separators=(",", ":"))
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
