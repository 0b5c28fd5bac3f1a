// Flash attention over packed sequences for Hopper, heads of 32 and 64: online softmax, no score matrix, no padding.
//
// Each sequence is cut into tiles of 128 rows from its own beginning, so that no key needs a mask but those behind its
// end, and its results have the same bits wherever it lies. Two groups of four warps take 64 rows each of a tile and
// read its keys and values from one ring, or, where the tile has no more than 64 rows, a head each. What waits for
// memory is done by one thread for them: it draws a tile and two heads of it, the next one ahead of time, since tiles
// differ in work by ten times and a fixed share would leave processors idle; and it loads queries, keys and values.
// A program is two such pairs of groups, so that some multiply while others exponentiate.
//
// NARROW results are E4M3 times a factor.

#include "wide_results.cuh"

constexpr int ROWS = 64, KEYS = 64, STAGES = HEAD == 32 ? 4 : 2, STEPS = HEAD / 16;
constexpr u32 ROW_BYTES = HEAD * 2, BOX_BYTES = KEYS * ROW_BYTES, STAGE_BYTES = 4 * BOX_BYTES;
constexpr u32 QUERIES_BYTES = 2 * BOX_BYTES;  // of both groups
constexpr float FAR = -1.0e30f;               // below every score

struct Argument {
  TensorMap qkv;
  const int* tiles;  // how many, how many of the first part, and of each its first row and its sequence's begin and end
  u32* ticket;       // 0, as the kernel leaves it
  u8* out;
  const float* out_factor;
  float scale;  // of scores, times the logarithm of e to base 2
  int heads, is_upward;
};

// One head of a tile, or two, each of a group, where the tile has no more than the rows of one. None where top < 0.
struct Item {
  int top, first, end, head, is_pair;

  DEVICE int blocks() const { return (end - first + KEYS - 1) / KEYS; }
  DEVICE int top_of(int group) const { return top + (is_pair ? 0 : group * ROWS); }
  DEVICE int head_of(int group) const { return head + (is_pair ? group : 0); }
};

// By address: items and stages that are full and free.
struct Barriers {
  u32 given, taken, full, free;
};

// Of a pair of groups, behind its queries and its ring.
struct Shared {
  Item items[2];
  u64 barriers[4 + 2 * STAGES];
};
constexpr u32 RING = 2 * QUERIES_BYTES, OWN = RING + STAGES * STAGE_BYTES, PAIR_BYTES = OWN + 1024;

DEVICE Barriers find_barriers(const Shared& shared) {
  u32 bars = address_of(shared.barriers);
  return {bars, bars + 16, bars + 32, bars + 32 + 8 * STAGES};
}

DEVICE void make_barriers(const Barriers& bars) {
  for (int side = 0; side < 2; side++) {
    barrier_init(bars.given + 8 * side, 1);
    barrier_init(bars.taken + 8 * side, 256);
  }
  for (int stage = 0; stage < STAGES; stage++) {
    barrier_init(bars.full + 8 * stage, 1);
    barrier_init(bars.free + 8 * stage, 8);
  }
  fence_init();
  fence_copies();
}

// Keys and values of an item; `fill` counts stages.
DEVICE void load_keys(const Argument& work, const Item& item, u32 ring, const Barriers& bars, int& fill) {
  int hidden = work.heads * HEAD, blocks = item.blocks(), step = item.is_pair ? 1 : 2;
  for (int block = 0; block < blocks; block += step, fill++) {
    u32 slot = fill % STAGES, bar = bars.full + 8 * slot, at = ring + slot * STAGE_BYTES;
    int boxes = item.is_pair ? 2 : min(2, blocks - block);
    barrier_wait(bars.free + 8 * slot, fill / STAGES & 1 ^ 1);
    barrier_expect(bar, boxes * 2 * BOX_BYTES);
    for (int box = 0; box < boxes; box++) {
      int row = item.first + (block + (item.is_pair ? 0 : box)) * KEYS;
      int column = hidden + item.head_of(box) * HEAD;
      load_tile(at + box * BOX_BYTES, &work.qkv, column, row, bar);
      load_tile(at + (2 + box) * BOX_BYTES, &work.qkv, column + hidden, row, bar);
    }
  }
}

// Number `round` of the program's.
DEVICE void give(const Argument& work, Shared& shared, const Item& item, u32 queries, const Barriers& bars, int round) {
  u32 side = round & 1, bar = bars.given + 8 * side;
  barrier_wait(bars.taken + 8 * side, round / 2 & 1 ^ 1);
  shared.items[side] = item;
  if (item.top < 0) return barrier_arrive(bar);
  barrier_expect(bar, QUERIES_BYTES);
  for (int group = 0; group < 2; group++)
    load_tile(queries + side * QUERIES_BYTES + group * BOX_BYTES, &work.qkv, item.head_of(group) * HEAD,
              item.top_of(group), bar);
}

DEVICE void produce(const Argument& work, Shared& shared, u32 queries, u32 ring, const Barriers& bars) {
  fetch_map(&work.qkv);
  wait_for_kernel_before();
  // A ticket is a tile and two heads of it.
  int count = work.tiles[0], part = work.tiles[1], pairs = work.heads / 2, total = count * pairs, fill = 0, round = 0;
  u32 last = total + 2 * gridDim.x - 1;  // every pair of groups draws one in vain: then the ticket is 0 again
  int next = draw(work.ticket, last);
  while (next < total) {
    int number = next / pairs, head = next % pairs * 2;
    if (work.is_upward) number = (number < part ? part : count + part) - 1 - number;
    const int* tile = work.tiles + 2 + 3 * number;
    next = draw(work.ticket, last);
    Item item = {tile[0], tile[1], tile[2], head, tile[2] - tile[0] <= ROWS};
    for (int i = 0; i < (item.is_pair ? 1 : 2); i++, item.head++, round++) {
      give(work, shared, item, queries, bars, round);
      load_keys(work, item, ring, bars, fill);
    }
  }
  give(work, shared, {-1}, queries, bars, round);
}

// What a group keeps of its 64 rows: a thread has two of a warp's 16.
struct Rows {
  float acc[HEAD / 2], highest[2], total[2];
  u32 queries, query[HEAD == 32 ? STEPS : 1][4], weights[KEYS / 16][4];
};

// The largest scores of a block, of which those of `left` keys count, for all lanes of a row. By 16 keys, of the last
// block only as many as there are, in four chains, which do not wait for each other.
template <bool IS_LAST>
DEVICE float2 find_most(float (&scores)[KEYS / 2], int left) {
  int lane = threadIdx.x % 32;
  float most[2][2] = {{FAR, FAR}, {FAR, FAR}};
#pragma unroll
  for (int part = 0; part < KEYS / 16; part++) {
    if (IS_LAST && part * 16 >= left) continue;
    if (IS_LAST && part * 16 + 16 > left) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (part * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) scores[part * 8 + i] = FAR;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) most[i % 4 / 2][i % 2] = fmaxf(most[i % 4 / 2][i % 2], scores[part * 8 + i]);
  }
  float2 highest = make_float2(fmaxf(most[0][0], most[0][1]), fmaxf(most[1][0], most[1][1]));
#pragma unroll
  for (int other = 1; other < 4; other *= 2) {
    highest.x = fmaxf(highest.x, __shfl_xor_sync(~0u, highest.x, other));
    highest.y = fmaxf(highest.y, __shfl_xor_sync(~0u, highest.y, other));
  }
  return highest;
}

// Scores of a block to weights; the maximum, the sums and the weighted values so far follow.
template <bool IS_LAST>
DEVICE void weigh(Rows& rows, float (&scores)[KEYS / 2], float scale, int left) {
  float2 most = find_most<IS_LAST>(scores, left);
  float highest[2] = {most.x, most.y}, total[2] = {};
#pragma unroll
  for (int low = 0; low < 2; low++) {
    highest[low] = fmaxf(rows.highest[low], highest[low] * scale);
    float shrink = exp2_fast(rows.highest[low] - highest[low]);
    rows.highest[low] = highest[low];
    rows.total[low] *= shrink;
#pragma unroll
    for (int i = 0; i < HEAD / 4; i++) rows.acc[i / 2 * 4 + low * 2 + i % 2] *= shrink;
  }
#pragma unroll
  for (int part = 0; part < KEYS / 16; part++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rows.weights[part][i] = 0;
    if (IS_LAST && part * 16 >= left) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int low = i % 2, at = part * 8 + i / 2 * 4 + low * 2;
      float first = exp2_fast(fmaf(scores[at], scale, -highest[low]));
      float second = exp2_fast(fmaf(scores[at + 1], scale, -highest[low]));
      total[low] += first + second;
      rows.weights[part][i] = pack(first, second);
    }
  }
  rows.total[0] += total[0], rows.total[1] += total[1];
}

// One of the two groups. `slot` and `parity`: of the ring's next stage.
struct Group {
  const Argument& work;
  const Barriers bars;
  const u32 ring;
  const int number, warp, lane;
  int slot, parity;

  DEVICE void await_stage() const { barrier_wait(bars.full + 8 * slot, parity); }
  DEVICE void release_stage() {
    if (lane == 0) barrier_arrive(bars.free + 8 * slot);
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  DEVICE void multiply_keys(float (&scores)[KEYS / 2], const Rows& rows, u32 box) const {
    u64 keys = describe<ROW_BYTES>(box);
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if constexpr (HEAD == 32)
        multiply_half<KEYS, false>(scores, rows.query[i], keys + 2 * i, i);
      else
        multiply_64_64<false>(scores, describe<ROW_BYTES>(rows.queries) + 2 * i, keys + 2 * i, i);
  }
  DEVICE void multiply_values(Rows& rows, u32 box) const {
    u64 values = describe<ROW_BYTES>(box + 2 * BOX_BYTES);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) multiply_half<HEAD, true>(rows.acc, rows.weights[i], values + i * ROW_BYTES, 1);
  }

  // The keys of the item. `is_live`: whether this warp has rows.
  DEVICE void walk(const Item& item, Rows& rows, bool is_live) {
    float scores[KEYS / 2];
    int blocks = item.blocks(), left = item.end - item.first;
    u32 box = ring + slot * STAGE_BYTES + (item.is_pair ? number * BOX_BYTES : 0);
    await_stage();
    open_products();
    multiply_keys(scores, rows, box);
    close_products();
    wait_for_products<0>();
    fence_results(scores);
    for (int block = 1; block < blocks; block++, left -= KEYS) {
      bool moves_on = item.is_pair || block % 2 == 0;
      int coming = slot + 1 == STAGES ? 0 : slot + 1;
      if (is_live) weigh<false>(rows, scores, work.scale, left);
      u32 next = moves_on ? box + (coming - slot) * STAGE_BYTES - (item.is_pair ? 0 : BOX_BYTES) : box + BOX_BYTES;
      if (moves_on) barrier_wait(bars.full + 8 * coming, coming ? parity : parity ^ 1);
      open_products();
      multiply_values(rows, box);
      multiply_keys(scores, rows, next);
      close_products();
      wait_for_products<0>();
      fence_results(scores);
      fence_results(rows.acc);
      if (moves_on) release_stage();
      box = next;
    }
    if (is_live) weigh<true>(rows, scores, work.scale, left);
    open_products();
    multiply_values(rows, box);
    close_products();
    wait_for_products<0>();
    fence_results(rows.acc);
    release_stage();
  }

  // The results, through the memory where the group's queries were, `area`: a row's side by side in lanes. Heads of 64
  // are multiplied from there: that neighbours' last product with keys reads none but their own rows PTX does not
  // promise, but a whole product with values lies between.
  DEVICE void finish(const Item& item, Rows& rows, char* area) const {
    constexpr int PIECE = NARROW ? 16 : 8, PIECES = HEAD / PIECE;  // values of 16 bytes
    int top = item.top_of(number) + warp * 16, head = item.head_of(number);
    char* own = area + warp * 16 * ROW_BYTES;
    __syncwarp();  // all lanes have read the queries
#pragma unroll
    for (int low = 0; low < 2; low++) {
      float total = rows.total[low];
#pragma unroll
      for (int other = 1; other < 4; other *= 2) total += __shfl_xor_sync(~0u, total, other);
      float factor = (NARROW ? *work.out_factor : 1.0f) / total;
      int row = lane / 4 + low * 8;
#pragma unroll
      for (int i = 0; i < HEAD / 8; i++) {
        float left = rows.acc[i * 4 + low * 2] * factor, right = rows.acc[i * 4 + low * 2 + 1] * factor;
        if (NARROW)
          *(u16*)(own + row * HEAD + i * 8 + lane % 4 * 2) = narrow_pair(left, right);
        else
          *(u32*)(own + row * ROW_BYTES + ((i ^ spread(row)) << 4) + lane % 4 * 4) = pack(left, right);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PIECES / 2; i++) {
      int row = (i * 32 + lane) / PIECES, piece = lane % PIECES;
      uint4 values =
          *(const uint4*)(own + (NARROW ? row * HEAD + piece * 16 : row * ROW_BYTES + ((piece ^ spread(row)) << 4)));
      u64 place = (u64)(top + row) * work.heads * HEAD + head * HEAD + piece * PIECE;
      if (top + row < item.end) *(uint4*)(work.out + place * (NARROW ? 1 : 2)) = values;
    }
  }

  // By which the 16 bytes of a row are in another order.
  DEVICE static int spread(int row) { return HEAD == 32 ? row >> 1 & 3 : row & 7; }

  DEVICE void consume(const Shared& shared, char* area) {
    for (int round = 0;; round++) {
      int side = round & 1;
      barrier_wait(bars.given + 8 * side, round / 2 & 1);
      Item item = shared.items[side];
      if (item.top < 0) return;
      char* queries = area + side * QUERIES_BYTES + number * BOX_BYTES;
      Rows rows = {{}, {FAR, FAR}, {}, address_of(queries)};
      int row = warp * 16 + lane % 16;
#pragma unroll
      for (int i = 0; HEAD == 32 && i < STEPS; i++)
        load_matrices(address_of(queries) + row * ROW_BYTES + ((i * 2 + lane / 16 ^ spread(row)) << 4), rows.query[i]);
      bool is_live = item.top_of(number) + warp * 16 < item.end;
      walk(item, rows, is_live);
      if (is_live) finish(item, rows, queries);
      fence_copies();  // the next queries come there
      barrier_arrive(bars.taken + 8 * side);
    }
  }
};

extern "C" __global__ void __launch_bounds__(640, 1) attention_hopper(const __grid_constant__ Argument work) {
  extern __shared__ __align__(1024) char area[];
  let_next_kernel_start();
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), pair = warp < 4 ? warp : (warp / 4 - 1) / 2;
  char* own = area + (pair & 1) * PAIR_BYTES;
  Shared& shared = *(Shared*)(own + OWN);
  Barriers bars = find_barriers(shared);
  if (threadIdx.x % 32 == 0 && warp < 2) make_barriers(bars);
  __syncthreads();
  if (warp < 4) {
    leave_registers<32>();
    if (threadIdx.x % 32 == 0 && warp < 2) produce(work, shared, address_of(own), address_of(own + RING), bars);
  } else {
    take_registers<112>();
    Group group = {work, bars, address_of(own + RING), warp / 4 + 1 & 1, warp % 4, (int)threadIdx.x % 32, 0, 0};
    group.consume(shared, own);
  }
}
