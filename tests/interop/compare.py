"""What the load_*.py scripts share: arguments, the comparison of logits, the result."""

import argparse
import json
import sys

import numpy as np
from safetensors.numpy import load_file


def parse_arguments(description, more=None):
    """The arguments all loaders have; more(parser) adds those of one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", help="directory that quantmill wrote")
    parser.add_argument("tokens", help="safetensors file with input_ids, int32 [1, T]")
    parser.add_argument("logits", help="quantmill's logits for them, f32 [T, vocabulary]")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--max-kl", type=float, default=1e-3)
    parser.add_argument("--min-top1", type=float, default=0.97)
    if more is not None:
        more(parser)
    return parser.parse_args()


def read_tokens(path):
    return load_file(path)["input_ids"].astype(np.int64)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare_logits(ours, theirs):
    """Both [T, vocabulary]; the arithmetic is done in f64."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"error: logits have shapes {ours.shape} and {theirs.shape}")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error = np.abs(theirs - ours)
    p, q = log_softmax(ours), log_softmax(theirs)
    return {
        "tokens": int(ours.shape[0]),
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "kl_mean": float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def run_model(model, tokens, device):
    """Logits [T, vocabulary] of a torch model as f32."""
    import torch

    with torch.inference_mode():
        ids = torch.from_numpy(tokens).to(device)
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()


def finish(arguments, facts, theirs):
    """Compares, prints and writes the result, and exits."""
    ours = load_file(arguments.logits)["logits"]
    result = {**facts, "device": arguments.device, "dtype": arguments.dtype}
    result.update(compare_logits(ours, theirs))
    result["passed"] = bool(
        result["kl_mean"] <= arguments.max_kl and result["top1_agreement"] >= arguments.min_top1
    )
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    sys.exit(0 if result["passed"] else 1)
