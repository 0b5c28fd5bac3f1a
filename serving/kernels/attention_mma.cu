// Flash attention over packed sequences for all GPUs from 8.0 on: the walk of attention.py with tiles twice as high, so
// that keys and values pass through the second cache half as often, and without meetings inside a block of keys.
//
// A program takes ROWS packed rows of a head, each warp 16 TILES of them. Blocks of KEYS keys and values come through a
// ring; a warp multiplies only those that its own rows attend to. With STEADY the sequences come one by one, each in
// blocks from its own beginning, so that a row's sums have the same bits wherever its sequence lies.
//
// Compiled with D (32 or 64, the size of a head), STEADY and NARROW (E4M3 is written).

#include "cluster.cuh"

constexpr int TILES = 2, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * TILES * WARPS, KEYS = 64, STAGES = 3;
constexpr int CHUNKS = D / 8, ROW = 2 * D;                // 16-byte pieces of a row, and its bytes
constexpr int RING = ROWS * ROW, STAGE = 2 * KEYS * ROW;  // behind the queries; keys and values
constexpr float FAR = -1.0e30f;                           // below every score, and finite

struct Input {
  const u16* qkv;             // float16 [T, 3 hidden]
  const int *starts, *ends;   // [T], ascending
  void* out;                  // float16 or E4M3 [T, hidden]
  const float* factor;        // [1], of E4M3
  int num_tokens, hidden;
  float scale;                // of scores, to the base 2
};

// Where a piece of a row lies: swapped so that eight rows are read without a conflict.
DEVICE u32 place(int row, int chunk) { return row * ROW + ((chunk ^ (D == 32 ? row >> 1 : row)) & (CHUNKS - 1)) * 16; }
DEVICE void copy16(u32 target, const u16* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void await_group() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// A block of keys and the end of what is walked through with it: a sequence, or with STEADY off all of the tile's.
struct Walk {
  int block, end;
  DEVICE bool advance(const int* ends, int bottom) {
    block += KEYS;
    if (block < end) return true;
    if (!STEADY || end > bottom) return false;
    block = end, end = __ldg(ends + block);
    return true;
  }
};

struct Worker {
  const Input& in;
  u32 base;
  int warp, lane, top, bottom, column;
  int own, low, high;  // this warp's first row, and the rows that its rows attend to
  bool is_one;         // whether they are of one sequence
  int first[TILES][2], last[TILES][2];
  u32 q[TILES][D / 16][4];
  float acc[TILES][CHUNKS][4], highest[TILES][2], total[TILES][2];

  DEVICE Worker(const Input& input, u32 shared) : in(input), base(shared) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * D;
    top = blockIdx.y * ROWS, bottom = min(top + ROWS, in.num_tokens) - 1;
    own = top + 16 * TILES * warp;
    bool lives = own <= bottom;
    int end = min(own + 16 * TILES - 1, bottom);
    low = lives ? in.starts[own] : in.num_tokens, high = lives ? in.ends[end] : 0;
    is_one = lives && low == in.starts[end];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      int row = own + 8 * i + lane / 4;
      first[i / 2][i % 2] = row <= bottom ? in.starts[row] : 0, last[i / 2][i % 2] = row <= bottom ? in.ends[row] : 0;
      highest[i / 2][i % 2] = FAR, total[i / 2][i % 2] = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) acc[i / 2][chunk][2 * (i % 2)] = acc[i / 2][chunk][2 * (i % 2) + 1] = 0.0f;
    }
  }
  DEVICE void load_queries() {
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
      int piece = i * THREADS + threadIdx.x, row = piece / CHUNKS, chunk = piece % CHUNKS;
      copy16(base + place(row, chunk), in.qkv + 3ll * min(top + row, bottom) * in.hidden + column + 8 * chunk);
    }
  }
  DEVICE void load_block(int block, int stage) {
    u32 keys = base + RING + stage * STAGE;
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; i++) {
      int piece = i * THREADS + threadIdx.x, row = piece / CHUNKS, chunk = piece % CHUNKS;
      const u16* source = in.qkv + 3ll * min(block + row, in.num_tokens - 1) * in.hidden + in.hidden + column + 8 * chunk;
      copy16(keys + place(row, chunk), source);
      copy16(keys + KEYS * ROW + place(row, chunk), source + in.hidden);
    }
  }
  DEVICE void read_queries() {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int step = 0; step < D / 16; step++)
        load4(q[tile][step], base + place(16 * (TILES * warp + tile) + (lane & 15), 2 * step + (lane >> 4)));
  }
  DEVICE void multiply_keys(float (*scores)[KEYS / 8][4], u32 keys) {
    u32 there = keys + place(lane & 7, lane >> 3);
#pragma unroll
    for (int group = 0; group < KEYS / 8; group++)
#pragma unroll
      for (int half = 0; half < D / 32; half++) {
        u32 k[4];
        load4(k, (there + group * 8 * ROW) ^ (half << 6));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          multiply(scores[tile][group], q[tile][2 * half], k[0], k[1]);
          multiply(scores[tile][group], q[tile][2 * half + 1], k[2], k[3]);
        }
      }
  }
  // Only rows of the sequence that is walked through, up to `end`, attend to keys, and only to their own.
  DEVICE void mask(float (*scores)[KEYS / 8][4], int block, int end) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        u32 count = max(min(last[tile][part], end) - first[tile][part], 0);
        u32 key = block + 2 * (lane & 3) - first[tile][part];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
          float& score = scores[tile][i / 2][2 * part + i % 2];
          score = key + 8 * (i / 2) + i % 2 < count ? score : -__int_as_float(0x7f800000);
        }
      }
  }
  // Scores become weights; what was summed before shrinks to the new maximum.
  DEVICE void weigh(float (*scores)[KEYS / 8][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        float now = scores[tile][0][2 * part];
#pragma unroll
        for (int i = 1; i < KEYS / 4; i++) now = fmaxf(now, scores[tile][i / 2][2 * part + i % 2]);
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        now = fmaxf(highest[tile][part], now * in.scale);
        float shrink = exp2_fast(highest[tile][part] - now), sum = total[tile][part] * shrink;
        highest[tile][part] = now;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
          float& score = scores[tile][i / 2][2 * part + i % 2];
          sum += score = exp2_fast(score * in.scale - now);
        }
        total[tile][part] = sum;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) acc[tile][chunk][2 * part] *= shrink, acc[tile][chunk][2 * part + 1] *= shrink;
      }
  }
  DEVICE void multiply_values(float (*scores)[KEYS / 8][4], u32 values) {
    u32 there = values + place(lane & 15, lane >> 4);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      u32 p[TILES][4];
#pragma unroll
      for (int i = 0; i < 4 * TILES; i++) {
        float* pair = scores[i / 4][2 * step + (i & 2) / 2] + 2 * (i & 1);
        p[i / 4][i % 4] = pack(pair[0], pair[1]);
      }
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        u32 v[4];
        load4_transposed(v, (there + step * 16 * ROW) ^ (chunk << 4));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          multiply(acc[tile][chunk], p[tile], v[0], v[1]);
          multiply(acc[tile][chunk + 1], p[tile], v[2], v[3]);
        }
      }
    }
  }
  DEVICE void attend(const Walk& walk, int stage) {
    if (walk.block >= high || min(walk.block + KEYS, walk.end) <= low) return;  // of other warps
    u32 keys = base + RING + stage * STAGE;
    float scores[TILES][KEYS / 8][4] = {};
    multiply_keys(scores, keys);
    if (!is_one || walk.block < low || walk.block + KEYS > high) mask(scores, walk.block, walk.end);
    weigh(scores);
    multiply_values(scores, keys + KEYS * ROW);
  }
  // Through this warp's rows of the queries' place, so that whole pieces are written.
  DEVICE void write(u8* memory) {
    constexpr int OUT = NARROW ? D : ROW, PIECES = OUT / 16;
    float factor = NARROW ? *in.factor : 1.0f;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      float sum = total[i / 2][i % 2];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float share = factor / fmaxf(sum, 1e-30f);
      int row = 16 * TILES * warp + 8 * i + lane / 4;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        float left = acc[i / 2][chunk][2 * (i % 2)] * share, right = acc[i / 2][chunk][2 * (i % 2) + 1] * share;
#if NARROW
        u16 both;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(right), "f"(left));
        *(u16*)(memory + row * ROW + 8 * chunk + 2 * (lane & 3)) = both;
#else
        *(u32*)(memory + place(row, chunk) + 4 * (lane & 3)) = pack(left, right);
#endif
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * TILES * PIECES / 32; i++) {
      int piece = 32 * i + lane, row = piece / PIECES, at = piece % PIECES;
      if (own + row > bottom) continue;
      u8* target = (u8*)in.out + ((long long)(own + row) * in.hidden + column) * (NARROW ? 1 : 2) + 16 * at;
      int from = 16 * TILES * warp + row;
      *(uint4*)target = *(uint4*)(memory + (NARROW ? from * ROW + 16 * at : place(from, at)));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, D == 32 ? 3 : 2) attention_mma(const Input in) {
  extern __shared__ __align__(128) u8 memory[];
  Worker me(in, address_of(memory));
  Walk here = {in.starts[me.top], in.ends[STEADY ? me.top : me.bottom]}, ahead = here;
  me.load_queries();
  me.load_block(ahead.block, 0);
  close_group();
  bool more = ahead.advance(in.ends, me.bottom);
  if (more) me.load_block(ahead.block, 1);
  close_group();
  await_group();
  __syncthreads();
  me.read_queries();
  for (int stage = 0;; stage = stage == STAGES - 1 ? 0 : stage + 1) {
    await_group();
    __syncthreads();  // this block has landed, and nobody reads any more what the next takes the place of
    more = more && ahead.advance(in.ends, me.bottom);
    if (more) me.load_block(ahead.block, stage == 0 ? STAGES - 1 : stage - 1);
    close_group();
    me.attend(here, stage);
    if (!here.advance(in.ends, me.bottom)) break;
  }
  __syncwarp();
  me.write(memory);
}
