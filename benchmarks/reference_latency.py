"""
One action after another of the published implementation, when asked for; `latency.py --reference` runs this.

    PYTHON_OF_THE_OLD_ENVIRONMENT benchmarks/reference_latency.py CHECKOUT CHECKPOINT THREADS

Reads a line from its input for each action, and writes the milliseconds that it took. It imports nothing of this
repository, and nothing but what the published code needs: transformers 4.40.1, timm 0.9 and torch 2.2. Nobody has run
it yet.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def main() -> None:
    checkout, checkpoint, threads = sys.argv[1:]
    sys.path.insert(0, checkout)
    torch.set_num_threads(int(threads))
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast

    folder = Path(checkpoint)
    model = OpenVLAForActionPrediction(OpenVLAConfig.from_pretrained(folder)).eval()
    weights = {}
    for part in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(str(part)))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith("inv_freq") for name in missing):
        raise SystemExit(f"The published model has other tensors: {missing[:3]} missing, {unexpected[:3]} unexpected.")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    processor = PrismaticProcessor(PrismaticImageProcessor.from_pretrained(folder), tokenizer)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    prompt = "In: What action should the robot take to pick up the red cube?\nOut:"
    key = next(iter(model.norm_stats))
    for _ in sys.stdin:
        start = time.perf_counter()
        model.predict_action(**processor(prompt, image), unnorm_key=key, do_sample=False)
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
