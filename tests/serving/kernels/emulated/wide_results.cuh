// wide_results.cuh on any processor: halves are float32 that is rounded behind each instruction.
#pragma once

#include "wgmma.cuh"

template <typename Of>
u32 map_pair(u32 pair, Of of) {
  float2 both = unpack(pair);
  return pack(of(both.x), of(both.y));
}
inline void activate(u32 (&pairs)[4]) {
  const float first = widen(0x3e64), third = widen(0x348c);
  for (u32& pair : pairs) {
    u32 square = map_pair(pair, [](float x) { return x * x; });
    float2 inner = unpack(map_pair(square, [=](float x) { return fma((double)x, third, first); })), own = unpack(pair);
    u32 tanh = map_pair(pack(inner.x * own.x, inner.y * own.y), [](float x) { return tanhf(x); });
    float2 factor = unpack(tanh);
    pair = pack(fma((double)own.x, factor.x, own.x), fma((double)own.y, factor.y, own.y));
  }
}
inline u32 narrow(u32 low, u32 high, u32 factor) {
  float2 left = unpack(low), right = unpack(high);
  float by = unpack(factor).x;
  u32 first = pack(left.x * by, left.y * by), second = pack(right.x * by, right.y * by);
  return narrow_half(first) | narrow_half(first >> 16) << 8 | narrow_half(second) << 16 |
         (u32)narrow_half(second >> 16) << 24;
}
inline u16 narrow_pair(float low, float high) { return narrow(pack(low, high), 0, 0x3c003c00); }
template <int NUMBER>
u32 further(u32 place) {
  return place ^ NUMBER * 32;
}
inline float2 add_neighbours(float2 own) {
  for (int other = 1; other < 4; other *= 2) {
    own.x += __shfl_xor_sync(~0u, own.x, other);
    own.y += __shfl_xor_sync(~0u, own.y, other);
  }
  return own;
}
