#include <math.h>
#include <string.h>

#include "kernels/quant.h"
#include "tests/synth/plan.h"

/*
 * Random blocks. The generator is counter-based: word i of a stream is splitmix64's output function of key + i * golden
 * (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). Only integer operations and correctly
 * rounded float ones are used, so that the bytes are the same everywhere.
 */
struct stream {
    uint64_t state;
};

static const uint64_t golden = 0x9E3779B97F4A7C15u;

static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline uint64_t stream_next(struct stream *stream) {
    return mix(stream->state += golden);
}

uint64_t weights_key(uint64_t seed, uint32_t tensor) {
    return mix(mix(seed + golden) + ((uint64_t)tensor + 1) * golden);
}

static void put_u16(unsigned char *out, uint16_t value) {
    out[0] = (unsigned char)value;
    out[1] = (unsigned char)(value >> 8);
}

static void put_u32(unsigned char *out, uint32_t value) {
    put_u16(out, (uint16_t)value);
    put_u16(out + 2, (uint16_t)(value >> 16));
}

static inline void put_words(struct stream *stream, unsigned char *out, unsigned words) {
    for (unsigned i = 0; i < words; i++) {
        uint64_t word = stream_next(stream);
        for (unsigned b = 0; b < 8; b++) out[8 * i + b] = (unsigned char)(word >> 8 * b);
    }
}

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Nearest, ties to even. |x| is below 65504, which no weight or scale here comes near. */
static uint16_t to_f16(float x) {
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude < 0x38800000) /* below 2^-14, in units of 2^-24 */
        return (uint16_t)(sign | (uint32_t)lrintf(fabsf(x) * 0x1p24f));
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

static uint16_t to_bf16(float x) {
    uint32_t bits = float_bits(x);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Sum of four uniform 16-bit numbers, about normal. */
static inline float normal(uint64_t word, float std) {
    const float deviation = 37837.226f; /* sqrt(4 * (2^32 - 1) / 12) */
    int sum = (int)(word & 0xFFFF) + (int)(word >> 16 & 0xFFFF) + (int)(word >> 32 & 0xFFFF) + (int)(word >> 48);
    return (float)(sum - 131070) * (std / deviation);
}

static inline float uniform(uint64_t word, float low, float high) {
    return low + (high - low) * ((float)(word >> 40) * 0x1p-24f);
}

static float weight(const struct plan_tensor *tensor, uint64_t word) {
    if (tensor->low < tensor->high) return uniform(word, tensor->low, tensor->high);
    return normal(word, tensor->std);
}

/* 20 to 60 in each of the eight 6-bit scales; the mins are the same, so that with dmin = d * half the mean is zero. */
static void put_scales(uint64_t word, unsigned char *out) {
    unsigned scale[8];
    for (unsigned i = 0; i < 8; i++) scale[i] = 20 + ((unsigned)(word >> 8 * i & 0xFF) * 41 >> 8);
    for (unsigned i = 0; i < 4; i++) {
        out[i] = out[i + 4] = (unsigned char)(scale[i] | scale[i + 4] >> 4 << 6);
        out[i + 8] = (unsigned char)((scale[i + 4] & 15) | (scale[i + 4] & 15) << 4);
    }
}

/* Of Q4_K and Q5_K: the two scales and the packed ones. spread: the deviation of q; half: its mean. */
static void put_k_scales(struct stream *stream, float std, float spread, float half, unsigned char *out) {
    const float scale_mean = 40;
    float d = uniform(stream_next(stream), 0.7f, 1.3f) * (std / (spread * scale_mean));
    put_u16(out, to_f16(d));
    put_u16(out + 2, to_f16(d * half));
    put_scales(stream_next(stream), out + 4);
}

static void fill_q8_0(struct stream *stream, float std, unsigned char *out) {
    const float spread = 36.9f; /* of a quarter of the sum of four uniform bytes */
    put_u16(out, to_f16(uniform(stream_next(stream), 0.7f, 1.3f) * (std / spread)));
    for (unsigned i = 0; i < 32; i += 2) {
        uint64_t word = stream_next(stream);
        uint64_t pairs = (word & 0x00FF00FF00FF00FFu) + (word >> 8 & 0x00FF00FF00FF00FFu);
        int first = (int)(pairs & 0xFFFF) + (int)(pairs >> 16 & 0xFFFF);
        int second = (int)(pairs >> 32 & 0xFFFF) + (int)(pairs >> 48);
        out[2 + i] = (unsigned char)((first - 510) / 4);
        out[3 + i] = (unsigned char)((second - 510) / 4);
    }
}

static void fill_q6_k(struct stream *stream, float std, unsigned char *out) {
    const float spread = 18.5f * 37.2f; /* of q - 32 and of the scales, uniform in -64 to 64 */
    unsigned char random[QUANT_K / 16];
    put_words(stream, out, (QUANT_K / 2 + QUANT_K / 4) / 8);
    put_words(stream, random, QUANT_K / 16 / 8);
    unsigned char *scales = out + QUANT_K / 2 + QUANT_K / 4;
    for (unsigned i = 0; i < QUANT_K / 16; i++) scales[i] = (unsigned char)((int)(random[i] * 129u >> 8) - 64);
    put_u16(scales + QUANT_K / 16, to_f16(uniform(stream_next(stream), 0.7f, 1.3f) * (std / spread)));
}

/* Words of a stream that one block takes. */
static unsigned block_words(uint32_t type) {
    switch (type) {
    case QUANT_Q8_0: return 1 + 16;
    case QUANT_Q4_K: return 2 + 16;
    case QUANT_Q5_K: return 2 + 20;
    case QUANT_Q6_K: return 24 + 2 + 1;
    default: return 1;
    }
}

void weights_fill(const struct plan_tensor *tensor, uint64_t key, uint64_t first, uint64_t count, unsigned char *out) {
    uint32_t size = quant_format(tensor->type)->block_bytes;
    struct stream stream = {key + first * block_words(tensor->type) * golden};
    for (uint64_t i = 0; i < count; i++, out += size) {
        switch (tensor->type) {
        case QUANT_F32: put_u32(out, float_bits(weight(tensor, stream_next(&stream)))); break;
        case QUANT_F16: put_u16(out, to_f16(weight(tensor, stream_next(&stream)))); break;
        case QUANT_BF16: put_u16(out, to_bf16(weight(tensor, stream_next(&stream)))); break;
        case QUANT_Q8_0: fill_q8_0(&stream, tensor->std, out); break;
        case QUANT_Q4_K:
            put_k_scales(&stream, tensor->std, 4.61f, 7.5f, out);
            put_words(&stream, out + 16, 16);
            break;
        case QUANT_Q5_K:
            put_k_scales(&stream, tensor->std, 9.23f, 15.5f, out);
            put_words(&stream, out + 16, 20);
            break;
        case QUANT_Q6_K: fill_q6_k(&stream, tensor->std, out); break;
        }
    }
}
