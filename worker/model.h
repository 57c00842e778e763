#ifndef MOED_WORKER_MODEL_H
#define MOED_WORKER_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/status.h"
#include "kernels/quant.h"

/* A qwen3moe GGUF file, bound: every key, type and shape checked. Weights stay in the mapping. */

enum { MODEL_EOS_NONE = UINT32_MAX };

struct model_config {
    char name[128];
    char architecture[32];
    char fingerprint[17];
    uint32_t vocab_size, context_length, block_count, embedding_length;
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t expert_count, expert_used_count, expert_feed_forward_length;
    float rms_epsilon, rope_freq_base;
    uint32_t eos_token_id; /* MODEL_EOS_NONE: the file has none */
    uint64_t tensor_bytes;
};

/* A matrix of `experts` times `rows` rows of `columns` weights, row after row: y = W x. */
struct model_matrix {
    enum quant_type type;
    uint32_t columns, rows, experts;
    const void *data;  /* in the mapping */
    uint64_t row_bytes;
    const char *name;
};

struct model_layer {
    const float *attn_norm, *attn_q_norm, *attn_k_norm, *ffn_norm; /* [embedding], [head_dim], [head_dim], [embedding] */
    struct model_matrix attn_q, attn_k, attn_v, attn_output;
    struct model_matrix ffn_gate_inp; /* the router; F32 */
    struct model_matrix ffn_gate_exps, ffn_up_exps, ffn_down_exps;
};

struct model {
    struct model_config config;
    struct gguf *gguf;
    struct model_matrix token_embd;
    struct model_matrix output; /* token_embd again where the head is tied */
    const float *output_norm;   /* [embedding] */
    bool tied;
    struct model_layer *layers; /* [block_count] */
};

/* Opens and binds a file; *out is to be freed with model_close. Errors are one line that names file and tensor or key. */
int model_open(const char *path, struct model **out, struct status *status);
/* Binds an open file, which the model then owns (also on failure). For tests and fuzzing. */
int model_bind(struct gguf *gguf, struct model **out, struct status *status);
void model_close(struct model *model);

#endif
