#!/usr/bin/env python3
"""Writes this folder: tiny models of every dense architecture with the gradients of all
their tensors as PyTorch computes them, the oracle of core/train.

    make_fixtures.py [OUT]              needs torch and transformers (4.57 made the files in the tree)
    make_fixtures.py --model DIR OUT    the same of one given model, into the folder OUT, which the
                                        tests of gradients take with QM_GRADIENT_FIXTURE=OUT

Each folder holds a model directory (config.json, model.safetensors, F32) and gradients.safetensors:
  input_ids, labels     I32 [2, T]; labels are the next ids, -1 where a position is not counted
  teacher_logits        F32 [2 T, vocabulary]
  lm_loss, kl_loss      F32 [1]: mean over counted positions of the cross entropy, and of
                        KL(softmax(teacher) || softmax(logits))
  lm.NAME, kl.NAME      gradients of the two losses with respect to the tensor NAME
  hidden.I, d_hidden.I  input of block I and the gradient of lm_loss with respect to it; I = number
                        of blocks: the last block's output
Computed in f64 from weights that are exact in F32; transformers takes norms and softmax in f32.
"""
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTH = 11
COMMON = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, vocab_size=40, max_position_embeddings=64,
              rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
              tie_word_embeddings=False, torch_dtype="float32")
MODELS = {
    "llama": dict(COMMON, model_type="llama", attention_bias=True, mlp_bias=True),
    "llama-tied": dict(COMMON, model_type="llama", tie_word_embeddings=True),
    "mistral": dict(COMMON, model_type="mistral", sliding_window=4),
    "qwen2": dict(COMMON, model_type="qwen2", head_dim=4),
    "qwen3": dict(COMMON, model_type="qwen3", attention_bias=False),
}


def make_model(settings, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, dtype=torch.float32)
        norm = "norm" in name
        parameter.data = 1 + 0.2 * values if norm else values * (0.4 if parameter.dim() > 1 else 0.1)
    return config, model


def loss_of(logits, labels, teacher):
    counted = labels.flatten() >= 0
    logs = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)[counted]
    lm = -logs.gather(1, labels.flatten()[counted].long()[:, None]).mean()
    p = torch.softmax(teacher[counted], -1)
    kl = (p * (p.log() - logs)).sum(-1).mean()
    return lm, kl


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def load_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    return model.config, model


def write(folder, config, model):
    folder.mkdir(parents=True, exist_ok=True)
    stored = {k: v.contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    save_file(stored, folder / "model.safetensors")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)

    model = model.double()
    ids = torch.randint(0, config.vocab_size, (2, LENGTH + 1))
    labels = ids[:, 1:].clone().int()
    labels[0, :3] = -1
    labels[1, 7] = -1
    teacher = torch.randn(2 * LENGTH, config.vocab_size, dtype=torch.float32).double() * 2
    # The inputs of blocks, as they enter: output_hidden_states gives the last one after the norm.
    hidden = []

    def keep(_, args, kwargs=None):
        hidden.append(args[0])
        args[0].retain_grad()

    for layer in model.model.layers:
        layer.register_forward_pre_hook(keep)
    model.model.norm.register_forward_pre_hook(keep)
    logits = model(input_ids=ids[:, :-1]).logits
    lm, kl = loss_of(logits, labels, teacher)
    out = {"input_ids": ids[:, :-1].int().contiguous(), "labels": labels,
           "teacher_logits": teacher.float(), "lm_loss": lm.detach().float()[None],
           "kl_loss": kl.detach().float()[None]}
    for name, gradient in gradients(model, lm).items():
        out["lm." + name] = gradient.float()
    for i, states in enumerate(hidden):
        out[f"hidden.{i}"] = states.detach().reshape(2 * LENGTH, -1).float()
        out[f"d_hidden.{i}"] = states.grad.reshape(2 * LENGTH, -1).float().clone()
    for name, gradient in gradients(model, kl).items():
        out["kl." + name] = gradient.float()
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "gradients.safetensors")


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "--model":
        write(pathlib.Path(sys.argv[3]), *load_model(sys.argv[2]))
        return
    default = pathlib.Path(__file__).resolve().parent
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    for seed, (name, settings) in enumerate(MODELS.items()):
        write(out / name, *make_model(settings, seed))


if __name__ == "__main__":
    main()
