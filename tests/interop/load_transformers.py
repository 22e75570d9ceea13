"""Loads a dense, compressed-tensors or gptq checkpoint with transformers and compares logits."""

import json
import os
from importlib.metadata import version

import compare

# Of each quant_method in config.json: the package that reads its weights.
READERS = {
    None: "transformers",
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum",
}


def load(arguments, method, dtype):
    """The model, and how it was asked for where that is not the default."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

    def pretrained(**options):
        return AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype, **options)

    if method == "gptq":
        # The PyTorch kernels: every width and zero point, nothing compiled on the way. The rest of
        # the settings is the checkpoint's own.
        config = GPTQConfig(bits=4, backend="torch")
        return pretrained(device_map=arguments.device, quantization_config=config), {}
    try:
        return pretrained().to(arguments.device), {}
    except RuntimeError:
        if method != "compressed-tensors":
            raise
        # compressed-tensors 0.20 gives zero points of a model on the meta device, where
        # transformers 5.23 makes it, their unpacked shape, and refuses every packed checkpoint with
        # zero points (compressed_tensors/compressors/pack_quantized/base.py, compress).
        config = CompressedTensorsConfig(dequantize=True)
        return pretrained(quantization_config=config).to(arguments.device), {"dequantize": True}


def main():
    arguments = compare.parse_arguments(__doc__)
    import torch

    with open(os.path.join(arguments.checkpoint, "config.json"), encoding="utf-8") as file:
        settings = json.load(file).get("quantization_config", {})
    method = settings.get("quant_method")
    if method not in READERS:
        raise SystemExit(f"error: {arguments.checkpoint} has quant_method {method}")
    model, options = load(arguments, method, getattr(torch, arguments.dtype))
    theirs = compare.run_model(model.eval(), compare.read_tokens(arguments.tokens), arguments.device)
    facts = {
        "target": settings.get("checkpoint_format", method or "dense"),
        "reader": f"transformers, {READERS[method]}",
        "reader_version": f"{version('transformers')}, {version(READERS[method])}",
        **options,
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
