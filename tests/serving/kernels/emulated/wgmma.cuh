// wgmma.cuh and wide_results.cuh on any processor. Products are computed when somebody waits for them: what they read
// is what lies there then, and until then their results are NaN.
#pragma once

#include "cluster.cuh"

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

inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void leave_registers() {}
inline int __shfl_sync(u32, int value, int) { return value; }  // of what all have

inline void store_matrices(u32 at, const u32 (&of)[4]) { store_any(at, of, false); }
inline void load_matrices(u32 at, u32 (&to)[4]) { load_any(to, at, false); }

template <int BYTES = 128>
u64 describe(u32 at) {
  static_assert(BYTES == 64);
  return at / 16;
}
inline u32 find_bytes(u64 block, int row) { return block * 16 + row * 64; }
// By warps: each reads its own rows of the first operand, and all of the second.
inline void begin_product(float* to, int count, const u32* left, u64 left_block, u64 right_block, int adds) {
  Thread& own = *Thread::now;
  require(own.is_open, "a product that no fence keeps behind its registers");
  own.products.push_back({to, left, left_block, right_block, count * 2, adds, own.groups});
  if (std::none_of(own.results.begin(), own.results.end(), [&](Results& each) { return each.to == to; }))
    own.results.push_back({to, {to, to + count}});
  std::fill(to, to + count, NAN);
  if (Thread::lane() > 0) return;
  u32 warp = Thread::number() / 32;
  Access access = {OF_PRODUCTS + warp, (u32)own.groups + 1};
  auto read = [&](u64 block, int row) {
    u32 at = find_bytes(block, row);
    require(block / 4 * 64 % 512 == 0 && block % 4 % 2 == 0, "an operand that begins where its swizzle does not");
    for (int half = 0; half < 2; half++) touch(Thread::own().memory + swizzle(at + half * 16, 64), 16, access, false);
  };
  for (int row = 0; row < count * 2; row++) read(right_block, row);
  for (int row = 0; row < 16 && !left; row++) read(left_block, warp % 4 * 16 + row);
}
template <bool IS_E4M3>
void multiply_64(float (&d)[96], u64 a, u64 b, int adds) {
  static_assert(IS_E4M3);
  begin_product(d, 96, nullptr, a, b, adds);
}
inline void multiply_64_64(float (&d)[32], u64 a, u64 b, int adds) { begin_product(d, 32, nullptr, a, b, adds); }
inline void multiply_registers(float (&d)[96], const u32 (&a)[4], u64 b, int adds) {
  begin_product(d, 96, a, 0, b, adds);
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
inline void read_values(const u8* memory, u64 block, int row, float* to) {
  const float* table = values_of_e4m3();
  for (int i = 0; i < 32; i++) to[i] = table[memory[swizzle(find_bytes(block, row) + i, 64)]];
}
// A warp's 16 rows.
inline void compute(Thread** lanes, size_t number) {
  const u8* memory = machine->programs[lanes[0]->program].memory;
  const Product& first = lanes[0]->products[number];
  float left[32][16], values[32], sums[16], *places[32];
  for (int row = 0; row < 16; row++) {
    if (!first.left) read_values(memory, first.left_block, lanes[0]->x / 32 % 4 * 16 + row, values);
    for (int i = 0; i < 32 && first.left; i++) {
      u32 word = lanes[row % 8 * 4 + i % 16 / 4]->products[number].left[i / 16 * 2 + row / 8];
      values[i] = values_of_e4m3()[word >> i % 4 * 8 & 255];
    }
    for (int i = 0; i < 32; i++) left[i][row] = values[i];
  }
  for (int lane = 0; lane < 32; lane++)
    for (Results& each : lanes[lane]->results)
      if (each.to == lanes[lane]->products[number].to) places[lane] = each.values.data();
  for (int column = 0; column < first.columns; column++) {
    read_values(memory, first.right_block, column, values);
    auto find = [&](int row) -> float& {
      return places[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
    };
    for (int row = 0; row < 16; row++) sums[row] = first.adds ? find(row) : 0;
    for (int i = 0; i < 32; i++)
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
