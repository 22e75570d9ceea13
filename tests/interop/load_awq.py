"""Loads an awq checkpoint with GPTQModel, or with transformers, and compares logits with quantmill's.

transformers 5 reads such files through GPTQModel, on the CPU too; transformers 4 through AutoAWQ, which wants a
GPU. With --dtype float32 GPTQModel's kernel still gives its weights in 16 bits.
"""

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


def main():
    def more(parser):
        parser.add_argument("--reader", default="gptqmodel", choices=["gptqmodel", "transformers"])

    arguments = compare.parse_arguments(__doc__, more)
    import torch

    load = load_with_gptqmodel if arguments.reader == "gptqmodel" else load_with_transformers
    model = load(arguments, getattr(torch, arguments.dtype)).eval()
    # Modules that hold packed weights, whatever the reader calls their class.
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    if packed == 0:
        raise SystemExit("error: no linear was loaded packed")
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": "awq", "reader": arguments.reader, "reader_version": version(arguments.reader)}
    if arguments.reader == "transformers":
        facts.update({name + "_version": version_of(name) for name in ("gptqmodel", "autoawq")})
    facts["packed_linears"] = packed
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
