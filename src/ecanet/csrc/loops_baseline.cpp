// Whatever the compiler's default is: SSE2 on x86-64, NEON on ARM.
#include "kernels.h"
#define ECANET_ISA baseline
#define ECANET_BYTES 16
#include "loops.h"
