"""Writes an adapter with PEFT itself over a dense model: random parameters, every linear of the blocks."""

import argparse
from importlib.metadata import version

# By name: the class of the configuration, its options.
KINDS = {
    "oft": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": True}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
    "rslora": ("LoraConfig", {"r": 16, "lora_alpha": 8, "use_rslora": True}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of the dense model")
    parser.add_argument("output", help="directory for the adapter")
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    # The size of OFT's parameters is that of angles; 0.02 turns every block noticeably.
    parser.add_argument("--deviation", type=float, default=0.02, help="of the parameters, normal around zero")
    arguments = parser.parse_args()
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    name, options = KINDS[arguments.kind]
    config = getattr(peft, name)(task_type="CAUSAL_LM", target_modules=LINEARS, **options)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, arguments.deviation)
    model.save_pretrained(arguments.output)
    print(f"wrote {arguments.kind} with peft {version('peft')} to {arguments.output}")


if __name__ == "__main__":
    main()
