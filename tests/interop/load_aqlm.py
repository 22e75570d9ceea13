"""Loads an aqlm checkpoint with transformers and the aqlm package and compares logits.

On the CPU: aqlm's kernels there (numba) take indices of 8 bits and f32, --dtype float32 --device cpu.
"""

import os
from importlib.metadata import version

import compare

# The threads of aqlm 1.1.7's CPU kernel add to one vector without order (inference_kernels/
# numba_kernel.py), so that results are wrong with more than one.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")


def main():
    import torch
    from transformers import AutoModelForCausalLM

    arguments = compare.parse_arguments(__doc__)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype), device_map=arguments.device
    ).eval()
    layers = sum(type(module).__name__ == "QuantizedLinear" for module in model.modules())
    if layers == 0:
        raise SystemExit("error: no layer became a QuantizedLinear")
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {
        "target": "aqlm",
        "reader": "transformers",
        "reader_version": version("transformers"),
        "aqlm_version": version("aqlm"),
        "packed_linears": layers,
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
