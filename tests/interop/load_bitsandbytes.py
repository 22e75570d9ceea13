"""Loads a bitsandbytes 4-bit checkpoint with transformers and bitsandbytes and compares logits.

The file says which dtype weights are dequantized to and products are computed in. With --dtype float32
both are set to float32 after loading, so that what is left is the rounding of sums; with the file's own
dtype they stay as they are.
"""

from importlib.metadata import version

import compare


def main():
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    arguments = compare.parse_arguments(__doc__)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=dtype, device_map=arguments.device
    ).eval()
    linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    if not linears:
        raise SystemExit("error: no layer became a Linear4bit")
    states = [linear.weight.quant_state for linear in linears]
    if any(state is None for state in states):
        raise SystemExit("error: a Linear4bit has no quant_state")
    if dtype == torch.float32:
        for linear in linears:
            linear.compute_dtype = dtype
            linear.compute_type_is_set = True
            linear.weight.quant_state.dtype = dtype
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {
        "target": "bitsandbytes",
        "reader": "transformers",
        "reader_version": version("transformers"),
        "bitsandbytes_version": version("bitsandbytes"),
        "torch_version": version("torch"),
        "packed_linears": len(linears),
        "quant_type": states[0].quant_type,
        "double_quant": bool(states[0].nested),
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
