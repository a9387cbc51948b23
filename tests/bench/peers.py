"""The peers' side of `make bench`: each function does what one doppel stage does, with the usual Python library.

Prints one JSON line per measurement, with `rate` and `unit`. Run by compare.py, which runs doppel on the same data in turn.
Beside them stand `matmul`, the limit of the machine, and two that prepare: `texts` and `model`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def first_turns(path):
    """First human turns of ShareGPT; the file's JSON array is cut off, so whole conversations are read one by one."""
    decoder, text = json.JSONDecoder(), open(path, encoding="utf-8").read()
    at, turns = text.find("{"), []
    while at >= 0:
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        at = text.find("{", at)
        conversation = record.get("conversations") or [{}]
        if conversation[0].get("from") == "human" and conversation[0]["value"].strip():
            turns.append(conversation[0]["value"])
    return turns


def texts(args):
    """Writes all first turns to --texts, as one JSON array of strings."""
    Path(args.texts).write_text(json.dumps(first_turns(args.data)), encoding="utf-8")


# Llama's shapes: width, inner width, layers, heads.
SHAPES = {
    "tiny": (64, 128, 2, 4),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def model(args):
    """Writes a model of random weights in bf16 and of a shape of Llama's to --out, with the tokenizer of --model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads = SHAPES[args.shape]
    tokenizer = AutoTokenizer.from_pretrained(args.model, **gguf_file(args.model))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        weights = LlamaForCausalLM(config)
    weights.save_pretrained(args.out, max_shard_size="4GB")
    tokenizer.save_pretrained(args.out)


def report(amount, seconds, unit, **more):
    print(json.dumps({"rate": amount / seconds, "unit": unit, **more}), flush=True)


def numbers(args):
    import torch

    return getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[args.dtype])


def matmul(args):
    """The machine's matrix product, by libtorch: the best of some large shapes, in GFLOP/s."""
    import torch

    rates = []
    shapes = [(2048, 2048, 2048), (4096, 1024, 4096), (1024, 4096, 4096)]
    if args.device == "cuda":
        # Smaller ones are over before they fill it.
        shapes = [(8192, 8192, 8192), (8192, 4096, 16384)]
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=args.device).to(numbers(args))
        right = torch.randn(inner, columns, device=args.device).to(numbers(args))
        for _ in range(12):
            begun = time.perf_counter()
            product = left @ right
            product[0, 0].item()
            rates.append(2 * rows * inner * columns / (time.perf_counter() - begun) / 1e9)
    # On a shared machine the best says what it can do, and single ones say little.
    report(max(rates), 1, "GFLOP/s")


def gguf_file(folder):
    """How transformers is told that a folder holds a GGUF file, if it does."""
    return {"gguf_file": "model.gguf"} if Path(folder, "model.gguf").exists() else {}


def load_decoder(args):
    return load_model(args.model, numbers(args), args.device)


def load_model(folder, dtype, device="cpu"):
    """A decoder of a folder, which may hold a GGUF file, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = gguf_file(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf)
    return model.to(device), tokenizer


def load_texts(args):
    return json.loads(Path(args.texts).read_text(encoding="utf-8"))[: args.count]


def train(args):
    """DP-LoRA with Opacus and PEFT: r = 8 on q, k, v, o, micro-batches of --batch, cut at --length tokens."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_decoder(args)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = GradSampleModule(get_peft_model(model, lora))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.AdamW(trained, lr=1e-3), noise_multiplier=0.5, max_grad_norm=0.5, expected_batch_size=args.count
    )
    encoded = [tokenizer(text)["input_ids"][: args.length] for text in load_texts(args)]
    pad = tokenizer.eos_token_id

    def micro_batch(rows):
        width = max(map(len, rows))
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=args.device)
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in rows], device=args.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        # In rows: with the vocabulary in the middle libtorch copies all logits and takes two to three times as long.
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="none"
        )
        (losses.view(len(rows), -1).sum(1) / args.length).mean().backward()

    def step(rows):
        # Each micro-batch but the last accumulates: the noise comes once for the logical batch.
        rows = sorted(rows, key=len)
        for start in range(0, len(rows), args.batch):
            optimizer.signal_skip_step(do_skip=start + args.batch < len(rows))
            micro_batch(rows[start : start + args.batch])
            optimizer.step()
            optimizer.zero_grad()

    step(sorted(encoded, key=len)[-args.batch :])
    # A GPU may still be at work.
    next(iter(trained)).sum().item()
    begun = time.perf_counter()
    step(encoded)
    next(iter(trained)).sum().item()
    report(len(encoded), time.perf_counter() - begun, "examples/s")


def sample(args):
    """Sampling with transformers.generate, top-p 0.95."""
    import torch

    model, tokenizer = load_decoder(args)
    model.eval()
    prompt = tokenizer("<|im_start|>user\n", return_tensors="pt")["input_ids"].repeat(args.batch, 1).to(args.device)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampling = {"do_sample": True, "top_p": 0.95, "top_k": 0, "eos_token_id": end, "pad_token_id": end}
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=4, **sampling)
        tokens, begun = 0, time.perf_counter()
        for _ in range(max(1, args.count // args.batch)):
            out = model.generate(prompt, max_new_tokens=96, **sampling)
            tokens += int((out[:, prompt.shape[1] :] != end).sum())
    report(tokens, time.perf_counter() - begun, "tokens/s")


def decode(args):
    """Decoding with llama.cpp, --batch sequences at once; what is sampled is left out, which favours it."""
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(
        str(Path(args.model, "model.gguf")).encode(), llama_cpp.llama_model_default_params()
    )
    steps = 96
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = args.batch * 128, args.batch, args.batch
    params.n_threads = params.n_threads_batch = os.cpu_count()
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(args.batch, 0, 1)
    batch.n_tokens = args.batch
    for sequence in range(args.batch):
        batch.n_seq_id[sequence], batch.seq_id[sequence][0], batch.logits[sequence] = 1, sequence, 1

    def step(position):
        for sequence in range(args.batch):
            batch.token[sequence], batch.pos[sequence] = 1000 + (position * 31 + sequence) % 20000, position
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")

    step(0)
    begun = time.perf_counter()
    for position in range(1, steps):
        step(position)
    report(args.batch * (steps - 1), time.perf_counter() - begun, "tokens/s")


def embed(args):
    """Embedding with sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.model, device=args.device).to(numbers(args))
    texts = load_texts(args)
    model.encode(texts[:32], batch_size=args.batch)
    begun = time.perf_counter()
    model.encode(texts, batch_size=args.batch)
    report(len(texts), time.perf_counter() - begun, "texts/s")


def cluster(args):
    """k-means with faiss on random vectors: 20 iterations, no subsampling."""
    import numpy

    rows = numpy.random.default_rng(0).standard_normal((args.count, args.dimension), dtype=numpy.float32)
    begun = time.perf_counter()
    kmeans(args, rows)
    report(20 * args.count, time.perf_counter() - begun, "rows/s")


def kmeans(args, rows):
    import faiss

    kmeans = faiss.Kmeans(rows.shape[1], args.clusters, niter=20, max_points_per_centroid=len(rows), seed=1)
    kmeans.train(rows)
    return kmeans


def vote(args):
    """The vote with scikit-learn and faiss: 90 % of the variance, k-means, and every row to its nearest centroid."""
    import numpy
    from sklearn.decomposition import PCA

    rows = numpy.random.default_rng(0).standard_normal((args.count, args.dimension), dtype=numpy.float32)
    rows *= numpy.arange(1, args.dimension + 1, dtype=numpy.float32) ** -0.6
    begun = time.perf_counter()
    reduced = numpy.ascontiguousarray(PCA(0.9, svd_solver="covariance_eigh", copy=False).fit_transform(rows))
    nearest = kmeans(args, reduced).index.search(reduced, 1)[1]
    votes = numpy.bincount(nearest[:, 0], minlength=args.clusters)
    assert votes.sum() == len(rows)
    report(args.count, time.perf_counter() - begun, "rows/s", columns=reduced.shape[1])


def dedup(args):
    """Deduplication as in the paper's code: NLTK's words, and sets of texts and of 10-grams."""
    from nltk import ngrams
    from nltk.tokenize import NLTKWordTokenizer

    texts, words = load_texts(args), NLTKWordTokenizer()
    # Forgets the peak of reading the texts.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    begun = time.perf_counter()
    seen, exact, kept = set(), set(), 0
    for text in texts:
        if text in exact:
            continue
        exact.add(text)
        grams = set(ngrams(words.tokenize(text), 10))
        if seen.isdisjoint(grams):
            seen |= grams
            kept += 1
    seconds = time.perf_counter() - begun
    size = sum(len(text.encode()) for text in texts) / 1e6
    report(size, seconds, "MB/s", kept=kept, held=peak() - before)


def peak():
    """The most memory that this process held, in MB."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def account(args):
    """ε by PLD with dp_accounting: the event, δ and discretisation of src/privacy/benches/account.rs."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(4096 / 180_000, dp_accounting.GaussianDpEvent(1.1220)), 439
    )
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        epsilon = PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(5e-7)
        seconds.append(time.perf_counter() - begun)
    report(1, statistics.median(seconds), "answers/s", epsilon=float(epsilon))


WORKS = {
    work.__name__: work
    for work in [texts, model, matmul, train, sample, decode, embed, cluster, vote, dedup, account]
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--data", help="ShareGPT's file")
    parser.add_argument("--texts", help="JSON array of strings")
    parser.add_argument("--model")
    parser.add_argument("--out")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--count", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    args = parser.parse_args()
    WORKS[args.work](args)


if __name__ == "__main__":
    main()
