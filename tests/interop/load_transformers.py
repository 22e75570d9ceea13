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


def run_disturbed(model, tokens, arguments):
    """Logits with the input of every linear disturbed at random, by one part in 1 / --disturb."""
    import torch

    random = torch.Generator(arguments.device).manual_seed(1)

    def disturb(_, inputs):
        noise = torch.randn(inputs[0].shape, generator=random, device=inputs[0].device)
        return (inputs[0] * (1 + arguments.disturb * noise), *inputs[1:])

    handles = [
        module.register_forward_pre_hook(disturb) for name, module in model.named_modules() if name.endswith("_proj")
    ]
    logits = compare.run_model(model, tokens, arguments.device)
    for handle in handles:
        handle.remove()
    return logits


def bound_by_disturbance(arguments, model, tokens, theirs):
    """What the reader's own logits change by tightens the bounds; of agreements, two standard errors less."""
    own = compare.compare_logits(theirs, run_disturbed(model, tokens, arguments))
    agreement = own["top1_agreement"]
    arguments.max_kl = min(arguments.max_kl, own["kl_mean"])
    allowed = agreement - 2 * (agreement * (1 - agreement) / own["tokens"]) ** 0.5
    arguments.min_top1 = max(arguments.min_top1, allowed)
    return {"kl_of_disturbed": own["kl_mean"], "top1_of_disturbed": agreement}


def main():
    arguments = compare.parse_arguments(
        __doc__,
        lambda parser: parser.add_argument(
            "--disturb", type=float, help="bounds are at most what this disturbance changes in the reader, e.g. 1e-7"
        ),
    )
    import torch

    with open(os.path.join(arguments.checkpoint, "config.json"), encoding="utf-8") as file:
        settings = json.load(file).get("quantization_config", {})
    method = settings.get("quant_method")
    if method not in READERS:
        raise SystemExit(f"error: {arguments.checkpoint} has quant_method {method}")
    model, options = load(arguments, method, getattr(torch, arguments.dtype))
    tokens = compare.read_tokens(arguments.tokens)
    theirs = compare.run_model(model.eval(), tokens, arguments.device)
    if arguments.disturb is not None:
        options |= bound_by_disturbance(arguments, model, tokens, theirs)
    facts = {
        "target": settings.get("checkpoint_format", method or "dense"),
        "reader": f"transformers, {READERS[method]}",
        "reader_version": f"{version('transformers')}, {version(READERS[method])}",
        **options,
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
