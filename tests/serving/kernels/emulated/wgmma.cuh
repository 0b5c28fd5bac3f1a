// wgmma.cuh and wide_results.cuh on any processor. Products are computed when somebody waits for them: what they read
// is what lies there then, and until then their results are NaN.
#pragma once

#include <bit>

#include "cluster.cuh"

inline u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }
inline float __uint_as_float(u32 x) { return std::bit_cast<float>(x); }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// 0 to 448, then NaN.
inline float widen_e4m3(u8 value) {
  int exponent = value >> 3 & 15, rest = value & 7;
  if ((value & 127) == 127) return NAN;
  return (value & 128 ? -1 : 1) * (exponent ? ldexpf(8 + rest, exponent - 10) : ldexpf(rest, -9));
}
inline u8 narrow_half(u16 half) {
  static const std::vector<u8> table = [] {
    std::vector<u8> all(1 << 16, 127);
    for (u32 i = 0; i < all.size(); i++) {
      float value = widen(i), best = INFINITY;
      for (int j = 0; j < 127; j++) {
        float away = fabsf(widen_e4m3(j) - std::min(fabsf(value), 448.0f));
        if (away < best || (away == best && j % 2 == 0)) best = away, all[i] = j | (i >> 15) << 7;
      }
    }
    return all;
  }();
  return table[half];
}

inline void begin_store(const TensorMap* map, u32 from, int column, int row) {
  Box box = read_map(map, from, column, row);
  Thread* thread = Thread::now;
  u8* memory = Thread::own().memory;
  u32 warp = Thread::number() / 32, when = ++thread->begun;
  touch(memory + from, box.pitch() * box.rows, {OF_READS + warp, when}, false);
  move_box(box, from, column, row, [=](u32, u8* to) {
    if (to) touch(to, 16, {OF_WRITES + warp, when}, true);
  });
  thread->stores++;
  machine->copies.push_back([=] {
    move_box(box, from, column, row, [=](u32 at, u8* to) {
      if (to) memcpy(to, memory + at, 16);
    });
    thread->stores--;
  });
}
inline void wait_for_any(u32 clocks) {
  wait_until([] { return Thread::now->stores == 0; });
  if (ORDERED) Thread::known().all.at[clocks + Thread::number() / 32] = Thread::now->begun;
}
inline void wait_for_reads() { wait_for_any(OF_READS); }
inline void wait_for_stores() { wait_for_any(OF_WRITES); }

inline u32 draw(u32* ticket, u32 last) {
  u32 own = *ticket;
  *ticket = own >= last ? 0 : own + 1;
  return own;
}
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void leave_registers() {}
inline int __shfl_sync(u32, int value, int) { return value; }  // of what all have

inline void store_matrices(u32 at, const u32 (&of)[4]) { store_any(at, of, false); }
inline void store2(u32 at, u32 low, u32 high) {
  require(at % 8 == 0, "a store of 8 bytes that begins elsewhere");
  touch_plainly(at / 16 * 16, true);
  u32 values[] = {low, high};
  memcpy(Thread::own().memory + at, values, 8);
}
inline void load_matrices(u32 at, u32 (&to)[4]) { load_any(to, at, false); }

template <int BYTES = 128>
u64 describe(u32 at) {
  return (u64)BYTES << 32 | at / 16;
}
// Where byte `at` of a row lies, swizzled.
inline u32 find_byte(u64 block, int row, int at) {
  u32 pitch = block >> 32;
  return swizzle((u32)block * 16 + row * pitch + at, pitch);
}
// By warps: each reads its own rows of the first operand, and all of the second.
inline void begin_product(Product product) {
  Thread& own = *Thread::now;
  require(own.is_open, "a product that no fence keeps behind its registers");
  int count = product.columns / 2;
  float* to = product.to;
  product.group = own.groups, own.products.push_back(product);
  if (std::none_of(own.results.begin(), own.results.end(), [&](Results& each) { return each.to == to; }))
    own.results.push_back({to, {to, to + count}});
  std::fill(to, to + count, NAN);
  if (Thread::lane() > 0) return;
  u32 warp = Thread::number() / 32;
  Access access = {OF_PRODUCTS + warp, (u32)own.groups + 1};
  auto read = [&](u64 block, int row, int bytes) {
    u32 pitch = block >> 32, at = (u32)block * 16;
    require(at / pitch % 8 == 0 && at % pitch % 32 == 0, "an operand that begins where its swizzle does not");
    for (int i = 0; i < bytes; i += 16) touch(Thread::own().memory + find_byte(block, row, i), 16, access, false);
  };
  for (int row = 0; row < (product.is_transposed ? 16 : product.columns); row++)
    read(product.right_block, row, product.is_transposed ? product.columns * 2 : 32);
  for (int row = 0; row < 16 && !product.left; row++) read(product.left_block, warp % 4 * 16 + row, 32);
}
template <bool IS_E4M3>
void multiply_64(float (&d)[96], u64 a, u64 b, int adds) {
  begin_product({d, nullptr, a, b, 192, adds, !IS_E4M3});
}
template <bool IS_E4M3>
void multiply_64_64(float (&d)[32], u64 a, u64 b, int adds) {
  begin_product({d, nullptr, a, b, 64, adds, !IS_E4M3});
}
inline void multiply_registers(float (&d)[96], const u32 (&a)[4], u64 b, int adds) {
  begin_product({d, a, 0, b, 192, adds});
}
template <int COLUMNS, bool TRANSPOSED>
void multiply_half(float (&d)[COLUMNS / 2], const u32 (&a)[4], u64 b, int adds) {
  begin_product({d, a, 0, b, COLUMNS, adds, true, TRANSPOSED});
}
inline void open_products() { Thread::now->is_open = true; }
inline void close_products() { Thread::now->groups++, Thread::now->is_open = false; }

// By its bits.
inline const float* values_of_e4m3() {
  static const std::vector<float> table = [] {
    std::vector<float> all;
    for (int i = 0; i < 256; i++) all.push_back(widen_e4m3(i));
    return all;
  }();
  return table.data();
}
// Value `at` of the row.
inline float read_value(const u8* memory, u64 block, int row, int at, bool is_half) {
  u16 half;
  if (!is_half) return values_of_e4m3()[memory[find_byte(block, row, at)]];
  memcpy(&half, memory + find_byte(block, row, 2 * at), 2);
  return widen(half);
}
// Of the registers with a warp's 16 rows.
inline float read_register(Thread** lanes, size_t number, int row, int at, bool is_half) {
  int size = is_half ? 2 : 1, lane = row % 8 * 4 + at * size % 16 / 4;
  u32 word = lanes[lane]->products[number].left[at * size / 16 * 2 + row / 8] >> at * size % 4 * 8;
  return is_half ? widen(word) : values_of_e4m3()[word & 255];
}
// A warp's 16 rows.
inline void compute(Thread** lanes, size_t number) {
  const u8* memory = machine->programs[lanes[0]->program].memory;
  const Product& first = lanes[0]->products[number];
  int depth = first.is_half ? 16 : 32;
  float left[32][16], values[32], sums[16], *places[32];
  for (int row = 0; row < 16; row++)
    for (int i = 0; i < depth; i++)
      left[i][row] = first.left ? read_register(lanes, number, row, i, first.is_half)
                                : read_value(memory, first.left_block, lanes[0]->x / 32 % 4 * 16 + row, i, first.is_half);
  for (int lane = 0; lane < 32; lane++)
    for (Results& each : lanes[lane]->results)
      if (each.to == lanes[lane]->products[number].to) places[lane] = each.values.data();
  for (int column = 0; column < first.columns; column++) {
    for (int i = 0; i < depth; i++)
      values[i] = first.is_transposed ? read_value(memory, first.right_block, i, column, true)
                                      : read_value(memory, first.right_block, column, i, first.is_half);
    auto find = [&](int row) -> float& {
      return places[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
    };
    for (int row = 0; row < 16; row++) sums[row] = first.adds ? find(row) : 0;
    for (int i = 0; i < depth; i++)
      for (int row = 0; row < 16; row++) sums[row] += left[i][row] * values[i];
    for (int row = 0; row < 16; row++) find(row) = sums[row];
  }
}
inline void finish_products(Thread** lanes, int groups) {
  auto& all = lanes[0]->products;
  size_t count = 0;
  for (; count < all.size() && all[count].group < groups; count++) compute(lanes, count);
  for (int lane = 0; lane < 32; lane++) {
    Thread& own = *lanes[lane];
    own.products.erase(own.products.begin(), own.products.begin() + count);
    std::erase_if(own.results, [&](Results& each) {
      for (Product& left : own.products)
        if (left.to == each.to) return false;
      std::copy(each.values.begin(), each.values.end(), each.to);
      return true;
    });
  }
}
template <int LEFT>
void wait_for_products() {
  int groups = Thread::now->groups - LEFT;
  Thread** lanes = &machine->threads[Thread::number() / 32 * 32];
  meet_warp([=] { finish_products(lanes, groups); });
  if (ORDERED) Thread::known().all.at[OF_PRODUCTS + Thread::number() / 32] = std::max(groups, 0);
}
template <int COUNT>
void fence_results(float (&)[COUNT]) {}
