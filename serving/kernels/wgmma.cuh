// What Hopper adds for kernels that feed its tensor cores through the copy engine: tiles that are stored, products of
// 64 x 192 rows by four warps, and launches that begin before the kernel before them has ended.
#pragma once

#include "cluster.cuh"

typedef unsigned long long u64;

// Is waited for with the next tile that is stored.
DEVICE void begin_store(const TensorMap* map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
// Returns once the tile may be written again.
DEVICE void store_tile(const TensorMap* map, u32 from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

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
DEVICE void load_matrices(u32 at, u32 (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}

// An operand in rows of 128 bytes, swizzled as the copy engine writes it; 32 bytes further is 2 more, 8 rows 64.
DEVICE u64 describe(u32 at) { return (u64)(at >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

#define R8(i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PRODUCT(TYPES, ORDERS)                                                                                         \
  asm volatile(                                                                                                        \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192" TYPES                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "    \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
      "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, " \
      "%67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
      "%89, %90, %91, %92, %93, %94, %95}, %96, %97, adds, 1, 1" ORDERS ";\n}"                                         \
      : R8(0), R8(8), R8(16), R8(24), R8(32), R8(40), R8(48), R8(56), R8(64), R8(72), R8(80), R8(88)                   \
      : "l"(a), "l"(b), "r"(adds))
// 32 bytes of each row of the operands: 16 values of float16, or 32 of E4M3.
template <bool IS_E4M3>
DEVICE void multiply_64(float (&d)[96], u64 a, u64 b, int adds) {
  if constexpr (IS_E4M3)
    PRODUCT("k32.f32.e4m3.e4m3", "");
  else
    PRODUCT("k16.f32.f16.f16", ", 0, 0");
}
#undef PRODUCT
#undef R8
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from reading results before the wait.
DEVICE void fence_results(float (&d)[96]) {
#pragma unroll
  for (int i = 0; i < 96; i++) asm volatile("" : "+f"(d[i])::"memory");
}
