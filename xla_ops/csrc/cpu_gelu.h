// gelu.h for one instruction set; after cpu_simd.h.

#define GELU_FN CPU_FN
#include "gelu.h"
#undef GELU_FN
