"""Loads a dense (dequantized) checkpoint with transformers and compares logits with quantmill's."""

from importlib.metadata import version

import compare


def main():
    arguments = compare.parse_arguments(__doc__)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype)
    )
    model = model.to(arguments.device).eval()
    theirs = compare.run_model(model, compare.read_tokens(arguments.tokens), arguments.device)
    facts = {
        "target": "dense",
        "reader": "transformers",
        "reader_version": version("transformers"),
    }
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
