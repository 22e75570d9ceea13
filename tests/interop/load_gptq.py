"""Loads a gptq or gptq_v2 checkpoint with GPTQModel and compares logits with quantmill's."""

import json
import os
from importlib.metadata import version

import compare


def main():
    arguments = compare.parse_arguments(__doc__)
    import torch
    from gptqmodel import BACKEND, GPTQModel

    with open(os.path.join(arguments.checkpoint, "quantize_config.json"), encoding="utf-8") as file:
        target = json.load(file)["checkpoint_format"]
    # The reader's PyTorch kernels: every width and zero point, nothing compiled on the way. They load
    # in 16 bits alone; what is stored has no more.
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float16
    loaded = GPTQModel.load(
        arguments.checkpoint, device=arguments.device, dtype=dtype, backend=BACKEND.TORCH
    )
    model = loaded.model.eval().to(getattr(torch, arguments.dtype))
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": target, "reader": "gptqmodel", "reader_version": version("gptqmodel")}
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
