#!/usr/bin/env python3
"""Hold a small qwen3moe GGUF against Hugging Face's Qwen3MoeForCausalLM. Run by hand; no part of `make check`.

Needs numpy, torch and transformers >= 4.51:

  moed-synth m.gguf --preset small --quant mixed
  python3 tests/parity_hf.py m.gguf --tokens 3,999,12,500
  python3 tests/parity_hf.py m.gguf --tokens 3,999,12,500 --logits FILE

It builds the Hugging Face model, in float32, from the file's metadata and unpacked weights and compares its logits with
those of tests/data/qwen3moe_ref.py, or with FILE: float32, [tokens][vocabulary], such as `Forward` returns with
all_positions. Prints the cosine of every position; exit status 1 below 0.99 at one or 0.999 on average.
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"))
import qwen3moe_ref  # noqa: E402


def hugging_face(reference):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    gguf = reference.gguf
    key = lambda name: gguf.metadata["qwen3moe." + name]
    embeddings = gguf.weights("token_embd.weight")
    config = Qwen3MoeConfig(
        vocab_size=len(embeddings), hidden_size=key("embedding_length"), num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"), num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"), rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_theta=key("rope.freq_base"), max_position_embeddings=key("context_length"),
        num_experts=key("expert_count"), num_experts_per_tok=key("expert_used_count"),
        moe_intermediate_size=key("expert_feed_forward_length"), norm_topk_prob=True, decoder_sparse_step=1,
        tie_word_embeddings=False, attn_implementation="eager")
    if hasattr(config, "rope_parameters"):  # where newer versions keep the base
        config.rope_parameters = {"rope_type": "default", "rope_theta": key("rope.freq_base")}
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    }
    head = "output.weight" if "output.weight" in gguf.tensors else "token_embd.weight"
    state = {"model.embed_tokens.weight": embeddings, "model.norm.weight": gguf.weights("output_norm.weight"),
             "lm_head.weight": gguf.weights(head)}
    for i in range(reference.layers):
        for theirs, ours in names.items():
            state["model.layers.%d.%s.weight" % (i, theirs)] = gguf.weights("blk.%d.%s.weight" % (i, ours))
        for part in ("gate", "up", "down"):
            stacked = gguf.weights("blk.%d.ffn_%s_exps.weight" % (i, part))
            for expert, weights in enumerate(stacked):
                state["model.layers.%d.mlp.experts.%d.%s_proj.weight" % (i, expert, part)] = weights
    model = Qwen3MoeForCausalLM(config).float().eval()
    if "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict():  # newer ones keep the experts together
        for i in range(reference.layers):
            block = "model.layers.%d.mlp.experts." % i
            take = lambda part: [state.pop(block + "%d.%s_proj.weight" % (e, part)) for e in range(config.num_experts)]
            gate, up = take("gate"), take("up")
            state[block + "gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(gate, up)])
            state[block + "down_proj"] = np.stack(take("down"))
    model.load_state_dict({k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()})
    return lambda tokens: model(torch.tensor([tokens])).logits[0].detach().numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--logits")
    a = parser.parse_args()
    tokens = [int(t) for t in a.tokens.split(",")]
    reference = qwen3moe_ref.Model(a.model)
    expected = hugging_face(reference)(tokens)
    if a.logits:
        found = np.fromfile(a.logits, "<f4").reshape(expected.shape)
    else:
        found = reference.forward(tokens)[0]
    cosine = (expected * found).sum(-1) / np.linalg.norm(expected, axis=-1) / np.linalg.norm(found, axis=-1)
    print("cosine of %d positions: %.9f at least, %.9f on average; logits differ by %.3g at most"
          % (len(tokens), cosine.min(), cosine.mean(), np.abs(expected - found).max()))
    sys.exit(not (cosine.min() >= 0.99 and cosine.mean() >= 0.999))


if __name__ == "__main__":
    main()
