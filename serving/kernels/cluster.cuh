// What a kernel says to Hopper's hardware: barriers that count bytes, copies between the shared memories of a cluster,
// products of 16 x 8 x 16, and pairs of float16.
#pragma once

typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define DEVICE __device__ __forceinline__

DEVICE u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE u32 on_rank(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void arrive_cluster() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
DEVICE void wait_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

DEVICE void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEVICE void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred here;\nLOOK:\nmbarrier.try_wait.parity.shared::cta.b64 here, [%0], %1;\n@!here bra LOOK;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// From global memory into shared memory; `bar` counts the bytes.
DEVICE void copy_in(u32 target, const void* source, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(bar)
               : "memory");
}
// From this shared memory into that of `rank`, whose own `bar` counts the bytes.
DEVICE void send(u32 target, u32 source, u32 bytes, u32 bar, u32 rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   on_rank(target, rank)),
               "r"(source), "r"(bytes), "r"(on_rank(bar, rank))
               : "memory");
}
// Makes what this thread wrote visible to copies that are started behind the next barrier.
DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void load4(u32* to, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
DEVICE void load4_transposed(u32* to, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
DEVICE void store4_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
DEVICE void multiply(float* acc, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE float2 unpack(u32 both) {
  float2 values;
  asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(both));
  return values;
}
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The fast form of gemm.gelu.
DEVICE float gelu(float x) {
  float half = 0.5f * x, tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(half * (2 * 0.79862082f + half * half * (8 * 0.0355207f))));
  return half + half * tanh;
}
// The GELU of twice each value, as gemm.gelu has it, in pairs of halves: fewer instructions for an epilogue
// that has the time of one product.
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
