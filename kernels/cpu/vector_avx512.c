#define VECTOR_ISA VECTOR_ISA_AVX512

#include "kernels/cpu/vector_template.h"
#include "kernels/cpu/attention_template.h"
