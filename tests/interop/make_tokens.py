"""Writes pseudo-random token ids as `input_ids`, int32 [1, length]."""

import argparse

import numpy as np
from safetensors.numpy import save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--vocab", type=int, required=True, help="ids are below this")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    ids = generator.integers(0, arguments.vocab, size=(1, arguments.length), dtype=np.int32)
    save_file({"input_ids": ids}, arguments.output)


if __name__ == "__main__":
    main()
