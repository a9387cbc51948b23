"""Checks that the libraries people load our results with compute what we do, on real models and texts in float32.

    check_models.py --cache DOPPEL_CACHE --binaries TARGET/debug --folder SCRATCH

Trains an adapter on SmolLM2 for two steps of a few real texts, samples with it and embeds the samples, by the real stages.
Then peft and transformers load the adapter, and every logit must be ours within LOGITS; sentence-transformers embeds the
samples, and every component must be ours within EMBEDDINGS. `infra/check.sh models` builds, installs and calls this.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests/bench"))

import numpy
import torch
from peers import first_turns, load_model

# Largest absolute differences. Logits of SmolLM2 reach 30 and come out of thirty layers of float32 sums in another
# order; components of an embedding are at most 1.
LOGITS, EMBEDDINGS = 1e-3, 1e-5
# An adapter that moves no logit by this much would show nothing.
MOVED = 0.1
RUN, TOKENS = "check", 64


class Doppel:
    """The stages, on a lake in the scratch folder."""

    def __init__(self, args):
        self.args = args
        self.private, self.release = args.folder / "private", args.folder / "release"
        self.model = args.cache / "models/smollm2-135m-instruct"
        self.encoder = args.cache / "models/all-minilm-l6-v2"

    def run(self, binary, *arguments, data=None):
        command = [str(self.args.binaries / binary), *map(str, arguments)]
        ran = subprocess.run(command, input=data, capture_output=True, check=False)
        if ran.returncode:
            sys.exit(f"{' '.join(command)}: exit code {ran.returncode}\n{ran.stderr.decode()[-2000:]}")
        return ran.stdout

    def stage(self, name, roots, *arguments):
        flags = [f"--{root}={getattr(self, root)}" for root in roots]
        self.run(f"doppel-{name}", f"--run={RUN}", *flags, *arguments)

    def pipeline(self):
        """Texts and our embeddings of them; the adapter is left in the lake."""
        raw = self.args.folder / "conversations.json"
        turns = first_turns(self.args.cache / "data/sharegpt.json")[:300]
        record = lambda index, text: {"id": str(index), "conversations": [{"from": "human", "value": text}]}
        raw.write_text(json.dumps([record(*turn) for turn in enumerate(turns)]))
        self.run("doppel", "budget", "set", "--corpus=chats", "--delta=1e-5", "--epsilon=50", f"--private={self.private}")
        self.stage("partition", ["private"], "--corpus=chats", f"--input={raw}", "--language=any", "--dedup=exact")
        cpu = ["--dtype=f32", "--device=cpu"]
        self.stage(
            "train", ["private", "release"], "--corpus=chats", f"--model={self.model}", "--rank=8", "--targets=q,k,v,o",
            "--learning-rate=1e-2", "--steps=2", "--expected-batch-size=8", "--records=200", "--noise-multiplier=1",
            f"--block-length={TOKENS}", *cpu,
        )
        self.stage(
            "synthesize", ["release"], f"--model={self.model}", f"--adapter-run={RUN}", "--count=48",
            f"--max-new-tokens={TOKENS}", "--seed=5", *cpu,
        )
        self.stage("embed", ["release"], "--of=synthetic", f"--encoder={self.encoder}", *cpu)
        sql = "SELECT text, embedding FROM synthetic JOIN embeddings USING (id) ORDER BY id"
        rows = json.loads(self.run("doppel-query", f"--release={self.release}", f"--run={RUN}", "--output=json", sql))
        return [row["text"] for row in rows], numpy.array([row["embedding"] for row in rows], dtype=numpy.float32)

    def adapter(self):
        return self.release / f"runs/{RUN}/adapter"

    def logits(self, rows):
        """Our logits of rows of ids, each [length, vocabulary]."""
        out = self.run("examples/logits", self.model, self.adapter(), data=json.dumps(rows).encode())
        flat = torch.from_numpy(numpy.frombuffer(out, dtype="<f4").copy())
        return flat.reshape(sum(map(len, rows)), -1).split([len(row) for row in rows])


def differences_of_logits(doppel, texts):
    """(what the adapter moves, how far ours are from peft's), each the largest over all logits."""
    import peft

    model, tokenizer = load_model(doppel.model, torch.float32)
    rows = [ids for text in texts if (ids := tokenizer(text)["input_ids"][:TOKENS])]
    ours = doppel.logits(rows)
    with torch.inference_mode():
        base = [model(torch.tensor([row])).logits[0] for row in rows]
        adapted = peft.PeftModel.from_pretrained(model, doppel.adapter()).eval()
        # peft only warns of a tensor that is missing, or that has no place.
        state = peft.get_peft_model_state_dict(adapted)
        stored = peft.utils.save_and_load.load_peft_weights(doppel.adapter(), device="cpu")
        if state.keys() != stored.keys():
            sys.exit(f"peft: these tensors have no place, or none has theirs: {sorted(state.keys() ^ stored.keys())}")
        theirs = [adapted(torch.tensor([row])).logits[0] for row in rows]
    largest = lambda one, other: max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    return largest(theirs, base), largest(ours, theirs)


def difference_of_embeddings(doppel, texts, ours):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(doppel.encoder), device="cpu").encode(texts)
    return float(numpy.abs(ours - theirs).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["cache", "binaries", "folder"]:
        parser.add_argument(f"--{name}", type=Path, required=True)
    doppel = Doppel(parser.parse_args())
    texts, embeddings = doppel.pipeline()
    moved, logits = differences_of_logits(doppel, texts[:12])
    vectors = difference_of_embeddings(doppel, texts, embeddings)
    print(f"peft and transformers: logits within {logits:.2g} of ours (at most {LOGITS}); the adapter moves them by {moved:.2g}")
    print(f"sentence-transformers: embeddings of {len(texts)} texts within {vectors:.2g} of ours (at most {EMBEDDINGS})")
    if not (moved >= MOVED and logits <= LOGITS and vectors <= EMBEDDINGS):
        sys.exit("the libraries compute something else, or the adapter does too little to tell")


if __name__ == "__main__":
    main()
