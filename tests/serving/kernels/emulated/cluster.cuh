// cluster.cuh on any processor: what the hardware does is done here, every thread is a fiber of `run.cpp`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define DEVICE inline
#define __global__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx Thread::index()

struct uint4 {
  u32 x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }

constexpr u32 FIRST = 1024;  // where a program's shared memory begins: before it lies what CUDA keeps to itself

struct Barrier {
  int count = 0, pending = 0;
  long bytes = 0;
  u32 phase = 0;
};
// Of a warp, or of threads that meet: how many are there, and which meeting it is.
struct Meeting {
  int here = 0, turn = 0;
};
struct Warp {
  Meeting meeting;
  u32 in[32][8], out[32][4];
};
struct Program {
  std::vector<u8> room;
  u8* memory;  // the byte of address 0
  std::vector<Barrier> barriers = std::vector<Barrier>((FIRST + SHARED) / 8);
  Meeting all, some;
  Warp warps[17];
};

// What the fibers share.
struct Machine {
  std::vector<Program> programs = std::vector<Program>(HEADS);
  std::vector<std::function<void()>> copies;  // that have begun, and land at any time
  Meeting cluster;
  const char* failure = nullptr;
  unsigned long long progress = 0;
};
inline Machine* machine;

struct Thread {
  int program, x, cluster_turn;
  static Thread* now;  // none while copies land
  static void stop();  // until somebody else has run

  static Thread index() { return *now; }
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
// The last of `count` threads does `work` for all.
template <typename Work>
void meet_at(Meeting& meeting, int count, Work work) {
  int turn = meeting.turn;
  if (++meeting.here == count) {
    work(), meeting.here = 0, meeting.turn++, machine->progress++;
  } else {
    wait_until([&] { return meeting.turn != turn; });
  }
}
template <typename Work>
void meet_warp(Work work) {
  meet_at(Thread::warp().meeting, 32, work);
}
template <int THREADS>
void meet_threads() {
  meet_at(Thread::own().some, THREADS, [] {});
}
inline void __syncthreads() { meet_at(Thread::own().all, 17 * 32, [] {}); }
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
  if (++meeting.here == HEADS * 17 * 32) meeting.here = 0, meeting.turn++, machine->progress++;
}
inline void wait_cluster() {
  wait_until([] { return machine->cluster.turn != Thread::now->cluster_turn; });
}

inline Barrier& find_barrier(int program, u32 bar) {
  require(bar % 8 == 0 && bar >= FIRST && bar < FIRST + SHARED, "a barrier outside of the memory");
  return machine->programs[program].barriers[bar / 8];
}
inline void settle(Barrier& barrier) {
  require(barrier.count > 0 && barrier.pending >= 0, "an arrival that a barrier does not expect");
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase++, barrier.pending = barrier.count, machine->progress++;
}
inline void barrier_init(u32 bar, u32 count) {
  Barrier& barrier = find_barrier(Thread::now->program, bar);
  barrier.count = barrier.pending = count;
}
inline void fence_init() {}
inline void fence_copies() {}
inline void barrier_expect(u32 bar, u32 bytes) {
  Barrier& barrier = find_barrier(Thread::now->program, bar);
  barrier.bytes += bytes, barrier.pending--;
  settle(barrier);
}
inline void barrier_arrive(u32 bar) { barrier_expect(bar, 0); }
inline void barrier_wait(u32 bar, u32 parity) {
  Barrier& barrier = find_barrier(Thread::now->program, bar);
  wait_until([&] { return barrier.count && (barrier.phase & 1) != (parity & 1); });
}

inline void begin_copy(int program, u32 target, u32 bytes, u32 bar, std::function<void(u8*)> copy) {
  require(target >= FIRST && target + bytes <= FIRST + SHARED, "a copy to outside of the memory");
  Barrier& barrier = find_barrier(program, bar);
  machine->copies.push_back([=, &barrier] {
    copy(machine->programs[program].memory);
    barrier.bytes -= bytes;
    settle(barrier);
  });
}
inline void copy_in(u32 target, const void* source, u32 bytes, u32 bar) {
  require(target % 16 == 0 && (uintptr_t)source % 16 == 0 && bytes % 16 == 0, "a copy not in pieces of 16 bytes");
  begin_copy(Thread::now->program, target, bytes, bar, [=](u8* memory) { memcpy(memory + target, source, bytes); });
}
inline void send(u32 target, u32 source, u32 bytes, u32 bar, u32 rank) {
  const u8* from = Thread::own().memory + source;  // is read when the copy lands
  begin_copy(rank, target, bytes, bar, [=](u8* memory) { memcpy(memory + target, from, bytes); });
}

// As the test writes it.
struct Box {
  const u16* matrix;
  int64_t height, width, rows, columns;
};
struct alignas(64) TensorMap {
  char bytes[128];
};
inline void fetch_map(const TensorMap*) {}
// Rows of 128 bytes, whose 16-byte chunks are swapped by what the address says of the row.
inline void load_tile(u32 to, const TensorMap* map, int column, int row, u32 bar) {
  Box box;
  memcpy(&box, map->bytes, sizeof box);
  require(box.columns == 64 && to % 1024 == 0, "a box that begins where its swizzle does not");
  require(column >= 0 && row >= 0 && column + box.columns <= box.width && row + box.rows <= box.height,
          "a box outside of its matrix");
  begin_copy(Thread::now->program, to, 128 * box.rows, bar, [=](u8* memory) {
    for (u32 chunk = 0; chunk < 8 * box.rows; chunk++) {
      u32 at = to + 16 * chunk;
      const u16* from = box.matrix + (row + chunk / 8) * box.width + column + chunk % 8 * 8;
      memcpy(memory + (at ^ (at >> 7 & 7) << 4), from, 16);
    }
  });
}

// Four matrices of 8 x 8; `move` takes a lane's register of a matrix and where its two halves lie.
template <typename Move>
void move_matrices(u32 address, bool is_transposed, Move move) {
  Warp& warp = Thread::warp();
  u8* memory = Thread::own().memory;
  warp.in[Thread::lane()][4] = address;
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
  move_matrices(address, is_transposed, [](Warp& warp, int lane, int matrix, int half, const u8* there) {
    memcpy((u16*)&warp.out[lane][matrix] + half, there, 2);
  });
  memcpy(to, Thread::warp().out[Thread::lane()], 16);
}
inline void load4(u32* to, u32 address) { load_any(to, address, false); }
inline void load4_transposed(u32* to, u32 address) { load_any(to, address, true); }
inline void store4_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  u32 own[4] = {a, b, c, d};
  memcpy(Thread::warp().in[Thread::lane()], own, 16);
  move_matrices(address, true, [](Warp& warp, int lane, int matrix, int half, u8* there) {
    memcpy(there, (const u16*)&warp.in[lane][matrix] + half, 2);
  });
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
