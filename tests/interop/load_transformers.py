"""Loads a dense or compressed-tensors checkpoint with transformers and compares logits."""

import json
import os
from importlib.metadata import version

import compare

# Of each quant_method in config.json: the target, and the package that reads its weights.
READERS = {
    None: ("dense", "transformers"),
    "compressed-tensors": ("compressed-tensors", "compressed-tensors"),
}


def main():
    arguments = compare.parse_arguments(__doc__)
    import torch
    from transformers import AutoModelForCausalLM

    with open(os.path.join(arguments.checkpoint, "config.json"), encoding="utf-8") as file:
        method = json.load(file).get("quantization_config", {}).get("quant_method")
    if method not in READERS:
        raise SystemExit(f"error: {arguments.checkpoint} has quant_method {method}")
    target, reader = READERS[method]
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype)
    )
    model = model.to(arguments.device).eval()
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": target, "reader": reader, "reader_version": version(reader)}
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
