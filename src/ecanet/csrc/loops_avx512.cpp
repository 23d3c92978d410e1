#include "kernels.h"
#ifdef ECANET_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define ECANET_ISA avx512
#define ECANET_BYTES 64
#include "loops.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
