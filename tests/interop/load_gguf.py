"""Loads a GGUF file with llama.cpp (through xllamacpp) or transformers and compares log-probabilities.

transformers reads it with the package gguf and computes with the dequantized weights. llama.cpp gives the probabilities of the token after a prompt, so every position is a prompt of its own:
use few tokens. It rounds activations to 8 bits, so the bounds are wider than for other readers.
"""

import glob
import os
from importlib.metadata import version

import compare
import numpy as np
from safetensors.numpy import load_file, save_file


def open_server(path, context):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    return xllamacpp.Server(parameters)


def log_probabilities(server, prompt, vocabulary):
    """Those of the token after `prompt`, before anything that sampling does to them."""
    for seed in range(100):
        result = server.handle_completions({
            "prompt": prompt, "max_tokens": 1, "temperature": 2.0, "seed": seed, "ignore_eos": True,
            "logprobs": vocabulary, "n_probs": vocabulary,
        })
        if "choices" not in result:
            raise SystemExit(f"error: llama.cpp answered {result}")
        # None where the token drawn is no whole character: draw another.
        if result["choices"][0]["logprobs"] is not None:
            break
    row = np.full(vocabulary, -np.inf, np.float32)
    for entry in result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    if not np.isfinite(row).all():
        raise SystemExit("error: llama.cpp left out tokens")
    return row


def run_llama_cpp(arguments, path, vocabulary):
    tokens = compare.read_tokens(arguments.tokens)[0].tolist()
    server = open_server(path, len(tokens) + 8)
    return np.stack([log_probabilities(server, tokens[: i + 1], vocabulary) for i in range(len(tokens))])


def run_transformers(arguments, path, vocabulary):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, file = os.path.split(path)
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    config.norm_topk_prob = True  # of experts: what llama.cpp's graph has built in, and no file says
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, config=config, dtype=torch.float32)
    return compare.run_model(model.eval(), compare.read_tokens(arguments.tokens), "cpu")[:, :vocabulary]


READERS = {"llama.cpp": (run_llama_cpp, "xllamacpp"), "transformers": (run_transformers, "transformers")}


def main():
    def more(parser):
        parser.set_defaults(max_kl=1e-2, min_top1=0.9)
        parser.add_argument("--reader", default="llama.cpp", choices=sorted(READERS))

    arguments = compare.parse_arguments(__doc__, more)
    path = arguments.checkpoint
    if os.path.isdir(path):
        path = glob.glob(os.path.join(path, "*.gguf"))[0]
    ours = load_file(arguments.logits)["logits"]
    run, package = READERS[arguments.reader]
    theirs = run(arguments, os.path.abspath(path), ours.shape[1]).astype(np.float64)
    # Log-probabilities on both sides, so that the errors are of like quantities.
    normalized = arguments.logits + ".logprobs.safetensors"
    save_file({"logits": compare.log_softmax(ours.astype(np.float64)).astype(np.float32)}, normalized)
    arguments.logits = normalized
    facts = {"target": "gguf", "reader": arguments.reader, "reader_version": f"{package} {version(package)}"}
    compare.finish(arguments, facts, compare.log_softmax(theirs).astype(np.float32))


if __name__ == "__main__":
    main()
