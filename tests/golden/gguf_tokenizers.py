"""Writes small GGUF files without tensors, and ids of texts, for src/lm/src/tokenizer/tests.rs.

    python tests/golden/gguf_tokenizers.py

Needs transformers 5.23.0, tokenizers 0.23.3 and gguf 0.19.0. The vocabularies are trained here, on text without any
split, so that where a tokenizer splits decides the ids. Where the published tokenizer.json of a model family says more
than transformers reads from a GGUF file, it is set here: Llama 3 ignores merges for whole words that are tokens, Qwen2
normalises to NFC, Llama 2 puts a space before every text (Metaspace, which transformers takes, none before a space).
"""

import json
import random
from pathlib import Path

import gguf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

SAMPLES = [
    "Hello world, this is  a test.\n\nIt's 2024 and we've 1234567 things; don't I'LL do it!", "def f(x):\n    return x1 + 22  # ok",
    "caf\u00e9 na\u00efve \u4f60\u597d \u0434\u0430 \u0440\u0430\u0437 100% 3.14 ...", " leading and trailing  ", "a,b,c  d", "they're you'd she'll HE'S",
    "\U0001F600\U0001F680 !!! ?? -- ==", "tab\tand\r\nnewline", "e\u0301 A\u030a \u212b",
]
TEXTS = SAMPLES + ["", " ", "x", "  x", "Hello", " Hello", "12 345 6789", "\u0663\u0664", "unseen \u0be7 \u20ac text", "\n\n\n", "It'S  I'm"]


def text_of(seed):
    source = random.Random(seed)
    return " ".join(source.choice(SAMPLES) for _ in range(30))


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Pieces of seven characters: longer merges would leave nothing to split.
    pieces = [text_of(seed)[at : at + 7] for seed in range(40) for at in range(0, 900, 7)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|start|>"])
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def sentencepiece():
    """Scores fall with a token's rank, as in Llama 2's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=400)
    tokenizer.train_from_iterator(SAMPLES * 20, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    pieces = [piece for piece in pieces if len(piece) <= 6]
    # As in sentencepiece: what merges earlier scores higher; single characters come last.
    ranked = sorted(pieces, key=lambda piece: len(piece) == 1)
    head = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = head + ranked
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(ranked))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(ranked)
    return tokens, scores, types


def write(path, kind, pre, tokens, types, merges=None, scores=None, bos=None, eos=None):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main():
    out = Path(__file__).parents[2] / "src/lm/src/tokenizer/golden"
    out.mkdir(exist_ok=True)
    golden = {}
    tokens, merges = byte_level()
    types = [3, 3] + [1] * (len(tokens) - 2)
    for name, pre in [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2", "qwen2")]:
        write(out / f"{name}.gguf", "gpt2", pre, tokens, types, merges=merges, bos=1, eos=0)
        tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=f"{name}.gguf")
        if name == "llama3":
            tokenizer.backend_tokenizer.model.ignore_merges = True
        if name == "qwen2":
            tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        golden[name] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    tokens, scores, types = sentencepiece()
    write(out / "llama2.gguf", "llama", None, tokens, types, scores=scores, bos=1, eos=2)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="llama2.gguf")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    golden["llama2"] = [tokenizer(text)["input_ids"] for text in TEXTS]
    (out / "gguf.json").write_text(json.dumps({"texts": TEXTS, "ids": golden}, separators=(",", ":")) + "\n")
    print({name: sum(map(len, ids)) for name, ids in golden.items()})


if __name__ == "__main__":
    main()
