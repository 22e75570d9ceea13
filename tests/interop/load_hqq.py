"""Loads an hqq checkpoint with the hqq package and compares logits.

The model is built by transformers from config.json, and every linear that the file holds as hqq fields
becomes an HQQLinear fed from them: the way transformers 4 loads such a file, without its need for a GPU.
With --reader transformers, AutoModelForCausalLM.from_pretrained does it all.
"""

import glob
import os
from importlib.metadata import version

import compare


def load_with_hqq(arguments):
    import torch
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(arguments.checkpoint)
    del config.quantization_config
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {}
    for path in sorted(glob.glob(os.path.join(arguments.checkpoint, "*.safetensors"))):
        tensors.update(load_file(path))
    layers = sorted(name[: -len(".W_q")] for name in tensors if name.endswith(".W_q"))
    for name in layers:
        fields = {
            key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key.startswith(name + ".")
        }
        layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        missing = layer.state_dict_keys() - {"bias"} - fields.keys()
        if missing:
            raise SystemExit(f"error: {name} lacks {sorted(missing)}")
        layer.load_state_dict(fields)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [m for m in missing if m.rpartition(".")[0] not in layers]
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if unexpected or set(missing) - set(tied):
        raise SystemExit(f"error: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model, len(layers)


def load_with_transformers(arguments):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype), device_map=arguments.device
    )
    layers = sum(type(module).__name__ == "HQQLinear" for module in model.modules())
    return model, layers


def main():
    def more(parser):
        parser.add_argument("--reader", default="hqq", choices=["hqq", "transformers"])

    arguments = compare.parse_arguments(__doc__, more)
    load = load_with_hqq if arguments.reader == "hqq" else load_with_transformers
    model, layers = load(arguments)
    if layers == 0:
        raise SystemExit("error: no layer became an HQQLinear")
    model = model.to(arguments.device).eval()
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {"target": "hqq", "reader": arguments.reader, "reader_version": version(arguments.reader)}
    if arguments.reader == "transformers":
        facts["hqq_version"] = version("hqq")
    facts["packed_linears"] = layers
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
