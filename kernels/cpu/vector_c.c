#define VECTOR_ISA VECTOR_ISA_C

#include "kernels/cpu/vector_template.h"
#include "kernels/cpu/attention_template.h"

float cpu_exp(float x) {
    return lanes_first(lanes_exp(lanes_set(x)));
}

size_t cpu_kv_block_bytes(enum quant_type type, uint32_t head_dim) {
    size_t values = (head_dim + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE;
    if (type == QUANT_Q8_0)
        return CPU_KV_BLOCK * (head_dim + values + 2 * values / GROUP * sizeof(uint16_t));
    return CPU_KV_BLOCK * (head_dim + values) * sizeof(uint16_t);
}

size_t cpu_attention_partial_floats(uint32_t head_dim) {
    return (head_dim + VALUE_TILE - 1) / VALUE_TILE * VALUE_TILE + 16;
}
