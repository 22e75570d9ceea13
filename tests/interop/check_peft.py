"""Loads an adapter with PEFT around its base checkpoint and compares logits.

The base is dense or a bitsandbytes checkpoint; quantmill's logits are those of
`quantmill eval BASE --adapter ADAPTER --tokens ... --logits ...`. With --dtype float32 a bitsandbytes
base computes in float32 whatever its file says, so that what is left is the rounding of sums.
"""

import json
import os
from importlib.metadata import version

import compare


def read_config(directory, name):
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        return json.load(file)


def compute_in_f32(model):
    import bitsandbytes
    import torch

    for linear in model.modules():
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            linear.compute_dtype = torch.float32
            linear.compute_type_is_set = True
            linear.weight.quant_state.dtype = torch.float32


def main():
    arguments = compare.parse_arguments(
        __doc__, lambda parser: parser.add_argument("--adapter", required=True, help="directory with adapter_config.json")
    )
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    method = read_config(arguments.checkpoint, "config.json").get("quantization_config", {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise SystemExit(f"error: {arguments.checkpoint} has quant_method {method}; use a dense or bitsandbytes base")
    where = {"device_map": arguments.device} if method else {}
    dtype = getattr(torch, arguments.dtype)
    base = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype, **where)
    if not method:
        base = base.to(arguments.device)
    elif dtype == torch.float32:
        compute_in_f32(base)
    tokens = compare.read_tokens(arguments.tokens)
    # The base is not run before PEFT wraps it: on processors with bf16 instructions bitsandbytes
    # rearranges its weights at the first run, and PEFT would spoil them.
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    theirs = compare.run_model(model, tokens, arguments.device)
    with model.disable_adapter():
        without = compare.run_model(model, tokens, arguments.device)
    adapter = read_config(arguments.adapter, "adapter_config.json")
    facts = {
        "target": "peft",
        "adapter": adapter["peft_type"],
        "base": method or "dense",
        "reader": "transformers, peft",
        "reader_version": f"{version('transformers')}, {version('peft')}",
        # An adapter that does nothing would agree without being read.
        "kl_of_adapter": compare.compare_logits(theirs, without)["kl_mean"],
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
