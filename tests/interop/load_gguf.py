"""Loads a GGUF file with llama.cpp (through xllamacpp) and compares log-probabilities.

llama.cpp gives the probabilities of the token after a prompt, so every position is a prompt of its own:
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
    result = server.handle_completions(
        {"prompt": prompt, "max_tokens": 1, "temperature": 1.0, "logprobs": vocabulary, "n_probs": vocabulary}
    )
    row = np.full(vocabulary, -np.inf, np.float32)
    for entry in result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    if not np.isfinite(row).all():
        raise SystemExit("error: llama.cpp left out tokens")
    return row


def main():
    def wider(parser):
        parser.set_defaults(max_kl=1e-2, min_top1=0.9)

    arguments = compare.parse_arguments(__doc__, wider)
    path = arguments.checkpoint
    if os.path.isdir(path):
        path = glob.glob(os.path.join(path, "*.gguf"))[0]
    tokens = compare.read_tokens(arguments.tokens)[0].tolist()
    ours = load_file(arguments.logits)["logits"]
    server = open_server(path, len(tokens) + 8)
    rows = [log_probabilities(server, tokens[: i + 1], ours.shape[1]) for i in range(len(tokens))]
    theirs = np.stack(rows)
    # Log-probabilities on both sides, so that the errors are of like quantities.
    normalized = arguments.logits + ".logprobs.safetensors"
    save_file({"logits": compare.log_softmax(ours.astype(np.float64)).astype(np.float32)}, normalized)
    arguments.logits = normalized
    facts = {"target": "gguf", "reader": "llama.cpp", "reader_version": "xllamacpp " + version("xllamacpp")}
    compare.finish(arguments, facts, theirs)


if __name__ == "__main__":
    main()
