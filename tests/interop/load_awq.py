"""Loads an awq checkpoint with GPTQModel, transformers or AutoAWQ, and compares logits with quantmill's.

transformers 5 reads such files through GPTQModel, on the CPU too; transformers 4 through AutoAWQ, which wants a
GPU. AutoAWQ by itself (0.2.9 is the last) needs transformers 4.51 or older, and computes in float16 whatever
--dtype says. With --dtype float32 GPTQModel's kernel still gives its weights in 16 bits.
"""

import sys

from importlib.metadata import PackageNotFoundError, version

import compare


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def load_with_gptqmodel(arguments, dtype):
    import torch
    from gptqmodel import BACKEND, GPTQModel

    # The reader's PyTorch kernel where this version has one for awq: nothing compiled on the way.
    backend = getattr(BACKEND, "TORCH_AWQ", BACKEND.AUTO)
    # It loads in 16 bits alone; what is stored has no more.
    loads = torch.float16 if dtype == torch.float32 else dtype
    loaded = GPTQModel.load(arguments.checkpoint, device=arguments.device, dtype=loads, backend=backend)
    return loaded.model.to(dtype)


def load_with_transformers(arguments, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=dtype, device_map=arguments.device
    )


def load_with_autoawq(arguments, dtype):
    import torch

    if arguments.device == "cpu":
        # Its reader takes Intel's extension on a CPU and Triton elsewhere; without both it has a path in plain
        # PyTorch, which is the one to test against.
        sys.modules["awq.modules.triton.gemm"] = None
    import awq.models.base
    from awq import AutoAWQForCausalLM

    if arguments.device == "cpu":
        awq.models.base.get_best_device = lambda: "any"
    loaded = AutoAWQForCausalLM.from_quantized(
        arguments.checkpoint,
        fuse_layers=False,
        torch_dtype=torch.float16,
        device_map={"": arguments.device},
    )
    return loaded.model


LOADERS = {
    "gptqmodel": load_with_gptqmodel,
    "transformers": load_with_transformers,
    "autoawq": load_with_autoawq,
}


def main():
    def more(parser):
        parser.add_argument("--reader", default="gptqmodel", choices=sorted(LOADERS))

    arguments = compare.parse_arguments(__doc__, more)
    import torch

    model = LOADERS[arguments.reader](arguments, getattr(torch, arguments.dtype)).eval()
    # Modules that hold packed weights, whatever the reader calls their class.
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    if packed == 0:
        raise SystemExit("error: no linear was loaded packed")
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": "awq", "reader": arguments.reader, "reader_version": version(arguments.reader)}
    if arguments.reader == "autoawq":
        arguments.dtype = "float16"
        facts["transformers_version"] = version("transformers")
    if arguments.reader == "transformers":
        facts.update({name + "_version": version_of(name) for name in ("gptqmodel", "autoawq")})
    facts["packed_linears"] = packed
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
