// GEMM of normalised rows for Hopper in float16 or E4M3: tiles of 128 x 192, two groups of four warps in turns.
//
// One warp streams tiles of x and of the weights through a ring. The groups take turns at the tensor cores, so that the
// epilogue of one runs while the other multiplies. A tile of 128 x 192 takes 138 bytes of shared memory a clock where
// one of 128 x 128 takes 160, of 128 that there are. Another warp for each group does all that waits for memory: it
// fetches the edges of the next tile, norms of its rows and biases of its columns, and its residual, and it sends the
// finished pieces of 64 columns.
//
// Without RESIDUAL x is normalised. Its norm is a factor a row: its scale is in the weights, its shift in the bias, and
// weights whose rows sum to zero take the mean away. With RESIDUAL it is what is added that is normalised, and the sums
// over the columns of each tile are left for the norm of who reads the rows. Norms come from such sums.
//
// E4M3 has the scales of its operands in the factor of the rows, or, with RESIDUAL, a factor of all. NARROW results
// are E4M3 times a factor: of a GELU all of them, with RESIDUAL a copy. A thread has columns 2 t, 2 t + 1, 8 + 2 t and
// 9 + 2 t of each 16, and leaves those of each 64 side by side: who reads them has its weights in that order. DEEP
// products, which wait for the ring rather than for what follows them, write copies themselves instead of through
// shared memory: it has room for another stage then.
//
// The halves of a tile, of 64 rows, are products by themselves. Where the tiles of the last round are at most half as
// many as the programs, each is cut in two for two of them. Such a half, and the last rows where they are as few, are
// what the first half of a whole tile is, and a row has the same bits in either.
//
// Compiled with RESIDUAL or without, then with GELU or without; each with operands in E4M3 or not, NARROW or not, and
// with copies DEEP or not.

#include "wide_results.cuh"

constexpr bool COPIES = RESIDUAL && NARROW && !DEEP, WRITES = RESIDUAL && NARROW && DEEP;  // the copy, by threads
constexpr int HALF = 64, ROWS = 2 * HALF, COLUMNS = 192, STEP = E4M3 ? 128 : 64, PIECE = 64, PIECES = COLUMNS / PIECE;
constexpr int STAGES = COPIES ? 3 : 4;  // copies take the room of one
constexpr u32 X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + COLUMNS * 128, COPY_BYTES = COPIES ? ROWS * PIECE : 0;
constexpr u32 PIECE_BYTES = ROWS * PIECE * (NARROW && !RESIDUAL ? 1 : 2), GROUP_BYTES = 2 * (PIECE_BYTES + COPY_BYTES);
constexpr int EDGES = RESIDUAL ? 2 * ROWS : ROWS + COLUMNS;                                   // floats
constexpr int KEPT = RESIDUAL ? COLUMNS : 0, FACTORS = NARROW || (RESIDUAL && E4M3) ? 2 : 0;  // words of a program

struct Argument {
  TensorMap x, weight, out, residual, copy;
  u8* narrow;                // the copy
  const u16 *bias, *scales;  // the latter of the residual's norm
  const float2* sums;        // sum and sum of squares, [num_rows, parts]
  float2* out_sums;          // [num_rows, across]
  const float *x_scales, *weight_scale, *out_factor;
  float eps, share;                // one over the columns of the norm
  int num_rows, tiles, cut;        // so many of the tiles, the last, are cut in halves
  int across, last, depth, parts;  // tiles go down the rows, or up from row `last` where there is one
  int scale_rows;                  // whether x has a scale a row
};

// Rows `top` to `end`, which take so many halves.
struct Tile {
  int top, end, left, halves;
};

// Second halves are numbered behind all tiles. With RESIDUAL the programs and so `cut` are a multiple of `across`: what
// is further by either is in the same column.
DEVICE Tile find_tile(const Argument& work, int turn) {
  int number = blockIdx.x + turn * gridDim.x, is_second = number >= work.tiles;
  int tile = number - is_second * work.cut, row = tile / work.across;
  int top = (work.last < 0 ? row : work.last - row) * ROWS + is_second * HALF;
  int end = min(top + (number < work.tiles - work.cut ? ROWS : HALF), work.num_rows);
  return {top, end, tile % work.across * COLUMNS, end - top > HALF ? 2 : 1};
}

// How many tiles and halves the program takes. A second half, which only its last can be, may have no rows.
DEVICE int count_turns(const Argument& work) {
  int turns = (work.tiles + work.cut - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  return turns - (find_tile(work, turns - 1).top >= work.num_rows);
}

// By address: stages of the ring that are full and free, and whose turn it is; of each group the pieces that it may
// write (the residual is there), those that it has written, and whether the edges of its tile are there.
struct Barriers {
  u32 full, free, turns, open, written, edged;
};
constexpr int BARRIERS = 2 * STAGES + 2 + 2 * 5;

DEVICE Barriers find_barriers(u32 bars, int group) {
  u32 own = bars + 8 * (2 * STAGES + 2 + 5 * group);
  return {bars, bars + 8 * STAGES, bars + 16 * STAGES, own, own + 16, own + 32};
}

DEVICE void make_barriers(u32 bars) {
  for (int group = 0; group < 2; group++) {
    Barriers own = find_barriers(bars, group);
    for (int stage = 0; group == 0 && stage < STAGES; stage++) {
      barrier_init(own.full + 8 * stage, 1);
      barrier_init(own.free + 8 * stage, 4);
    }
    for (int side = 0; side < 2; side++) {
      barrier_init(own.open + 8 * side, 1);
      barrier_init(own.written + 8 * side, 128);
    }
    barrier_init(own.turns + 8 * group, 128);
    barrier_init(own.edged, 32);
  }
  fence_init();
  fence_copies();
}

// The first part of a stage; x follows.
DEVICE void load_weight(const Argument& work, Tile tile, int k, u32 stage, u32 bar) {
  barrier_expect(bar, STAGE_BYTES - (2 - tile.halves) * X_BYTES / 2);
  load_tile(stage + X_BYTES, &work.weight, k * STEP, tile.left, bar);
}

DEVICE void produce(const Argument& work, u32 ring, const Barriers& bars, int count) {
  // The weights are there from the start, x with the kernel before.
  for (int fill = 0; fill < min(STAGES, count * work.depth); fill++) {
    Tile tile = find_tile(work, fill / work.depth);
    load_weight(work, tile, fill % work.depth, ring + fill * STAGE_BYTES, bars.full + 8 * fill);
  }
  wait_for_kernel_before();
  for (int turn = 0, fill = 0; turn < count; turn++) {
    Tile tile = find_tile(work, turn);
    for (int k = 0; k < work.depth; k++, fill++) {
      u32 slot = fill % STAGES, bar = bars.full + 8 * slot, at = ring + slot * STAGE_BYTES;
      if (fill >= STAGES) {
        barrier_wait(bars.free + 8 * slot, fill / STAGES & 1 ^ 1);
        load_weight(work, tile, k, at, bar);
      }
      for (int half = 0; half < tile.halves; half++)
        load_tile(at + half * X_BYTES / 2, &work.x, k * STEP, tile.top + half * HALF, bar);
    }
  }
}

// The product of a tile whose first stage is fill number `first`; the other group's turn begins while the last is read.
// No branch may lie between products in flight: the compiler would have each wait for the one before.
template <int HALVES>
DEVICE void multiply_tile(float (&acc)[2][96], u32 ring, const Barriers& bars, u32 next_turn, int first, int depth,
                          int lane) {
  for (int k = 0; k < depth; k++) {
    int fill = first + k, slot = fill % STAGES;
    barrier_wait(bars.full + 8 * slot, fill / STAGES & 1);
    u64 x = describe(ring + slot * STAGE_BYTES), weight = describe(ring + slot * STAGE_BYTES + X_BYTES);
    open_products();
#pragma unroll
    for (int part = 0; part < 4; part++)
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        multiply_64<E4M3>(acc[half], x + 2 * part + half * (HALF / 8 * 64), weight + 2 * part, k | part);
    close_products();
    wait_for_products<1>();
    if (k > 0 && lane == 0) barrier_arrive(bars.free + 8 * ((fill - 1) % STAGES));
  }
  barrier_arrive(next_turn);
  wait_for_products<0>();
#pragma unroll
  for (int half = 0; half < HALVES; half++) fence_results(acc[half]);
  if (lane == 0) barrier_arrive(bars.free + 8 * ((first + depth - 1) % STAGES));
}

// 16 columns of 64 rows, from the accumulators to where the residual lies: `place` is the lane's in a row of the piece.
// `norms`: shift and spread of the thread's two rows; `small`: the two rows in E4M3.
template <int NUMBER>
DEVICE void finish_columns(const float (&acc)[96], const float* edges, const u32* columns, const float2 (&norms)[2],
                           float2 (&sums)[2], u32 place, u32* small, int lane) {
  float2 bias[2], scale[2] = {};
#pragma unroll
  for (int side = 0; side < 2; side++) {
    int column = NUMBER * 16 + side * 8 + lane % 4 * 2;
    if (RESIDUAL) {
      uint2 both = *(const uint2*)(columns + column);
      float2 left = unpack(both.x), right = unpack(both.y);
      bias[side] = make_float2(left.x, right.x), scale[side] = make_float2(left.y, right.y);
    } else {
      bias[side] = *(const float2*)(edges + ROWS + column);
    }
  }
  u32 at = further<NUMBER % 4>(place), residual[4] = {}, packed[4];
  if (RESIDUAL) load_matrices(at, residual);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int side = i / 2, low = i % 2;
    float left = acc[(NUMBER * 2 + side) * 4 + low * 2], right = acc[(NUMBER * 2 + side) * 4 + low * 2 + 1];
    float2 norm = norms[low], added = unpack(residual[i]);
    if (RESIDUAL) {
      float factor = E4M3 ? __uint_as_float(columns[KEPT]) : 1;
      left = fmaf(left, factor, fmaf(fmaf(added.x, norm.y, norm.x), scale[side].x, bias[side].x));
      right = fmaf(right, factor, fmaf(fmaf(added.y, norm.y, norm.x), scale[side].y, bias[side].y));
      sums[low].x += left + right, sums[low].y += fmaf(left, left, right * right);
    } else {
      left = fmaf(left, norm.y, bias[side].x), right = fmaf(right, norm.y, bias[side].y);
    }
    packed[i] = pack(left, right);
  }
  if (GELU) activate(packed);
  if (NARROW)
    for (int low = 0; low < 2; low++) small[low] = narrow(packed[low], packed[2 + low], columns[KEPT + 1]);
  if (RESIDUAL || !NARROW) store_matrices(at, packed);
}

// A thread's two rows of half a piece in E4M3, to shared memory.
DEVICE void leave_narrow(const u32 (&small)[4], u32 piece, int side, int row, int lane) {
#pragma unroll
  for (int low = 0; low < 2; low++, row += 8)
    store2(piece + row * PIECE + ((lane % 4 ^ row >> 1 & 3) << 4) + side * 8, small[low], small[2 + low]);
}

// Of a whole piece, to the copy.
DEVICE void write_narrow(const Argument& work, const u32 (&small)[2][4], int turn, int column, int row, int lane) {
  Tile tile = find_tile(work, turn);
  u8* to = work.narrow + (u64)(tile.top + row) * work.across * COLUMNS + tile.left + column + lane % 4 * 16;
#pragma unroll
  for (int low = 0; low < 2; low++, row += 8, to += 8 * work.across * COLUMNS)
    if (tile.top + row < tile.end)
      *(uint4*)to = make_uint4(small[0][low], small[0][2 + low], small[1][low], small[1][2 + low]);
}

// Piece number NUMBER of the tile of a turn, of so many halves, which is piece `piece` of the group's.
template <int NUMBER>
DEVICE void finish_piece(const Argument& work, const float (&acc)[2][96], const float* edges, const u32* columns,
                         float2 (&sums)[2][2], u32 buffers, const Barriers& bars, int halves, int turn, int piece,
                         int warp, int lane) {
  int side = piece & 1;
  barrier_wait(bars.open + 8 * side, piece >> 1 & 1 ^ (RESIDUAL ? 0 : 1));
  int row = warp * 16 + lane % 16;  // that the lane names to the matrix copies
  u32 buffer = buffers + side * PIECE_BYTES, copy = COPIES ? buffers + 2 * PIECE_BYTES + side * COPY_BYTES : buffer;
  u32 place = buffer + row * 128 + ((lane / 16 ^ row & 7) << 4);
#pragma unroll
  for (int half = 0; half < 2; half++, place += HALF * 128) {
    if (half >= halves) break;
    int own_row = half * HALF + warp * 16 + lane / 4;
    float2 norms[2];
#pragma unroll
    for (int low = 0; low < 2; low++) {
      int own = own_row + low * 8;
      norms[low] = RESIDUAL ? ((const float2*)edges)[own] : make_float2(0, edges[own]);
    }
    u32 small[2][4];
    finish_columns<NUMBER * 4>(acc[half], edges, columns, norms, sums[half], place, small[0], lane);
    finish_columns<NUMBER * 4 + 1>(acc[half], edges, columns, norms, sums[half], place, small[0] + 2, lane);
    if (NARROW && !WRITES) leave_narrow(small[0], copy, 0, own_row, lane);
    finish_columns<NUMBER * 4 + 2>(acc[half], edges, columns, norms, sums[half], place, small[1], lane);
    finish_columns<NUMBER * 4 + 3>(acc[half], edges, columns, norms, sums[half], place, small[1] + 2, lane);
    if (NARROW && !WRITES) leave_narrow(small[1], copy, 1, own_row, lane);
    if (WRITES) write_narrow(work, small, turn, NUMBER * PIECE, own_row, lane);
  }
  fence_copies();
  barrier_arrive(bars.written + 8 * side);
}

DEVICE void store_sums(const Argument& work, float2 (&sums)[2][2], Tile tile, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 own = add_neighbours(sums[i / 2][i % 2]);
    int row = tile.top + i / 2 * HALF + warp * 16 + lane / 4 + i % 2 * 8;
    if (lane % 4 == 0 && row < tile.end) work.out_sums[(u64)row * work.across + tile.left / COLUMNS] = own;
  }
}

// Every second tile of the program: multiply in turn, then finish the tile while the other group multiplies.
DEVICE void consume(const Argument& work, u32 ring, u32 buffers, const float* edges, const u32* columns,
                    const Barriers& bars, int group, int count) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  if (RESIDUAL) wait_for_kernel_before();
  for (int turn = group, piece = 0; turn < count; turn += 2, piece += PIECES) {
    float acc[2][96];
    float2 sums[2][2] = {};
    int halves = find_tile(work, turn).halves, first = turn * work.depth;
    u32 next_turn = bars.turns + 8 * (1 - group);
    barrier_wait(bars.turns + 8 * group, turn / 2 & 1 ^ (group == 0 ? 1 : 0));
    if (halves == 2)
      multiply_tile<2>(acc, ring, bars, next_turn, first, work.depth, lane);
    else
      multiply_tile<1>(acc, ring, bars, next_turn, first, work.depth, lane);
    barrier_wait(bars.edged, turn / 2 & 1);
    finish_piece<0>(work, acc, edges, columns, sums, buffers, bars, halves, turn, piece, warp, lane);
    finish_piece<1>(work, acc, edges, columns, sums, buffers, bars, halves, turn, piece + 1, warp, lane);
    finish_piece<2>(work, acc, edges, columns, sums, buffers, bars, halves, turn, piece + 2, warp, lane);
    if (RESIDUAL) store_sums(work, sums, find_tile(work, turn), warp, lane);
  }
}

// One lane's part of the edges of a tile: mean times spread and spread of rows, biases of pairs of columns.
struct Edges {
  float2 rows[ROWS / 32];
  u32 biases[COLUMNS / 64];
};

DEVICE Edges fetch_edges(const Argument& work, Tile tile, int lane) {
  Edges edges = {};
  for (int part = 0; part < work.parts; part++)
#pragma unroll
    for (int i = 0; i < ROWS / 32; i++) {
      int row = tile.top + i * 32 + lane;
      float2 own = row < tile.end ? work.sums[(u64)row * work.parts + part] : float2();
      edges.rows[i].x += own.x, edges.rows[i].y += own.y;
    }
#pragma unroll
  for (int i = 0; i < ROWS / 32; i++) {
    float mean = edges.rows[i].x * work.share, square = edges.rows[i].y * work.share;
    float spread = rsqrtf(fmaf(-mean, mean, square) + work.eps);
    if (E4M3 && !RESIDUAL) {
      int row = min(tile.top + i * 32 + lane, tile.end - 1);
      spread *= work.x_scales[row * work.scale_rows] * *work.weight_scale;
    }
    edges.rows[i] = make_float2(-mean * spread, spread);
  }
  if (!RESIDUAL)
#pragma unroll
    for (int i = 0; i < COLUMNS / 64; i++) edges.biases[i] = ((const u32*)(work.bias + tile.left))[i * 32 + lane];
  return edges;
}

// In shared memory: shift and spread of each row; without a residual spread of each row and bias of each column, half
// of them for a GELU.
DEVICE void write_edges(float* to, const Edges& edges, int lane) {
  constexpr float FACTOR = GELU ? 0.5f : 1.0f;
#pragma unroll
  for (int i = 0; i < ROWS / 32; i++) {
    if (RESIDUAL)
      ((float2*)to)[i * 32 + lane] = edges.rows[i];
    else
      to[i * 32 + lane] = edges.rows[i].y * FACTOR;
  }
  if (!RESIDUAL)
#pragma unroll
    for (int i = 0; i < COLUMNS / 64; i++) {
      float2 bias = unpack(edges.biases[i]);
      ((float2*)(to + ROWS))[i * 32 + lane] = make_float2(bias.x * FACTOR, bias.y * FACTOR);
    }
}

DEVICE void load_residual(const Argument& work, u32 buffers, const Barriers& bars, int group, int piece) {
  Tile tile = find_tile(work, group + piece / PIECES * 2);
  u32 side = piece & 1, bar = bars.open + 8 * side, to = buffers + side * PIECE_BYTES;
  int column = tile.left + piece % PIECES * PIECE;
  barrier_expect(bar, tile.halves * PIECE_BYTES / 2);
  for (int half = 0; half < tile.halves; half++)
    load_tile(to + half * PIECE_BYTES / 2, &work.residual, column, tile.top + half * HALF, bar);
}

DEVICE void store_piece(const Argument& work, u32 buffers, Tile tile, int column, int side) {
  u32 from = buffers + side * PIECE_BYTES, copy = buffers + 2 * PIECE_BYTES + side * COPY_BYTES;
  for (int half = 0; half < tile.halves; half++) {
    int row = tile.top + half * HALF;
    if (COPIES) begin_store(&work.copy, copy + half * COPY_BYTES / 2, column, row);
    begin_store(&work.out, from + half * PIECE_BYTES / 2, column, row);
  }
  wait_for_reads();
}

// What a group needs of memory. That it has written the last piece of a tile says that it has read the tile's edges.
DEVICE void attend(const Argument& work, u32 buffers, float* edges, const Barriers& bars, int group, int count) {
  int lane = threadIdx.x % 32, pieces = (count - group + 1) / 2 * PIECES;
  wait_for_kernel_before();
  for (int piece = 0; RESIDUAL && lane == 0 && piece < min(2, pieces); piece++)
    load_residual(work, buffers, bars, group, piece);
  Edges next = {};
  if (group < count) next = fetch_edges(work, find_tile(work, group), lane);
  for (int turn = group, piece = 0; turn < count; turn += 2) {
    write_edges(edges, next, lane);
    barrier_arrive(bars.edged);
    if (turn + 2 < count) next = fetch_edges(work, find_tile(work, turn + 2), lane);
    Tile tile = find_tile(work, turn);
    for (int number = 0; number < PIECES; number++, piece++) {
      u32 side = piece & 1;
      barrier_wait(bars.written + 8 * side, piece >> 1 & 1);
      __syncwarp();  // what follows lets the barrier go on, perhaps past who has not looked yet
      if (lane == 0) {
        store_piece(work, buffers, tile, tile.left + number * PIECE, side);
        if (!RESIDUAL) barrier_arrive(bars.open + 8 * side);
        if (RESIDUAL && piece + 2 < pieces) load_residual(work, buffers, bars, group, piece + 2);
      }
    }
    __syncwarp();
  }
  if (lane == 0) wait_for_stores();
}

extern "C" __global__ void __launch_bounds__(384, 1) gemm_wide(const __grid_constant__ Argument work) {
  extern __shared__ __align__(1024) char area[];
  let_next_kernel_start();
  char* behind = area + STAGES * STAGE_BYTES + 2 * GROUP_BYTES;
  u32 ring = address_of(area), bars = address_of(behind);
  u32* columns = (u32*)(behind + 8 * BARRIERS);
  float* edges = (float*)(columns + KEPT + FACTORS);
  if (RESIDUAL && threadIdx.x < COLUMNS) {  // bias and scale: a program keeps its column
    int column = blockIdx.x % work.across * COLUMNS + threadIdx.x;
    columns[threadIdx.x] = work.bias[column] | work.scales[column] << 16;
  }
  if (RESIDUAL && E4M3 && threadIdx.x == 0) columns[KEPT] = __float_as_uint(*work.x_scales * *work.weight_scale);
  if (NARROW && threadIdx.x == 0) columns[KEPT + 1] = pack(*work.out_factor, *work.out_factor);
  if (threadIdx.x == 0) make_barriers(bars);
  __syncthreads();
  int count = count_turns(work), warp = threadIdx.x / 32;
  int group = warp < 4 ? warp - 1 : warp / 4 - 1;
  u32 buffers = ring + STAGES * STAGE_BYTES + group * GROUP_BYTES;
  Barriers own = find_barriers(bars, group);
  if (warp < 4) {
    leave_registers<40>();
    if (threadIdx.x == 0) produce(work, ring, own, count);
    if (warp == 1 || warp == 2) attend(work, buffers, edges + group * EDGES, own, group, count);
  } else {
    take_registers<232>();
    consume(work, ring, buffers, edges + group * EDGES, columns, own, group, count);
  }
}
