// cluster.cuh on any processor: what the hardware does is done here, every thread is a fiber of `run.cpp`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <unordered_map>
#include <vector>

#include "order.h"

typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define DEVICE inline
#define __global__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx Thread::index()
#define blockIdx Block{Thread::now->program + machine->first}
#define gridDim Block{machine->grid}
#define blockDim Block{PROGRAM_THREADS}

struct uint4 {
  u32 x, y, z, w;
};
struct uint2 {
  u32 x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
using std::min;

struct Block {
  int x;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }

constexpr u32 FIRST = 1024;  // where a program's shared memory begins: before it lies what CUDA keeps to itself

struct Barrier {
  int count = 0, pending = 0;
  long bytes = 0;
  u32 phase = 0;
  Phases phases;
};
// Of a warp, or of threads that meet: how many are there, and which meeting it is.
struct Meeting {
  int here = 0, turn = 0;
  Knowledge known[2];  // to who is there, of this meeting and the one before
};
// One of the tensor cores that a thread has begun: 32 bytes of each row, or, transposed, 16 rows of its second operand.
struct Product {
  float* to;
  const u32* left;  // registers, or null
  u64 left_block, right_block;
  int columns, adds;
  bool is_half = false, is_transposed = false;
  int group = 0;
};
// Results that are not yet in their registers.
struct Results {
  float* to;
  std::vector<float> values;
};
struct Warp {
  Meeting meeting;
  u32 in[32][8], out[32][4];
};
struct Program {
  std::vector<u8> room;
  u8* memory;  // the byte of address 0
  std::unordered_map<u32, Barrier> barriers;  // by address
  Meeting all, some;
  Warp warps[PROGRAM_THREADS / 32];
  u32 num_barriers = 0, num_ended = 0;  // the latter threads
};

// What the fibers share.
struct Machine {
  std::vector<Program> programs = std::vector<Program>(PROGRAMS);
  std::vector<std::function<void()>> copies;  // that have begun, and land at any time
  Meeting cluster;
  int first, grid;  // of its programs, and of all
  std::vector<Knowledge> known = std::vector<Knowledge>(NUM_THREADS);
  Cells cells;
  std::vector<struct Thread*> threads;
  const char* failure = nullptr;
  unsigned long long progress = 0;
};
inline Machine* machine;

struct Thread {
  int program, x, cluster_turn, stores = 0, begun = 0, groups = 0;  // stores in flight, all, and groups of products
  bool is_open = false;  // to products
  std::vector<Product> products;
  std::vector<Results> results;
  static Thread* now;  // none while copies land
  static void stop();  // until somebody else has run

  static const Thread& index() { return *now; }
  static u32 number() { return now->program * PROGRAM_THREADS + now->x; }
  static Knowledge& known() { return machine->known[number()]; }
  static Program& own() { return machine->programs[now->program]; }
  static Warp& warp() { return own().warps[now->x / 32]; }
  static int lane() { return now->x % 32; }
};
inline Thread* Thread::now;

inline void require(bool holds, const char* otherwise) {
  if (holds) return;
  if (!machine->failure) machine->failure = otherwise;
  while (Thread::now) Thread::stop();  // never to go on
}
template <typename Condition>
void wait_until(Condition holds) {
  while (!holds()) Thread::stop();
  machine->progress++;
}
// What a thread knows is known to others from here on; what it does next is not.
inline void tell(Knowledge& others) {
  if (!ORDERED) return;
  others.join(Thread::known());
  require(Thread::known().tick(Thread::number()) < 32000, "more time than clocks have");
}
inline void learn(const Knowledge& others) {
  if (ORDERED) Thread::known().join(others);
}
inline void touch(const void* at, u32 bytes, Access access, bool writes) {
  if (!ORDERED) return;
  require(machine->cells.touch(at, bytes, access, writes, Thread::known()),
          writes ? "a write that nothing keeps behind other accesses" : "a read that nothing keeps behind the write");
}
inline void touch_plainly(u32 at, bool writes) {
  u32 own = Thread::number();
  touch(Thread::own().memory + at, 16, {own, ORDERED ? Thread::known().time(own) : 0, true}, writes);
}
// The last of `count` threads does `work` for all.
template <typename Work>
void meet_at(Meeting& meeting, int count, Work work) {
  int turn = meeting.turn;
  Knowledge& known = meeting.known[turn & 1];
  tell(known);
  if (++meeting.here == count) {
    work(), meeting.here = 0, meeting.turn++, machine->progress++;
  } else {
    wait_until([&] { return meeting.turn != turn; });
  }
  learn(known);
}
template <typename Work>
void meet_warp(Work work) {
  meet_at(Thread::warp().meeting, 32, work);
}
template <int THREADS>
void meet_threads() {
  meet_at(Thread::own().some, THREADS, [] {});
}
inline void __syncthreads() { meet_at(Thread::own().all, PROGRAM_THREADS, [] {}); }
inline void __syncwarp() { meet_warp([] {}); }
inline float __shfl_xor_sync(u32, float value, int far) {
  Warp& warp = Thread::warp();
  memcpy(warp.in[Thread::lane()], &value, 4);
  meet_warp([&] {
    for (int lane = 0; lane < 32; lane++) warp.out[lane][0] = warp.in[lane ^ far][0];
  });
  memcpy(&value, warp.out[Thread::lane()], 4);
  return value;
}

inline u32 address_of(const void* p) { return (const u8*)p - Thread::own().memory; }
inline u32 cluster_rank() { return Thread::now->program; }
inline void arrive_cluster() {
  Meeting& meeting = machine->cluster;
  Thread::now->cluster_turn = meeting.turn;
  tell(meeting.known[meeting.turn & 1]);
  if (++meeting.here == NUM_THREADS) meeting.here = 0, meeting.turn++, machine->progress++;
}
inline void wait_cluster() {
  wait_until([] { return machine->cluster.turn != Thread::now->cluster_turn; });
  learn(machine->cluster.known[Thread::now->cluster_turn & 1]);
}

inline Barrier& find_barrier(int program, u32 bar) {
  require(bar % 8 == 0 && bar >= FIRST && bar < FIRST + SHARED, "a barrier outside of the memory");
  require(machine->programs[program].num_ended < PROGRAM_THREADS, "a barrier of a program that has ended");
  return machine->programs[program].barriers[bar];
}
inline void settle(Barrier& barrier) {
  require(barrier.count > 0 && barrier.pending >= 0, "an arrival that a barrier does not expect");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase++, barrier.pending = barrier.count, machine->progress++;
  bool holds = !ORDERED || barrier.phases.complete(barrier.phase);
  require(holds, "a phase that may end before all have seen the one before");
}
inline void barrier_init(u32 bar, u32 count) {
  Barrier& barrier = find_barrier(Thread::now->program, bar);
  require(barrier.count == 0, "a barrier that is there already");
  barrier.count = barrier.pending = count;
  u32 number = Thread::own().num_barriers++;
  if (!ORDERED) return;
  require(number < MOST_BARRIERS, "more barriers than the emulation numbers");
  barrier.phases.made = {Thread::number(), Thread::known().time(Thread::number()), true};
  barrier.phases.number = OF_BARRIERS + Thread::now->program * MOST_BARRIERS + number;
}
inline void fence_init() {}
inline void fence_copies() {
  if (!ORDERED) return;
  Thread::known().fence();
  Thread::known().tick(Thread::number());
}
inline void arrive_at(Barrier& barrier, u32 bytes) {
  Phases& phases = barrier.phases;
  u32 own = Thread::number();
  if (ORDERED) require(phases.follows(Thread::known(), barrier.phase), "an arrival that may count to another phase");
  if (ORDERED && bytes) phases.asked = {own, Thread::known().time(own), true};
  tell(phases.arrived);
  barrier.bytes += bytes, barrier.pending--;
  settle(barrier);
}
inline void barrier_expect(u32 bar, u32 bytes) { arrive_at(find_barrier(Thread::now->program, bar), bytes); }
inline void barrier_arrive(u32 bar) { barrier_expect(bar, 0); }
inline void barrier_wait(u32 bar, u32 parity) {
  Barrier& barrier = find_barrier(Thread::now->program, bar);
  Phases& phases = barrier.phases;
  int phase = ORDERED ? phases.choose(Thread::known().all.at[phases.number], parity) : 0;
  wait_until([&] { return barrier.count && (barrier.phase & 1) != (parity & 1); });
  if (!ORDERED) return;
  require((int)barrier.phase == phase + 1, "a wait that has missed its phase");
  Knowledge& known = Thread::known();
  learn(phases.told);
  known.all.at[phases.number] = std::max<short>(known.all.at[phases.number], barrier.phase);
  phases.passed.push_back({Thread::number(), known.tick(Thread::number())});
}

// `bar` counts the bytes, which are there in the phase that it returns, or now.
inline Access begin_copy(int program, u32 target, u32 bytes, u32 bar, bool is_plain, std::function<void(u8*)> copy) {
  require(target >= FIRST && target + bytes <= FIRST + SHARED, "a copy to outside of the memory");
  Barrier& barrier = find_barrier(program, bar);
  Phases& phases = barrier.phases;
  Access access = {phases.number, barrier.phase + 1, is_plain};
  if (ORDERED) {
    phases.flying += bytes, phases.arrived.before.join(Thread::known().before);
    require(phases.flying <= barrier.bytes && Thread::known().all.have(phases.asked), "bytes that nobody expects yet");
    touch(machine->programs[program].memory + target, bytes, access, true);
    Thread::known().tick(Thread::number());
  }
  machine->copies.push_back([=, &barrier] {
    copy(machine->programs[program].memory);
    barrier.bytes -= bytes, barrier.phases.flying -= bytes;
    settle(barrier);
  });
  return access;
}
inline void copy_in(u32 target, const void* source, u32 bytes, u32 bar) {
  require(target % 16 == 0 && (uintptr_t)source % 16 == 0 && bytes % 16 == 0, "a copy not in pieces of 16 bytes");
  int own = Thread::now->program;
  begin_copy(own, target, bytes, bar, false, [=](u8* memory) { memcpy(memory + target, source, bytes); });
}
inline void send(u32 target, u32 source, u32 bytes, u32 bar, u32 rank) {
  const u8* from = Thread::own().memory + source;  // is read when the copy lands
  auto copy = [=](u8* memory) { memcpy(memory + target, from, bytes); };
  touch(from, bytes, begin_copy(rank, target, bytes, bar, false, copy), false);
}
// Addresses of other programs lie beyond all of a program's.
constexpr u32 APART = 1 << 24;
inline u32 on_rank(u32 address, u32 rank) { return address + (rank + 1) * APART; }
inline void store_there(u32 target, u32 a, u32 b, u32 c, u32 d, u32 bar) {
  u32 rank = target / APART - 1, at = target % APART;
  require(rank < PROGRAMS && bar / APART - 1 == rank && at % 16 == 0, "a store to none of the programs");
  std::vector<u32> values = {a, b, c, d};
  begin_copy(rank, at, 16, bar % APART, true, [=](u8* memory) { memcpy(memory + at, values.data(), 16); });
}
inline void arrive_there(u32 bar, u32 rank) { arrive_at(find_barrier(rank, bar), 0); }

// As the test writes it; sizes of values are in bytes.
struct Box {
  u8* matrix;
  int64_t height, width, rows, columns, size;

  u32 pitch() const { return columns * size; }
  u8* find(int column, int row) const { return matrix + (row * width + column) * size; }
};
struct alignas(64) TensorMap {
  char bytes[128];
};
inline void fetch_map(const TensorMap*) {}
// Rows of 64 or 128 bytes, whose 16-byte chunks are swapped by what the address says of the row.
inline u32 swizzle(u32 at, u32 pitch) { return at ^ (at >> 7 & pitch / 16 - 1) << 4; }
inline Box read_map(const TensorMap* map, u32 at, int column, int row) {
  Box box;
  memcpy(&box, map->bytes, sizeof box);
  require((box.pitch() == 128 || box.pitch() == 64) && at % 1024 == 0, "a box that begins where its swizzle does not");
  require(column >= 0 && row >= 0 && column + box.columns <= box.width, "a box outside of its matrix");
  return box;
}
template <typename Move>
void move_box(const Box& box, u32 at, int column, int row, Move move) {
  for (u32 byte = 0; byte < box.pitch() * box.rows; byte += 16) {
    int64_t own = row + byte / box.pitch();
    move(swizzle(at + byte, box.pitch()), own < box.height ? box.find(column, own) + byte % box.pitch() : nullptr);
  }
}
inline void load_tile(u32 to, const TensorMap* map, int column, int row, u32 bar) {
  Box box = read_map(map, to, column, row);
  Access access = begin_copy(Thread::now->program, to, box.pitch() * box.rows, bar, false, [=](u8* memory) {
    move_box(box, to, column, row, [=](u32 at, const u8* from) {
      from ? memcpy(memory + at, from, 16) : memset(memory + at, 0, 16);
    });
  });
  move_box(box, to, column, row, [=](u32, const u8* from) {
    if (from) touch(from, 16, access, false);
  });
}

// Four matrices of 8 x 8; `move` takes a lane's register of a matrix and where its two halves lie.
template <typename Move>
void move_matrices(u32 address, bool writes, bool is_transposed, Move move) {
  Warp& warp = Thread::warp();
  u8* memory = Thread::own().memory;
  warp.in[Thread::lane()][4] = address;
  touch_plainly(address, writes);
  meet_warp([&] {
    for (int matrix = 0; matrix < 4; matrix++) {
      u32 banks = 0;
      for (int row = 0; row < 8; row++) {
        u32 at = warp.in[8 * matrix + row][4];
        require(at % 16 == 0 && at >= FIRST && at + 16 <= FIRST + SHARED, "a row outside of the memory");
        banks |= 1 << at / 16 % 8;
      }
      require(banks == 0xff, "eight rows of which some are in the same banks");
      for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
          int across = lane % 4 * 2 + half, row = is_transposed ? across : lane / 4;
          u8* there = memory + warp.in[8 * matrix + row][4] + 2 * (is_transposed ? lane / 4 : across);
          move(warp, lane, matrix, half, there);
        }
    }
  });
}
inline void load_any(u32* to, u32 address, bool is_transposed) {
  move_matrices(address, false, is_transposed, [](Warp& warp, int lane, int matrix, int half, const u8* there) {
    memcpy((u16*)&warp.out[lane][matrix] + half, there, 2);
  });
  memcpy(to, Thread::warp().out[Thread::lane()], 16);
}
inline void load4(u32* to, u32 address) { load_any(to, address, false); }
inline void load4_transposed(u32* to, u32 address) { load_any(to, address, true); }
inline void store_any(u32 address, const u32* from, bool is_transposed) {
  memcpy(Thread::warp().in[Thread::lane()], from, 16);
  move_matrices(address, true, is_transposed, [](Warp& warp, int lane, int matrix, int half, u8* there) {
    memcpy(there, (const u16*)&warp.in[lane][matrix] + half, 2);
  });
}
inline void store4_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  u32 from[4] = {a, b, c, d};
  store_any(address, from, true);
}

inline float widen(u16 half) {
  _Float16 value;
  memcpy(&value, &half, 2);
  return value;
}
inline u32 pack(float low, float high) {
  _Float16 both[2] = {(_Float16)low, (_Float16)high};
  u32 packed;
  memcpy(&packed, both, 4);
  return packed;
}
inline float2 unpack(u32 both) { return {widen(both), widen(both >> 16)}; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

inline void multiply(float* acc, const u32* a, u32 b0, u32 b1) {
  Warp& warp = Thread::warp();
  u32* own = warp.in[Thread::lane()];
  memcpy(own, a, 16), own[4] = b0, own[5] = b1;
  meet_warp([] {});
  int row = Thread::lane() / 4, column = Thread::lane() % 4 * 2;
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) {
      const u32* left = warp.in[(row * 4 + k % 8 / 2)];
      const u32* right = warp.in[(column + i % 2) * 4 + k % 8 / 2];
      acc[i] += widen(left[i / 2 + k / 8 * 2] >> k % 2 * 16) * widen(right[4 + k / 8] >> k % 2 * 16);
    }
  meet_warp([] {});  // nobody's operands change before
}
