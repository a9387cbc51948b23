"""Writes src/lm/src/gguf/golden.json: blocks of each storage type and their values by gguf-py 0.19.0.

    python tests/golden/gguf_blocks.py
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144, "Q6_K": 210}
# Where a block holds f16 factors: random bytes there could be NaN.
FACTORS = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}


def main():
    source = np.random.default_rng(7)
    cases = []
    for name, size in SIZES.items():
        if name in ("F32", "F16"):
            raw = source.normal(size=8).astype({"F32": np.float32, "F16": np.float16}[name]).view(np.uint8)
        elif name == "BF16":
            raw = (source.normal(size=8).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            blocks = source.integers(0, 256, size=(2, size), dtype=np.uint8)
            for at in FACTORS[name]:
                blocks[:, at : at + 2] = source.normal(size=(2, 1)).astype(np.float16).view(np.uint8)
            raw = blocks.reshape(-1)
        kind = GGMLQuantizationType[name]
        values = np.ascontiguousarray(dequantize(raw.reshape(1, -1), kind), dtype=np.float32)
        cases.append({"type": int(kind), "blocks": raw.tobytes().hex(), "values": values.tobytes().hex()})
    out = Path(__file__).parents[2] / "src/lm/src/gguf/golden.json"
    out.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
