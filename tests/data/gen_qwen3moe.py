#!/usr/bin/env python3
"""Write a GGUF v3 file of the qwen3moe architecture with seeded random weights, for the golden cases.

Independent of moed-synth, whose options it shares in part: what both readers and both writers agree on is right.
Needs numpy alone. The weights are drawn in their quantized form.

  gen_qwen3moe.py OUT.gguf [--preset tiny|small] [--seed N] [--quant q4_k_m|q4_k|q5_k|q6_k|q8_0|f16|f32|mixed]
                  [--rope-theta X] [--tied]
"""
import argparse
import struct

import numpy as np

GGML = {"f32": 0, "f16": 1, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14}
BLOCK = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210)}
ALIGN = 32

PRESETS = {
    "tiny": dict(hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, experts=8, topk=2, inter=256, vocab=512,
                 ctx=512),
    "small": dict(hidden=512, layers=3, heads=8, kv_heads=2, head_dim=128, experts=16, topk=4, inter=256, vocab=1000,
                  ctx=2048),
}


def more_bits(i, n):
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def tensor_type(name, layer, n_layers, quant):
    if name.endswith("norm.weight") or "ffn_gate_inp" in name:
        return "f32"
    if quant == "mixed":  # every type somewhere
        if name == "token_embd.weight":
            return "q8_0"
        if name == "output.weight":
            return "q6_k"
        kinds = ["q4_k", "q5_k", "q6_k", "q8_0", "f16"]
        return kinds[(layer * 7 + sum(map(ord, name))) % len(kinds)]
    if quant == "q4_k_m":
        if name == "output.weight":
            return "q6_k"
        if ("attn_v" in name or "ffn_down_exps" in name) and more_bits(layer, n_layers):
            return "q6_k"
        return "q4_k"
    return quant


def pack_scales(scale, low):
    """6-bit scales and mins of 8 groups as 12 bytes, the packing of Q4_K and Q5_K."""
    out = np.zeros((scale.shape[0], 12), np.uint8)
    out[:, 0:4] = (scale[:, 0:4] & 63) | ((scale[:, 4:8] >> 4) << 6)
    out[:, 4:8] = (low[:, 0:4] & 63) | ((low[:, 4:8] >> 4) << 6)
    out[:, 8:12] = (scale[:, 4:8] & 15) | ((low[:, 4:8] & 15) << 4)
    return out


def f16_bytes(x):
    return x.astype(np.float16).view(np.uint8).reshape(len(x), 2)


def rand_blocks(rng, kind, n, std):
    """n blocks whose weights have about the given deviation and zero mean."""
    if kind in ("f32", "f16"):
        values = rng.standard_normal(n, dtype=np.float32) * np.float32(std)
        return values.astype(np.float32 if kind == "f32" else np.float16).view(np.uint8)
    out = rng.integers(0, 256, (n, BLOCK[kind][1]), dtype=np.uint8)
    jitter = rng.uniform(0.7, 1.3, n).astype(np.float32)
    if kind == "q8_0":
        q = np.clip(np.rint(rng.standard_normal((n, 32), dtype=np.float32) * 40), -127, 127).astype(np.int8)
        out[:, 0:2] = f16_bytes(jitter * std / 40)
        out[:, 2:] = q.view(np.uint8)
    elif kind in ("q4_k", "q5_k"):
        half, deviation = (7.5, 4.61) if kind == "q4_k" else (15.5, 9.23)
        scale = rng.integers(20, 61, (n, 8), dtype=np.uint8)
        d = (jitter * std / (deviation * 40)).astype(np.float16)
        out[:, 0:2] = f16_bytes(d)
        out[:, 2:4] = f16_bytes(d.astype(np.float32) * half)
        out[:, 4:16] = pack_scales(scale, scale)
    elif kind == "q6_k":
        out[:, 192:208] = rng.integers(-64, 65, (n, 16), dtype=np.int8).view(np.uint8)
        out[:, 208:210] = f16_bytes(jitter * std / (18.5 * 37.2))
    return out.reshape(-1)


def string(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, value):
    key = string(key)
    if isinstance(value, str):
        return key + struct.pack("<I", 8) + string(value)
    if isinstance(value, bool):
        return key + struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return key + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return key + struct.pack("<If", 6, value)
    if isinstance(value[0], str):
        return key + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    return key + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack("<%di" % len(value), *value)


def byte_characters():
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    table, extra = [], 0
    for byte in range(256):
        table.append(chr(byte if byte in printable else 256 + extra))
        extra += byte not in printable
    return table


def vocabulary(size):
    """A byte-level BPE: 256 bytes, merges of earlier tokens and a letter, three special tokens at the end."""
    tokens, merges = byte_characters(), []
    letters = [tokens[b] for b in b" etaoinshrdlucmfwygpbvkxqjz"]
    frontier = list(letters)
    for base in frontier:  # grows as it is walked
        for letter in letters:
            if len(tokens) < size - 3:
                tokens.append(base + letter)
                merges.append(base + " " + letter)
                frontier.append(base + letter)
        if len(tokens) == size - 3:
            break
    types = [1] * len(tokens) + [3] * 3
    return tokens + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], types, merges


def tensors(c, tied):
    hidden, heads, kv_heads, dim, experts, inter, vocab = (
        c[k] for k in ("hidden", "heads", "kv_heads", "head_dim", "experts", "inter", "vocab"))
    yield "token_embd.weight", (hidden, vocab), -1
    for i in range(c["layers"]):
        for name, shape in (
                ("attn_norm", (hidden,)), ("attn_q", (hidden, heads * dim)), ("attn_k", (hidden, kv_heads * dim)),
                ("attn_v", (hidden, kv_heads * dim)), ("attn_q_norm", (dim,)), ("attn_k_norm", (dim,)),
                ("attn_output", (heads * dim, hidden)), ("ffn_norm", (hidden,)), ("ffn_gate_inp", (hidden, experts)),
                ("ffn_gate_exps", (hidden, inter, experts)), ("ffn_up_exps", (hidden, inter, experts)),
                ("ffn_down_exps", (inter, hidden, experts))):
            yield "blk.%d.%s.weight" % (i, name), shape, i
    yield "output_norm.weight", (hidden,), -1
    if not tied:
        yield "output.weight", (hidden, vocab), -1


def deviation(name, columns, tied):
    if name == "token_embd.weight":
        return 0.05 if tied else 1.0
    gain = 3.0 if "ffn_gate_inp" in name else 0.25 if "attn_output" in name or "ffn_down" in name else 1.0
    return columns ** -0.5 * gain


def metadata(a, c):
    tokens, types, merges = vocabulary(c["vocab"])
    q = "qwen3moe."
    return [
        ("general.architecture", "qwen3moe"), ("general.name", "synthetic-%s-%s-seed%d" % (a.preset, a.quant, a.seed)),
        ("general.file_type", 15), ("general.alignment", ALIGN), (q + "block_count", c["layers"]),
        (q + "context_length", c["ctx"]), (q + "embedding_length", c["hidden"]),
        (q + "feed_forward_length", c["inter"] * c["topk"]), (q + "attention.head_count", c["heads"]),
        (q + "attention.head_count_kv", c["kv_heads"]), (q + "rope.freq_base", a.rope_theta),
        (q + "attention.layer_norm_rms_epsilon", 1e-6), (q + "expert_used_count", c["topk"]),
        (q + "expert_count", c["experts"]), (q + "expert_feed_forward_length", c["inter"]),
        (q + "attention.key_length", c["head_dim"]), (q + "attention.value_length", c["head_dim"]),
        (q + "vocab_size", c["vocab"]), ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2"),
        ("tokenizer.ggml.tokens", tokens), ("tokenizer.ggml.token_type", types), ("tokenizer.ggml.merges", merges),
        ("tokenizer.ggml.eos_token_id", c["vocab"] - 1), ("tokenizer.ggml.padding_token_id", c["vocab"] - 3),
        ("tokenizer.ggml.bos_token_id", c["vocab"] - 3), ("tokenizer.ggml.add_bos_token", False),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--tied", action="store_true")
    a = parser.parse_args()
    c = PRESETS[a.preset]

    infos, plan, offset = b"", [], 0
    for name, shape, layer in tensors(c, a.tied):
        kind = tensor_type(name, layer, c["layers"], a.quant)
        blocks = int(np.prod(shape)) // BLOCK[kind][0]
        infos += string(name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, GGML[kind], offset)
        plan.append((name, shape, kind, blocks))
        offset += -(-blocks * BLOCK[kind][1] // ALIGN) * ALIGN
    pairs = metadata(a, c)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(pairs)) + b"".join(pair(*p) for p in pairs) + infos

    with open(a.out, "wb") as f:
        f.write(head + b"\0" * (-len(head) % ALIGN))
        for index, (name, shape, kind, blocks) in enumerate(plan):
            rng = np.random.Generator(np.random.SFC64([a.seed, index]))
            if name.endswith("norm.weight"):
                data = rng.uniform(0.6, 1.4, blocks).astype(np.float32).view(np.uint8)
            else:
                data = rand_blocks(rng, kind, blocks, deviation(name, shape[0], a.tied))
            f.write(data.tobytes() + b"\0" * (-data.size % ALIGN))


main()
