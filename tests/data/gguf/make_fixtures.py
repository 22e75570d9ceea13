#!/usr/bin/env python3
"""Writes blocks.gguf: blocks of every tensor type quantmill reads, and what the gguf package
(its version is in README.md) dequantizes them to.

Usage: make_fixtures.py    (needs numpy and gguf)
"""
import os

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

ROWS, COLUMNS = 2, 512
# Bytes of a block that hold f16 numbers: random ones there could be infinite.
HALVES = {T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}


def random_blocks(rng, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (ROWS * COLUMNS // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = rng.normal(0, 0.01, len(data)).astype(np.float16)
        data[:, at:at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return data.reshape(ROWS, -1)


def main():
    rng = np.random.default_rng(11)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "blocks.gguf")
    writer = gguf.GGUFWriter(path, "fixture")
    writer.add_array("fixture.i32", [1, -2, 3])
    writer.add_array("fixture.strings", ["", "a b", "\u00e9"])
    writer.add_float64("fixture.f64", 0.1)
    writer.add_bool("fixture.bool", True)
    for kind in (T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K):
        if kind in HALVES:
            data = random_blocks(rng, kind)
        else:
            values = rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
            values[0, :32] = 0  # a block of zeros
            values[1, 5] = 300  # an outlier
            data = gguf.quants.quantize(values, kind)
        expected = gguf.quants.dequantize(data, kind).astype(np.float32)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        writer.add_tensor(kind.name + ".expected", expected.reshape(ROWS, COLUMNS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
