"""The peers' side of `make bench`: each function does what one doppel stage does, with the usual Python library.

Prints one JSON line per measurement: {"name", "rate", "unit"}. Run through infra/bench.sh, which installs the peers by
pinned version into the cache and runs doppel on the same data in turn.
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def first_turns(path, count):
    """First human turns of ShareGPT; the file's JSON array is cut off, so whole conversations are read one by one."""
    decoder, text = json.JSONDecoder(), open(path, encoding="utf-8").read()
    at, turns = text.index("{"), []
    while len(turns) < count:
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        at = text.find("{", at)
        conversation = record.get("conversations") or [{}]
        if conversation[0].get("from") == "human" and conversation[0]["value"].strip():
            turns.append(conversation[0]["value"])
        if at < 0:
            break
    return turns


def report(name, amount, seconds, unit):
    print(json.dumps({"name": name, "rate": amount / seconds, "unit": unit}), flush=True)


def load_decoder(folder, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=kind), tokenizer


def train(args):
    """DP-LoRA with Opacus and PEFT: r = 8 on q, k, v, o, micro-batches of 8, cut at `length` tokens."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_decoder(args.model, args.dtype)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = GradSampleModule(get_peft_model(model, lora))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.AdamW(trained, lr=1e-3), noise_multiplier=0.5, max_grad_norm=0.5, expected_batch_size=args.count
    )
    texts = first_turns(args.data, args.count + 8)
    encoded = [tokenizer(t)["input_ids"][: args.length] for t in texts]
    pad = tokenizer.eos_token_id

    def micro_batch(rows):
        width = max(map(len, rows))
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in rows])
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        (losses.sum(1) / args.length).mean().backward()

    def step(rows):
        # Each micro-batch but the last accumulates: the noise comes once for the logical batch.
        rows = sorted(rows, key=len)
        for start in range(0, len(rows), args.batch):
            optimizer.signal_skip_step(do_skip=start + args.batch < len(rows))
            micro_batch(rows[start : start + args.batch])
            optimizer.step()
            optimizer.zero_grad()

    step(encoded[: args.batch])
    begun = time.perf_counter()
    step(encoded[8 : 8 + args.count])
    report("train", args.count, time.perf_counter() - begun, "examples/s")


def sample(args):
    """Sampling with transformers.generate, top-p 0.95."""
    import torch

    model, tokenizer = load_decoder(args.model, args.dtype)
    model.eval()
    prompt = tokenizer("<|im_start|>user\n", return_tensors="pt")["input_ids"].repeat(args.batch, 1)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens, begun = 0, time.perf_counter()
    with torch.inference_mode():
        for _ in range(max(1, args.count // args.batch)):
            out = model.generate(
                prompt, do_sample=True, top_p=0.95, top_k=0, max_new_tokens=96, eos_token_id=end, pad_token_id=end
            )
            tokens += int((out[:, prompt.shape[1] :] != end).sum())
    report("sample", tokens, time.perf_counter() - begun, "tokens/s")


def embed(args):
    """Embedding with sentence-transformers, batches of 32."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.encoder, device="cpu")
    if args.dtype == "bf16":
        model = model.to(torch.bfloat16)
    texts = first_turns(args.data, args.count)
    model.encode(texts[:32], batch_size=32)
    begun = time.perf_counter()
    model.encode(texts, batch_size=32)
    report("embed", len(texts), time.perf_counter() - begun, "texts/s")


def cluster(args):
    """k-means with faiss on random vectors: 20 iterations, no subsampling."""
    import faiss
    import numpy

    rows = numpy.random.default_rng(0).standard_normal((args.count, args.dimension), dtype=numpy.float32)
    kmeans = faiss.Kmeans(args.dimension, args.clusters, niter=20, max_points_per_centroid=args.count, seed=1)
    begun = time.perf_counter()
    kmeans.train(rows)
    report("cluster", 20 * args.count, time.perf_counter() - begun, "rows/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["train", "sample", "embed", "cluster"])
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--encoder")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    args = parser.parse_args()
    {"train": train, "sample": sample, "embed": embed, "cluster": cluster}[args.work](args)


if __name__ == "__main__":
    main()
