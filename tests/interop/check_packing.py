"""Decodes the packed linears of two exports of one run with NumPy and compares the weights.

The layouts are decoded from their descriptions, field by field, sharing nothing with quantmill.
Reads gptq, gptq_v2, awq, compressed-tensors (pack-quantized) and quantmill (affine-int) directories.
"""

import argparse
import json
import os
import re
import sys

import numpy as np
from safetensors import safe_open


class Checkpoint:
    """Tensors of a directory by name; bf16 comes out as f32."""

    def __init__(self, directory):
        self.directory = directory
        self.files = {}
        for name in sorted(os.listdir(directory)):
            if name.endswith(".safetensors"):
                path = os.path.join(directory, name)
                with safe_open(path, framework="numpy") as file:
                    self.files.update({key: path for key in file.keys()})
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)["quantization_config"]

    def get(self, name):
        path = self.files[name]
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            data = file.read(end - begin)
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(entry["shape"])
        kinds = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64,
                 "U8": np.uint8, "I8": np.int8}
        return np.frombuffer(data, kinds[entry["dtype"]]).reshape(entry["shape"])

    def layers(self):
        suffix = {"gptq": ".qweight", "awq": ".qweight", "compressed-tensors": ".weight_packed",
                  "quantmill": ".codes"}
        end = suffix[self.config["quant_method"]]
        return sorted(name[: -len(end)] for name in self.files if name.endswith(end))


def unpack_rows(words, bits, count):
    """[rows, words] of little-endian bit streams -> [rows, count] fields."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    fields = stream.reshape(words.shape[0], count, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(axis=2)


def weight(codes, scale, zero, group):
    """codes [out, in]; scale, zero [out, groups]; group [in]."""
    return scale.astype(np.float64)[:, group] * (codes - zero[:, group])


def gptq_setting(config, layer):
    setting = dict(config)
    for key, value in config.get("dynamic", {}).items():
        pattern = key[2:] if key[:2] in ("+:", "-:") else key
        if re.match(pattern, layer):
            setting.update(value)
            break
    return setting


def decode_gptq(checkpoint, layer):
    setting = gptq_setting(checkpoint.config, layer)
    bits = setting["bits"]
    qweight = checkpoint.get(layer + ".qweight")
    scales = checkpoint.get(layer + ".scales").T
    g_idx = checkpoint.get(layer + ".g_idx")
    codes = unpack_rows(qweight.T, bits, g_idx.size)
    zeros = unpack_rows(checkpoint.get(layer + ".qzeros"), bits, scales.shape[0]).T
    if setting["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) % 2**bits
    return weight(codes, scales, zeros, g_idx)


def unpack_awq(words):
    """[rows, words] -> [rows, 8 words]: output 8 c + j is the nibble number [0, 4, 1, 5, 2, 6, 3, 7][j] of word c."""
    nibbles = (words.astype(np.int64)[:, :, None] >> (4 * np.array([0, 4, 1, 5, 2, 6, 3, 7]))) & 15
    return nibbles.reshape(words.shape[0], -1)


def decode_awq(checkpoint, layer):
    codes = unpack_awq(checkpoint.get(layer + ".qweight")).T
    zeros = unpack_awq(checkpoint.get(layer + ".qzeros")).T
    scales = checkpoint.get(layer + ".scales").T
    group = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return weight(codes, scales, zeros, group)


def decode_compressed(checkpoint, layer):
    groups = checkpoint.config["config_groups"].values()
    scheme = next((g for g in groups if layer in g["targets"]), None)
    scheme = scheme or next(g for g in groups if "Linear" in g["targets"])
    bits = scheme["weights"]["num_bits"]
    out, into = checkpoint.get(layer + ".weight_shape")
    # Offset binary: the signed values plus 2^(bits - 1); so are the zero points.
    codes = unpack_rows(checkpoint.get(layer + ".weight_packed"), bits, into) - 2 ** (bits - 1)
    scale = checkpoint.get(layer + ".weight_scale")
    zeros = np.zeros(scale.shape, np.int64)
    if not scheme["weights"]["symmetric"]:
        packed = checkpoint.get(layer + ".weight_zero_point")
        zeros = unpack_rows(packed.T, bits, out).T - 2 ** (bits - 1)
    group = np.arange(into) // (into // scale.shape[1])
    if layer + ".weight_g_idx" in checkpoint.files:
        group = checkpoint.get(layer + ".weight_g_idx")
    return weight(codes, scale, zeros, group)


def decode_native(checkpoint, layer):
    slot = checkpoint.config["slots"][layer]
    if slot["format"] != "qm.fmt.affine-int/1":
        raise SystemExit(f"error: {layer} has format {slot['format']}; only affine-int is decoded")
    bits = slot["parameters"]["bits"]
    scale = checkpoint.get(layer + ".scale")
    words = checkpoint.get(layer + ".codes")
    group_size = slot["parameters"]["group_size"]
    into = words.shape[1] * 32 // bits if group_size == -1 else scale.shape[1] * group_size
    zero = np.full(scale.shape, 2 ** (bits - 1), np.float64)
    if slot["parameters"]["zero"] != "none":
        zero = checkpoint.get(layer + ".zero").astype(np.float64)
    group = np.arange(into) // (into // scale.shape[1])
    if layer + ".group_index" in checkpoint.files:
        group = checkpoint.get(layer + ".group_index")
    return weight(unpack_rows(words, bits, into), scale, zero, group)


DECODERS = {
    "gptq": decode_gptq, "awq": decode_awq, "compressed-tensors": decode_compressed,
    "quantmill": decode_native,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    first, second = Checkpoint(arguments.first), Checkpoint(arguments.second)
    if first.layers() != second.layers():
        sys.exit("error: the directories do not hold the same packed layers")
    different = []
    for layer in first.layers():
        a = DECODERS[first.config["quant_method"]](first, layer)
        b = DECODERS[second.config["quant_method"]](second, layer)
        if a.shape != b.shape or not np.array_equal(a, b):
            different.append(layer)
    result = {"layers": len(first.layers()), "different": different, "passed": not different}
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["passed"] and result["layers"] > 0 else 1)


if __name__ == "__main__":
    main()
