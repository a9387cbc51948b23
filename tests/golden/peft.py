"""Writes the logits of a model with a LoRA adapter, by peft, for src/lm/src/decoder/tests.rs.

Run in an environment with peft, transformers and torch, on an adapter folder that doppel wrote:

    python tests/golden/peft.py src/lm/tests/golden/llama3 src/lm/tests/golden/llama3-adapter

The ids are those of the model's own golden.json; the result is the adapter folder's golden.json. Prints the versions, how
far the adapter moves the logits, and how far they are from those that an earlier run wrote.
"""

import json
import sys
from pathlib import Path

# This file's own folder comes first there, and `import peft` would find this file.
sys.path.pop(0)

import peft
import torch
import transformers


def rounded(tensor):
    return [float(f"{value:.8g}") for value in tensor.flatten().tolist()]


def main(model_folder, adapter_folder):
    ids = torch.tensor(json.loads((model_folder / "golden.json").read_text())["ids"])
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        base = model(ids).logits
        # peft only warns of a tensor that is missing, or that has no place.
        adapted = peft.PeftModel.from_pretrained(model, adapter_folder).eval()
        state = peft.get_peft_model_state_dict(adapted)
        stored = peft.utils.save_and_load.load_peft_weights(adapter_folder, device="cpu")
        assert state.keys() == stored.keys(), sorted(state.keys() ^ stored.keys())
        assert all(torch.equal(state[name], stored[name]) for name in stored)
        logits = adapted(ids).logits
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"the adapter moves logits by at most {(logits - base).abs().max():.3g}")
    golden = adapter_folder / "golden.json"
    if golden.is_file():
        earlier = torch.tensor(json.loads(golden.read_text())["logits"]).reshape(logits.shape)
        print(f"largest difference to the earlier golden values: {(logits - earlier).abs().max():.3g}")
    golden.write_text(json.dumps({"ids": ids.tolist(), "logits": rounded(logits)}, separators=(",", ":")) + "\n")


main(Path(sys.argv[1]), Path(sys.argv[2]))
