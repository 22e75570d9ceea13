"""Loads a gptq or gptq_v2 checkpoint and compares logits with quantmill's.

With GPTQMODEL_READER=transformers it goes through AutoModelForCausalLM (transformers, optimum and
GPTQModel together), else through GPTQModel itself.
"""

import json
import os
from importlib.metadata import version

import compare


def load_with_gptqmodel(arguments, dtype):
    from gptqmodel import BACKEND, GPTQModel

    # The reader's PyTorch kernels: every width and zero point, nothing compiled on the way.
    model = GPTQModel.load(
        arguments.checkpoint, device=arguments.device, dtype=dtype, backend=BACKEND.TORCH
    )
    return model.model


def load_with_transformers(arguments, dtype):
    from transformers import AutoModelForCausalLM, GPTQConfig

    with open(os.path.join(arguments.checkpoint, "quantize_config.json"), encoding="utf-8") as file:
        bits = json.load(file)["bits"]
    return AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint,
        dtype=dtype,
        device_map=arguments.device,
        quantization_config=GPTQConfig(bits=bits, backend="torch"),
    )


def main():
    arguments = compare.parse_arguments(__doc__)
    import torch

    with open(os.path.join(arguments.checkpoint, "quantize_config.json"), encoding="utf-8") as file:
        target = json.load(file)["checkpoint_format"]
    reader = os.environ.get("GPTQMODEL_READER", "gptqmodel")
    load = load_with_transformers if reader == "transformers" else load_with_gptqmodel
    model = load(arguments, getattr(torch, arguments.dtype)).eval()
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": target, "reader": reader, "reader_version": version(reader)}
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
