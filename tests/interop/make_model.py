"""Writes a small model of an architecture with random weights, in bf16, with the tokenizer of another model."""

import argparse
import json
import os
import shutil

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 512, "tie_word_embeddings": False,
    # Logits far enough apart for a comparison of probabilities to mean something.
    "initializer_range": 0.1, "rope_theta": 1e6,
}
# Head and expert sizes are those that transformers takes when it reads a GGUF file, whatever that says.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
# The class of the configuration, and what this architecture has beside the sizes.
KINDS = {"qwen3": ("Qwen3Config", {}), "qwen3_moe": ("Qwen3MoeConfig", EXPERTS)}
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("tokenizer", help="directory of the model whose tokenizer to take")
    parser.add_argument("output")
    arguments = parser.parse_args()
    import torch
    import transformers

    torch.manual_seed(0)
    name, more = KINDS[arguments.kind]
    with open(os.path.join(arguments.tokenizer, "config.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["vocab_size"]
    config = getattr(transformers, name)(
        vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **{**SIZES, **more}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)  # all ones would hide a norm that is left out
            elif key.endswith("mlp.gate.weight"):
                # The first expert outweighs the others, so that a near tie for the second matters little.
                parameter.mul_(4)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    for file in TOKENIZER_FILES:
        shutil.copy(os.path.join(arguments.tokenizer, file), arguments.output)


if __name__ == "__main__":
    main()
