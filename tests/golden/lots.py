"""Prints what drawing small probabilities by lot (src/lm/src/kernels/cross_entropy.rs) does to gradients in bf16.

    python tests/golden/lots.py MODEL TEXTS   # a folder with model.gguf, a JSON list of texts; torch 2.11, transformers 5

For each bound on what is small: how many tokens a row's gradient is made of, and how far an example's gradient with
respect to its embedded tokens is from that in float32; then the same of the sum of all examples' gradients of norm 1, as
clipping leaves them. Texts of many lengths, as they come, up to 128 tokens.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES, LENGTH = 96, 128
kept = []


class Drawn(torch.autograd.Function):
    """Summed cross-entropy of hidden states, [rows, width], through the vocabulary; `small` is None for all of it."""

    @staticmethod
    def forward(context, hidden, vocabulary, labels, small):
        probabilities = torch.softmax((hidden @ vocabulary.T).float(), -1)
        rows = torch.arange(len(labels))
        own = probabilities[rows, labels]
        probabilities[rows, labels] = 0
        others = probabilities.sum(-1, keepdim=True)
        if small is not None:
            bound = small * others
            counts = probabilities > torch.rand_like(probabilities) * bound
            probabilities = torch.where(counts, torch.maximum(probabilities, bound), 0.0)
            kept.append(counts.sum(-1).float() + 1)
        probabilities[rows, labels] = -others[:, 0]
        if small is None:
            probabilities = probabilities.to(hidden.dtype)
        context.save_for_backward((probabilities @ vocabulary.to(probabilities.dtype)).to(hidden.dtype))
        return -own.log().sum()

    @staticmethod
    def backward(context, gradient):
        return context.saved_tensors[0] * gradient, None, None, None


def gradients(model, encoded, small=None):
    """One row for each example."""
    found = []
    for tokens in encoded:
        embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
        hidden = model.model(inputs_embeds=embedded).last_hidden_state[0, :-1]
        loss = Drawn.apply(hidden, model.lm_head.weight, tokens[1:], small)
        found.append(torch.autograd.grad(loss, embedded)[0].flatten().float())
    return found


def main():
    folder, texts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    encoded = [torch.tensor(tokenizer(text)["input_ids"][:LENGTH]) for text in texts]
    encoded = [tokens for tokens in encoded if len(tokens) > 2][:EXAMPLES]
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=dtype).requires_grad_(False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    exact = gradients(wide, encoded)

    def total(found):
        whole = torch.zeros(LENGTH * wide.config.hidden_size)
        for gradient in found:
            whole[: len(gradient)] += gradient / gradient.norm()
        return whole

    for bits in (None, 13, 12, 11, 10, 9):
        kept.clear()
        found = gradients(narrow, encoded, None if bits is None else 2.0**-bits)
        off = torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, exact)])
        whole = ((total(found) - total(exact)).norm() / total(exact).norm()).item()
        tokens = torch.cat(kept).mean().item() if kept else wide.config.vocab_size
        name = "all of it" if bits is None else f"small: 2^-{bits}"
        print(f"{name}: {tokens:.0f} tokens a row, an example off by {off.mean():.2%}, their sum by {whole:.2%}")


if __name__ == "__main__":
    main()
