#include "kernels.h"
#ifdef ECANET_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ECANET_ISA avx2
#define ECANET_BYTES 32
#include "loops.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
