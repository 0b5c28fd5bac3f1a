// What Hopper adds for kernels that feed its tensor cores through the copy engine: tiles that are stored, products of
// 64 rows by four warps, and launches that begin before the kernel before them has ended.
#pragma once

#include "cluster.cuh"

typedef unsigned long long u64;

DEVICE void begin_store(const TensorMap* map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
// Returns once the tiles whose stores were begun may be written again.
DEVICE void wait_for_reads() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// The ticket, which goes up by one, and from `last` to 0.
DEVICE u32 draw(u32* ticket, u32 last) { return atomicInc(ticket, last); }

DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// 8 x 8 halves four times, in the order of the lanes that name their rows. The compiler may move other accesses past
// them.
DEVICE void store_matrices(u32 at, const u32 (&of)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(of[0]), "r"(of[1]),
               "r"(of[2]), "r"(of[3]));
}
DEVICE void store2(u32 at, u32 low, u32 high) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(low), "r"(high));
}
DEVICE void load_matrices(u32 at, u32 (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}

// An operand in rows of 128 or 64 bytes, swizzled as the copy engine writes it; 32 bytes further is 2 more.
template <int BYTES = 128>
DEVICE u64 describe(u32 at) {
  constexpr u64 SWIZZLE = BYTES == 128 ? 1 : 2;
  return (u64)(at >> 4 & 0x3fff) | 1ull << 16 | (u64)(BYTES / 2) << 32 | SWIZZLE << 62;
}

#define R8(i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define R16(i) R8(i), R8(i + 8)
#define R32(i) R16(i), R16(i + 16)
#define R96 R32(0), R32(32), R32(64)
#define D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define D32                                                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define D96                                                                                                          \
  D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "    \
      "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
// `adds` is the operand ADDS: without it the product takes the place of what d held.
#define PRODUCT(ADDS, FORM, D, OPERANDS, ORDERS)                                              \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned." FORM " {" D "}, " OPERANDS \
  ", adds, 1, 1" ORDERS ";\n}"

// Of 64 rows by four warps: 32 bytes of each row of the operands, 16 values of float16 or 32 of E4M3.
template <bool IS_E4M3>
DEVICE void multiply_64(float (&d)[96], u64 a, u64 b, int adds) {
  if constexpr (IS_E4M3)
    asm volatile(PRODUCT("%98", "m64n192k32.f32.e4m3.e4m3", D96, "%96, %97", "")
                 : R96
                 : "l"(a), "l"(b), "r"(adds));
  else
    asm volatile(PRODUCT("%98", "m64n192k16.f32.f16.f16", D96, "%96, %97", ", 0, 0")
                 : R96
                 : "l"(a), "l"(b), "r"(adds));
}
// With 64 columns.
template <bool IS_E4M3>
DEVICE void multiply_64_64(float (&d)[32], u64 a, u64 b, int adds) {
  if constexpr (IS_E4M3)
    asm volatile(PRODUCT("%34", "m64n64k32.f32.e4m3.e4m3", D32, "%32, %33", "") : R32(0) : "l"(a), "l"(b), "r"(adds));
  else
    asm volatile(PRODUCT("%34", "m64n64k16.f32.f16.f16", D32, "%32, %33", ", 0, 0")
                 : R32(0)
                 : "l"(a), "l"(b), "r"(adds));
}
// In E4M3 with the first operand in registers: of rows l / 4 and 8 + l / 4 of a warp's 16 the 4 bytes at 4 (l % 4), then
// those at 16 + 4 (l % 4).
DEVICE void multiply_registers(float (&d)[96], const u32 (&a)[4], u64 b, int adds) {
  asm volatile(PRODUCT("%101", "m64n192k32.f32.e4m3.e4m3", D96, "{%96, %97, %98, %99}, %100", "")
               : R96
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}
// In float16 with the first operand in registers, as mma.m16n8k16 has it by warps. Of the second, columns are rows in
// memory, or, TRANSPOSED, 16 rows of the product are.
template <int COLUMNS, bool TRANSPOSED>
DEVICE void multiply_half(float (&d)[COLUMNS / 2], const u32 (&a)[4], u64 b, int adds) {
  if constexpr (COLUMNS == 32)
    asm volatile(PRODUCT("%21", "m64n32k16.f32.f16.f16", D16, "{%16, %17, %18, %19}, %20", ", %22")
                 : R16(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(TRANSPOSED));
  else
    asm volatile(PRODUCT("%37", "m64n64k16.f32.f16.f16", D32, "{%32, %33, %34, %35}, %36", ", %38")
                 : R32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(TRANSPOSED));
}
#undef PRODUCT
#undef D96
#undef D32
#undef D16
#undef R96
#undef R32
#undef R16
#undef R8
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from reading results before the wait.
template <int COUNT>
DEVICE void fence_results(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
