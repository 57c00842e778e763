#!/usr/bin/env python3
"""A float64 forward pass of a qwen3moe GGUF in numpy, from the definitions of the architecture and the block formats.

It makes the golden cases; tests/reference is the same in C, written separately.

  qwen3moe_ref.py MODEL.gguf --tokens 1,2,3 [--out LOGITS.f32] [--routes ROUTES.json] [--greedy N]

LOGITS.f32: of every position, row-major [tokens][vocabulary], little-endian float32. ROUTES.json: [layer][token] of
[experts, weights]. --greedy appends N tokens to the tokens first, and prints them.
"""
import argparse
import json
import struct
import sys

import numpy as np

TYPES = {0: ("f32", 1, 4), 1: ("f16", 1, 2), 8: ("q8_0", 32, 34), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176),
         14: ("q6_k", 256, 210), 30: ("bf16", 1, 2)}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """Metadata and tensors of a little-endian GGUF v3 file that is trusted."""

    def __init__(self, path):
        self.bytes = np.memmap(path, np.uint8, "r")
        self.at = 4
        version, tensors, pairs = self.take("<IQQ")
        if bytes(self.bytes[:4]) != b"GGUF" or version != 3:
            sys.exit("%s: not a GGUF v3 file" % path)
        self.metadata, self.tensors = {}, {}
        for _ in range(pairs):
            key = self.string()
            self.metadata[key] = self.value(self.take("<I")[0])
        for _ in range(tensors):
            name = self.string()
            shape = self.take("<%dQ" % self.take("<I")[0])
            self.tensors[name] = (shape,) + self.take("<IQ")
        alignment = self.metadata.get("general.alignment", 32)
        self.base = -(-self.at // alignment) * alignment

    def take(self, layout):
        size = struct.calcsize(layout)
        values = struct.unpack(layout, bytes(self.bytes[self.at:self.at + size]))
        self.at += size
        return values

    def string(self):
        length, = self.take("<Q")
        self.at += length
        return bytes(self.bytes[self.at - length:self.at]).decode("utf-8", "surrogateescape")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            element, count = self.take("<IQ")
            return [self.value(element) for _ in range(count)]
        return self.take("<" + SCALARS[kind])[0]

    def weights(self, name, expert=None):
        """A tensor, or one expert of it, as float64 with the slowest dimension first."""
        shape, kind, offset = self.tensors[name]
        kind, block, block_bytes = TYPES[kind]
        if expert is not None:
            shape = shape[:-1]
            offset += expert * (int(np.prod(shape)) // block * block_bytes)
        size = int(np.prod(shape)) // block * block_bytes
        start = self.base + offset
        return unpack(kind, np.asarray(self.bytes[start:start + size])).reshape(shape[::-1])


def view(data, kind):
    return np.ascontiguousarray(data).view(kind).astype(np.float64)


def scales_and_mins(packed):
    scale, low = np.empty((len(packed), 8)), np.empty((len(packed), 8))
    scale[:, :4], low[:, :4] = packed[:, 0:4] & 63, packed[:, 4:8] & 63
    scale[:, 4:] = (packed[:, 8:12] & 15) | ((packed[:, 0:4] >> 6) << 4)
    low[:, 4:] = (packed[:, 8:12] >> 4) | ((packed[:, 4:8] >> 6) << 4)
    return scale, low


def unpack(kind, data):
    if kind == "f32":
        return view(data, np.float32)
    if kind == "f16":
        return view(data, np.float16)
    if kind == "bf16":
        return view(np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16, np.float32)
    if kind == "q8_0":
        data = data.reshape(-1, 34)
        return view(data[:, :2], np.float16) * view(data[:, 2:], np.int8)
    if kind in ("q4_k", "q5_k"):
        data = data.reshape(-1, 144 if kind == "q4_k" else 176)
        d, dmin = view(data[:, 0:2], np.float16), view(data[:, 2:4], np.float16)
        scale, low = scales_and_mins(data[:, 4:16])
        q = data[:, -128:].reshape(-1, 4, 32)
        q = np.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32).astype(np.float64)
        if kind == "q5_k":
            q += 16.0 * np.stack([(data[:, 16:48] >> bit) & 1 for bit in range(8)], 1)
        return ((d * scale)[:, :, None] * q - (dmin * low)[:, :, None]).reshape(-1)
    if kind == "q6_k":
        data = data.reshape(-1, 210)
        low, high = data[:, :128].reshape(-1, 2, 64), data[:, 128:192].reshape(-1, 2, 32)
        scale, d = view(data[:, 192:208], np.int8), view(data[:, 208:210], np.float16)
        q = np.empty((len(data), 2, 4, 32))
        for run in range(4):
            nibbles = low[:, :, 32 * (run % 2):32 * (run % 2) + 32] >> 4 * (run // 2) & 15
            q[:, :, run] = nibbles | (high >> 2 * run & 3) << 4
        return (d[:, :, None] * scale[:, :, None] * (q.reshape(-1, 16, 16) - 32)).reshape(-1)
    raise ValueError(kind)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Model:
    def __init__(self, path):
        self.gguf = Gguf(path)
        key = lambda name: self.gguf.metadata["qwen3moe." + name]
        self.layers, self.heads = key("block_count"), key("attention.head_count")
        self.kv_heads, self.head_dim = key("attention.head_count_kv"), key("attention.key_length")
        self.theta, self.epsilon = key("rope.freq_base"), key("attention.layer_norm_rms_epsilon")
        self.used = key("expert_used_count")
        self.cache = {}

    def weights(self, name, expert=None):
        if (name, expert) not in self.cache:
            self.cache[name, expert] = self.gguf.weights(name, expert)
        return self.cache[name, expert]

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights(name)

    def rope(self, x):
        """NeoX: component i turns with component i + half."""
        half = self.head_dim // 2
        angle = np.arange(float(len(x)))[:, None] * self.theta ** (-np.arange(half) * 2.0 / self.head_dim)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def attention(self, x, block):
        n, group = len(x), self.heads // self.kv_heads
        heads = lambda name, count: (x @ self.weights(block + name).T).reshape(n, count, self.head_dim)
        q = self.rope(self.norm(heads("attn_q.weight", self.heads), block + "attn_q_norm.weight"))
        k = self.rope(self.norm(heads("attn_k.weight", self.kv_heads), block + "attn_k_norm.weight"))
        v = heads("attn_v.weight", self.kv_heads)
        future = np.triu(np.full((n, n), -np.inf), 1)
        out = np.empty((n, self.heads, self.head_dim))
        for h in range(self.heads):
            out[:, h] = softmax(q[:, h] @ k[:, h // group].T / np.sqrt(self.head_dim) + future) @ v[:, h // group]
        return out.reshape(n, -1) @ self.weights(block + "attn_output.weight").T

    def experts(self, x, block):
        probability = softmax(x @ self.weights(block + "ffn_gate_inp.weight").T)
        chosen = np.argsort(-probability, -1, kind="stable")[:, :self.used]
        weight = np.take_along_axis(probability, chosen, -1)
        weight /= weight.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            tokens, place = np.nonzero(chosen == expert)
            part = lambda name, y: y @ self.weights(block + name, int(expert)).T
            gate, up = part("ffn_gate_exps.weight", x[tokens]), part("ffn_up_exps.weight", x[tokens])
            down = part("ffn_down_exps.weight", gate / (1 + np.exp(-gate)) * up)
            out[tokens] += weight[tokens, place][:, None] * down
        return out, [[c.tolist(), w.tolist()] for c, w in zip(chosen, weight)]

    def forward(self, tokens):
        x, routes = self.weights("token_embd.weight")[tokens], []
        for i in range(self.layers):
            block = "blk.%d." % i
            x = x + self.attention(self.norm(x, block + "attn_norm.weight"), block)
            y, route = self.experts(self.norm(x, block + "ffn_norm.weight"), block)
            x = x + y
            routes.append(route)
        head = "output.weight" if "output.weight" in self.gguf.tensors else "token_embd.weight"
        return self.norm(x, "output_norm.weight") @ self.weights(head).T, routes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out")
    parser.add_argument("--routes")
    parser.add_argument("--greedy", type=int, default=0)
    a = parser.parse_args()
    model, tokens = Model(a.model), [int(t) for t in a.tokens.split(",")]
    for _ in range(a.greedy):
        tokens.append(int(model.forward(tokens)[0][-1].argmax()))
    if a.greedy:
        print(tokens[-a.greedy:])
    logits, routes = model.forward(tokens)
    if a.out:
        logits.astype("<f4").tofile(a.out)
    if a.routes:
        with open(a.routes, "w") as f:
            json.dump(routes, f)


if __name__ == "__main__":
    main()
