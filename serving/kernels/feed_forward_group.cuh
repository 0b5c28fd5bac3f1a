// What a group of four warps does in a program of feed_forward.cu, which says how they work together. Arithmetic is
// written as its bits shall be: the compiler contracts each copy of it in its own way.
#pragma once

#include "wide_results.cuh"

constexpr int HIDDEN = 384, INNER = 1536, ROWS = 64, PIECE = 64, PIECES = HIDDEN / PIECE, OWN = PIECES / 2;
constexpr int CHUNKS = INNER / 2 / PIECE, FILLS = 4 * CHUNKS, STAGES = 5, PARTS = PIECE / 32;
constexpr u32 BLOCK_BYTES = 64 * PIECE, STAGE_BYTES = 3 * BLOCK_BYTES, ADDED_BYTES = ROWS * PIECE * 2;
// A group's memory: two operands, the pieces that are added, and the other program's chunk.
constexpr u32 OPERAND_BYTES = PIECES * BLOCK_BYTES, ADDED = 2 * OPERAND_BYTES, RECEIVED = ADDED + OWN * ADDED_BYTES;
constexpr u32 GROUP_BYTES = RECEIVED + BLOCK_BYTES;

struct Argument {
  TensorMap x, narrow;                      // x and its copy in E4M3 are written in place
  const char* weights;                      // of both programs, stage after stage as the ring takes them
  const u16 *up_bias, *down_bias, *scales;  // the latter of the norm
  const float2* sums;                       // sum and sum of squares, [num_rows, parts]
  float2* out_sums;                         // [num_rows, 2]
  const float *x_scale, *up_scale, *inner_scale, *down_scale, *inner_factor, *out_factor;
  float eps;
  int num_rows, tiles, last, parts;  // tiles go down the rows, or up from row `last` where there is one
};

// By address: stages of the ring that are full and free, whose turn it is; of each group the operands that are there,
// the pieces to be added that are, the pieces that are finished, whether the other program's chunk is here and has room
// there, and whether the norms of its rows are there.
struct Barriers {
  u32 full, free, turns, operands, added, written, handed, open, normed;
};
constexpr int OF_GROUP = 2 + 1 + OWN + 3;

DEVICE Barriers find_barriers(u32 bars, int group) {
  u32 own = bars + 8 * (2 * STAGES + 2 + OF_GROUP * group), handed = own + 24 + 8 * OWN;
  return {bars, bars + 8 * STAGES, bars + 16 * STAGES, own, own + 16, own + 24, handed, handed + 8, handed + 16};
}

DEVICE void make_barriers(u32 bars) {
  for (int group = 0; group < 2; group++) {
    Barriers own = find_barriers(bars, group);
    for (int stage = 0; group == 0 && stage < STAGES; stage++) {
      barrier_init(own.full + 8 * stage, 1);
      barrier_init(own.free + 8 * stage, 8);
    }
    barrier_init(own.turns + 8 * group, 128);
    for (int side = 0; side < 2; side++) barrier_init(own.operands + 8 * side, 1);
    barrier_init(own.added, OWN);
    for (int piece = 0; piece < OWN; piece++) barrier_init(own.written + 8 * piece, 128);
    barrier_init(own.handed, 1);
    barrier_init(own.open, 4);
    barrier_init(own.normed, 32);
  }
  fence_init();
  for (int group = 0; group < 2; group++) barrier_expect(find_barriers(bars, group).handed, BLOCK_BYTES);
  fence_copies();
}

// What a program keeps in shared memory behind the ring and the tiles.
struct Kept {
  float4 up_bias[INNER / 8];  // half of it: of each 16 columns those of each thread of four
  u32 columns[HIDDEN / 2];    // bias and scale
  float2 norms[2][ROWS];      // mean times spread, negative, and spread
  float up_factor, down_factor;
  u32 inner_factor, out_factor;
};

DEVICE int find_top(const Argument& work, int round, int group) {
  int tile = blockIdx.x / 2 + round * (gridDim.x / 2);
  return (2 * (work.last < 0 ? tile : work.last - tile) + group) * ROWS;
}

// One of the two groups. `slot` and `parity`: of the ring's next stage; `turn`: of its turns at the tensor cores.
struct Group {
  const Barriers bars;
  const u32 ring, tile, rank;
  const int number, warp, lane;
  int slot, parity, turn;

  DEVICE void take_turn() { barrier_wait(bars.turns + 8 * number, turn++ & 1 ^ (number == 0 ? 1 : 0)); }
  DEVICE void pass_turn() { barrier_arrive(bars.turns + 8 * (1 - number)); }
  DEVICE void await_stage() const { barrier_wait(bars.full + 8 * slot, parity); }
  DEVICE void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  // That this warp has read the stage so many before the next.
  DEVICE void release_stage(int back) const {
    int own = slot - back;
    if (lane == 0) barrier_arrive(bars.free + 8 * (own < 0 ? own + STAGES : own));
  }
  DEVICE u64 describe_blocks(int block = 0) const {
    return describe<PIECE>(ring + slot * STAGE_BYTES + block * BLOCK_BYTES);
  }

  // Before the turn: that the other program's chunk is there, number `chunk` of all.
  DEVICE void await_other(int chunk) const {
    barrier_wait(bars.handed, chunk & 1);
    if (warp == 0 && lane == 0) barrier_expect(bars.handed, BLOCK_BYTES);
    fence_copies();  // it came by plain stores
  }
  DEVICE void multiply_other(float (&acc)[96]) {
    await_stage();
    open_products();
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      multiply_64<true>(acc, describe<PIECE>(tile + RECEIVED) + 2 * part, describe_blocks() + 2 * part, 1);
    close_products();
    advance();
  }
  // x and one chunk of the matrix up.
  DEVICE void multiply_up(float (&acc)[32], int round) {
    u32 operand = tile + (round & 1) * OPERAND_BYTES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      await_stage();
      open_products();
#pragma unroll
      for (int i = 0; i < 3; i++)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          multiply_64_64<true>(acc, describe<PIECE>(operand + (half * 3 + i) * BLOCK_BYTES) + 2 * part,
                               describe_blocks(i) + 2 * part, half | i | part);
      close_products();
      advance();
    }
  }
  DEVICE void multiply_own(float (&acc)[96], const u32 (&inner)[PARTS][4], bool adds) {
    open_products();
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      multiply_registers(acc, inner[part], describe_blocks() + 2 * part, adds | part);
    close_products();
    advance();
  }

  // The accumulators of a chunk to operands. `spread`: half of that of the thread's two rows; `bias`: half of that of
  // the thread's columns of each 16.
  DEVICE void activate_chunk(const float (&acc)[32], u32 (&inner)[PARTS][4], const float (&spread)[2],
                             const float4 (&bias)[4], u32 factor) const {
#pragma unroll
    for (int block = 0; block < 4; block++) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float left = i < 2 ? bias[block].x : bias[block].z, right = i < 2 ? bias[block].y : bias[block].w;
        pairs[i] = pack(fmaf(acc[block * 8 + i * 2], spread[i % 2], left),
                        fmaf(acc[block * 8 + i * 2 + 1], spread[i % 2], right));
      }
      activate(pairs);
      inner[block / 2][block % 2 * 2] = narrow(pairs[0], pairs[2], factor);
      inner[block / 2][block % 2 * 2 + 1] = narrow(pairs[1], pairs[3], factor);
    }
  }

  // Chunk `chunk` of all to the other program, swizzled as an operand: a thread's values of a row side by side, in
  // which order the matrix down is for it.
  DEVICE void send_chunk(const u32 (&inner)[PARTS][4], int chunk) const {
    int row = warp * 16 + lane / 4;
    u32 there = on_rank(tile + RECEIVED, 1 - rank) + row * PIECE + ((lane % 4 ^ row >> 1 & 3) << 4);
    u32 bar = on_rank(bars.handed, 1 - rank);
    barrier_wait(bars.open, chunk & 1 ^ 1);
#pragma unroll
    for (int low = 0; low < 2; low++)
      store_there(there + low * 8 * PIECE, inner[0][low], inner[0][low + 2], inner[1][low], inner[1][low + 2], bar);
  }

  // 16 columns of the results, to where x lies, which is added: `place` is the lane's in a row.
  template <int NUMBER>
  DEVICE void finish_columns(const float (&acc)[96], const Kept& kept, const float2 (&norms)[2], float2 (&sums)[2],
                             u32 place, u32* small) {
    u32 at = further<NUMBER % 4>(place), residual[4], packed[4];
    load_matrices(at, residual);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int side = i / 2, low = i % 2;
      uint2 both = *(const uint2*)(kept.columns + NUMBER * 16 + side * 8 + lane % 4 * 2);
      float2 first = unpack(both.x), second = unpack(both.y), norm = norms[low], added = unpack(residual[i]);
      float left = acc[(NUMBER * 2 + side) * 4 + low * 2], right = acc[(NUMBER * 2 + side) * 4 + low * 2 + 1];
      left = fmaf(left, kept.down_factor, fmaf(fmaf(added.x, norm.y, norm.x), first.y, first.x));
      right = fmaf(right, kept.down_factor, fmaf(fmaf(added.y, norm.y, norm.x), second.y, second.x));
      sums[low].x += left + right, sums[low].y = fmaf(left, left, fmaf(right, right, sums[low].y));
      packed[i] = pack(left, right);
    }
    if (COPIES)
      for (int low = 0; low < 2; low++) small[low] = narrow(packed[low], packed[2 + low], kept.out_factor);
    store_matrices(at, packed);
  }

  template <int NUMBER>
  DEVICE void finish_piece(const float (&acc)[96], const Kept& kept, const float2 (&norms)[2], float2 (&sums)[2],
                           u32 operand) {
    int row = warp * 16 + lane % 16;  // that the lane names to the matrix copies
    u32 place = tile + ADDED + NUMBER * ADDED_BYTES + row * 128 + ((lane / 16 ^ row & 7) << 4), small[2][4];
    u32 narrow_place = operand + (rank * OWN + NUMBER) * BLOCK_BYTES + row * 64 + ((lane / 16 ^ row >> 1 & 3) << 4);
    finish_columns<NUMBER * 4>(acc, kept, norms, sums, place, small[0]);
    finish_columns<NUMBER * 4 + 1>(acc, kept, norms, sums, place, small[0] + 2);
    if (COPIES) store_matrices(narrow_place, small[0]);
    finish_columns<NUMBER * 4 + 2>(acc, kept, norms, sums, place, small[1]);
    finish_columns<NUMBER * 4 + 3>(acc, kept, norms, sums, place, small[1] + 2);
    if (COPIES) store_matrices(further<1>(narrow_place), small[1]);
    fence_copies();
    barrier_arrive(bars.written + 8 * NUMBER);
  }

  // One turn at the tensor cores: the chunk before, of both programs, into the results, where there is one, then up to
  // the next and its GELU, where there is one. `chunk` is the next in the tile, `round` counts tiles.
  template <bool HAS_BEFORE, bool HAS_NEXT>
  DEVICE void step(float (&acc)[96], u32 (&inner)[PARTS][4], float (&spread)[2], const Kept& kept, int chunk,
                   int round) {
    float product[32];
    if (HAS_BEFORE) await_other(round * CHUNKS + chunk - 1);
    if (!HAS_BEFORE) barrier_wait(bars.operands + 8 * (round & 1), round >> 1 & 1);
    await_stage();
    take_turn();
    if (HAS_BEFORE) multiply_own(acc, inner, chunk > 1), multiply_other(acc);
    if (HAS_NEXT) multiply_up(product, round);
    pass_turn();
    float4 bias[4];
#pragma unroll
    for (int i = 0; HAS_NEXT && i < 4; i++) bias[i] = kept.up_bias[(chunk * 4 + i) * 4 + lane % 4];
    constexpr int BEHIND = HAS_NEXT ? 2 : 0;  // stages of up
    if (HAS_BEFORE) {
      wait_for_products<BEHIND + 1>();
      release_stage(BEHIND + 2);
      wait_for_products<BEHIND>();
      release_stage(BEHIND + 1);
      if (lane == 0) arrive_there(bars.open, 1 - rank);
    }
    if (!HAS_NEXT) return;
    wait_for_products<1>();
    release_stage(2);
    wait_for_products<0>();
    release_stage(1);
    fence_results(product);
    if (!HAS_BEFORE) {
      barrier_wait(bars.normed, round & 1);
      for (int low = 0; low < 2; low++)
        spread[low] = kept.norms[number][warp * 16 + lane / 4 + 8 * low].y * kept.up_factor;
    }
    activate_chunk(product, inner, spread, bias, kept.inner_factor);
    send_chunk(inner, round * CHUNKS + chunk);
  }

  // A round in which the group has no rows, so that the other is not kept waiting. No chunk is sent: there is an even
  // number of them, and parities go on as they were.
  DEVICE void pass_over(int round) {
    barrier_wait(bars.operands + 8 * (round & 1), round >> 1 & 1);
    barrier_wait(bars.normed, round & 1);
    for (int chunk = 0; chunk <= CHUNKS; chunk++) {
      take_turn();
      pass_turn();
      for (int i = 0; i < (chunk % CHUNKS == 0 ? 2 : 4); i++) {
        await_stage();
        advance();
        __syncwarp();  // a stage is not released past a lane that has not looked yet
        release_stage(1);
      }
    }
    barrier_wait(bars.added, round & 1);
    for (int i = 0; i < OWN; i++) barrier_arrive(bars.written + 8 * i);
  }

  DEVICE void consume(const Argument& work, const Kept& kept, int count) {
    for (int round = 0; round < count; round++) {
      if (find_top(work, round, number) >= work.num_rows) {
        pass_over(round);
        continue;
      }
      float acc[96], spread[2];
      u32 inner[PARTS][4];
      step<false, true>(acc, inner, spread, kept, 0, round);
      for (int chunk = 1; chunk < CHUNKS; chunk++) step<true, true>(acc, inner, spread, kept, chunk, round);
      step<true, false>(acc, inner, spread, kept, CHUNKS, round);
      fence_results(acc);
      int row = warp * 16 + lane / 4, top = find_top(work, round, number);
      float2 norms[2] = {kept.norms[number][row], kept.norms[number][row + 8]}, sums[2] = {};
      u32 operand = tile + (round & 1) * OPERAND_BYTES;
      barrier_wait(bars.added, round & 1);
      finish_piece<0>(acc, kept, norms, sums, operand);
      finish_piece<1>(acc, kept, norms, sums, operand);
      finish_piece<2>(acc, kept, norms, sums, operand);
#pragma unroll
      for (int low = 0; low < 2; low++) {
        float2 own = add_neighbours(sums[low]);
        int there = top + row + 8 * low;
        if (lane % 4 == 0 && there < work.num_rows) work.out_sums[there * 2 + rank] = own;
      }
    }
  }
};
