// What kernels of wide tiles do to the accumulators of Hopper's products: GELU, E4M3, places in swizzled rows, row
// sums.
#pragma once

#include "wgmma.cuh"

// The GELU of twice each value, as gemm.gelu has it, in pairs of halves: fewer instructions, of which the epilogue has
// the time of one product.
DEVICE void activate(u32 (&pairs)[4]) {
  u32 inner[4], first = 0x3e643e64, third = 0x348c348c;  // 2 A = 1.5972 and 8 B = 0.28417
#pragma unroll
  for (int i = 0; i < 4; i++) asm("mul.f16x2 %0, %1, %1;" : "=r"(inner[i]) : "r"(pairs[i]));
#pragma unroll
  for (int i = 0; i < 4; i++) asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(inner[i]) : "r"(third), "r"(first));
#pragma unroll
  for (int i = 0; i < 4; i++) asm("mul.f16x2 %0, %0, %1;" : "+r"(inner[i]) : "r"(pairs[i]));
#pragma unroll
  for (int i = 0; i < 4; i++) asm("tanh.approx.f16x2 %0, %0;" : "+r"(inner[i]));
#pragma unroll
  for (int i = 0; i < 4; i++) asm("fma.rn.f16x2 %0, %0, %1, %0;" : "+r"(pairs[i]) : "r"(inner[i]));
}

// 4 columns of E4M3 from two pairs of halves; what is beyond E4M3 becomes its largest.
DEVICE u32 narrow(u32 low, u32 high, u32 factor) {
  u32 values;
  asm("{\n.reg .b32 l, h;\n.reg .b16 a, b;\nmul.f16x2 l, %1, %3;\nmul.f16x2 h, %2, %3;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 a, l;\ncvt.rn.satfinite.e4m3x2.f16x2 b, h;\nmov.b32 %0, {a, b};\n}"
      : "=r"(values)
      : "r"(low), "r"(high), "r"(factor));
  return values;
}
// Two values of E4M3, likewise.
DEVICE u16 narrow_pair(float low, float high) {
  u16 values;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(values) : "f"(high), "f"(low));
  return values;
}

// From the first 32 bytes of a swizzled row to others. Said anew each time: kept, the places take registers that a tile
// does not leave.
template <int NUMBER>
DEVICE u32 further(u32 place) {
  u32 at;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(at) : "r"(place), "n"(NUMBER * 32));
  return at;
}

// Sums of the four lanes that have the columns of a row.
DEVICE float2 add_neighbours(float2 own) {
#pragma unroll
  for (int other = 1; other < 4; other *= 2) {
    own.x += __shfl_xor_sync(~0u, own.x, other);
    own.y += __shfl_xor_sync(~0u, own.y, other);
  }
  return own;
}
