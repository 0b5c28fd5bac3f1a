// What a kernel says to the hardware of Hopper and later: barriers that count bytes, copies of arrays, of tiles that
// tensor maps describe, and between the shared memories of a cluster, products of 16 x 8 x 16, and pairs of float16.
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
// The first of a program's threads, so many; whole warps.
template <int THREADS>
DEVICE void meet_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
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
// A matrix as the copy engine sees it: `TensorMap` of compiled.py.
struct alignas(64) TensorMap {
  char bytes[128];
};

// The first use of a map waits for it otherwise.
DEVICE void fetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void load_tile(u32 to, const TensorMap* map, int column, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(bar)
      : "memory");
}
// From this shared memory into that of `rank`, whose own `bar` counts the bytes.
DEVICE void send(u32 target, u32 source, u32 bytes, u32 bar, u32 rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   on_rank(target, rank)),
               "r"(source), "r"(bytes), "r"(on_rank(bar, rank))
               : "memory");
}
// 16 bytes into the shared memory behind an address of `on_rank`, whose own `bar` counts them.
DEVICE void store_there(u32 target, u32 a, u32 b, u32 c, u32 d, u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   target),
               "r"(a), "r"(b), "r"(c), "r"(d), "r"(bar)
               : "memory");
}
DEVICE void arrive_there(u32 bar, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(on_rank(bar, rank)) : "memory");
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
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The fast form of gemm.gelu.
DEVICE float gelu(float x) {
  float half = 0.5f * x, tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(half * (2 * 0.79862082f + half * half * (8 * 0.0355207f))));
  return half + half * tanh;
}
