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
// 9 + 2 t of each 16, and they are left side by side: who reads them has its weights in that order.
//
// Compiled with RESIDUAL or without, then with GELU or without; each with operands in E4M3 or not, NARROW or not.

#include "wide_results.cuh"

constexpr bool COPIES = RESIDUAL && NARROW;
constexpr int ROWS = 128, COLUMNS = 192, STEP = E4M3 ? 128 : 64, PIECE = 64, PIECES = COLUMNS / PIECE;
constexpr int STAGES = COPIES ? 3 : 4;  // copies take the room of one
constexpr u32 X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + COLUMNS * 128, COPY_BYTES = COPIES ? ROWS * PIECE : 0;
constexpr u32 PIECE_BYTES = ROWS * PIECE * (NARROW && !RESIDUAL ? 1 : 2), GROUP_BYTES = 2 * (PIECE_BYTES + COPY_BYTES);
constexpr int EDGES = RESIDUAL ? 2 * ROWS : ROWS + COLUMNS;                                   // floats
constexpr int KEPT = RESIDUAL ? COLUMNS : 0, FACTORS = NARROW || (RESIDUAL && E4M3) ? 2 : 0;  // words of a program

struct Argument {
  TensorMap x, weight, out, residual, copy;
  const u16 *bias, *scales;  // the latter of the residual's norm
  const float2* sums;        // sum and sum of squares, [num_rows, parts]
  float2* out_sums;          // [num_rows, across]
  const float *x_scales, *weight_scale, *out_factor;
  float eps, share;                                 // one over the columns of the norm
  int num_rows, tiles, across, last, depth, parts;  // tiles go down the rows, or up from row `last` where there is one
  int scale_rows;                                   // whether x has a scale a row
};

struct Tile {
  int top, left;
};

DEVICE Tile find_tile(const Argument& work, int turn) {
  int tile = blockIdx.x + turn * gridDim.x, row = tile / work.across;
  return {(work.last < 0 ? row : work.last - row) * ROWS, tile % work.across * COLUMNS};
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

DEVICE void produce(const Argument& work, u32 ring, const Barriers& bars, int count) {
  // The weights are there from the start, x with the kernel before.
  for (int fill = 0; fill < min(STAGES, count * work.depth); fill++) {
    int left = find_tile(work, fill / work.depth).left;
    barrier_expect(bars.full + 8 * fill, STAGE_BYTES);
    load_tile(ring + fill * STAGE_BYTES + X_BYTES, &work.weight, fill % work.depth * STEP, left, bars.full + 8 * fill);
  }
  wait_for_kernel_before();
  for (int turn = 0, fill = 0; turn < count; turn++) {
    Tile tile = find_tile(work, turn);
    for (int k = 0; k < work.depth; k++, fill++) {
      u32 slot = fill % STAGES, bar = bars.full + 8 * slot, at = ring + slot * STAGE_BYTES;
      if (fill >= STAGES) {
        barrier_wait(bars.free + 8 * slot, fill / STAGES & 1 ^ 1);
        barrier_expect(bar, STAGE_BYTES);
        load_tile(at + X_BYTES, &work.weight, k * STEP, tile.left, bar);
      }
      load_tile(at, &work.x, k * STEP, tile.top, bar);
    }
  }
}

// The product of a tile, whose first stage is fill number `first`; the last is still being read.
DEVICE void multiply_tile(float (&acc)[2][96], u32 ring, const Barriers& bars, int first, int depth, int lane) {
  for (int k = 0; k < depth; k++) {
    int fill = first + k, slot = fill % STAGES;
    barrier_wait(bars.full + 8 * slot, fill / STAGES & 1);
    u64 x = describe(ring + slot * STAGE_BYTES), weight = describe(ring + slot * STAGE_BYTES + X_BYTES);
    open_products();
#pragma unroll
    for (int part = 0; part < 4; part++) {
      multiply_64<E4M3>(acc[0], x + 2 * part, weight + 2 * part, k | part);
      multiply_64<E4M3>(acc[1], x + 2 * part + 512, weight + 2 * part, k | part);
    }
    close_products();
    wait_for_products<1>();
    if (k > 0 && lane == 0) barrier_arrive(bars.free + 8 * ((fill - 1) % STAGES));
  }
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
      if (E4M3) left *= __uint_as_float(columns[KEPT]), right *= __uint_as_float(columns[KEPT]);
      left += bias[side].x + (added.x * norm.y + norm.x) * scale[side].x;
      right += bias[side].y + (added.y * norm.y + norm.x) * scale[side].y;
      sums[low].x += left + right, sums[low].y += left * left + right * right;
    } else {
      left = left * norm.y + bias[side].x, right = right * norm.y + bias[side].y;
    }
    packed[i] = pack(left, right);
  }
  if (GELU) activate(packed);
  if (NARROW)
    for (int low = 0; low < 2; low++) small[low] = narrow(packed[low], packed[2 + low], columns[KEPT + 1]);
  if (RESIDUAL || !NARROW) store_matrices(at, packed);
}

// Piece number NUMBER of a tile, which is piece `piece` of the group's.
template <int NUMBER>
DEVICE void finish_piece(const float (&acc)[2][96], const float* edges, const u32* columns, float2 (&sums)[2][2],
                         u32 buffers, const Barriers& bars, int piece, int warp, int lane) {
  int side = piece & 1;
  barrier_wait(bars.open + 8 * side, piece >> 1 & 1 ^ (RESIDUAL ? 0 : 1));
  int row = warp * 16 + lane % 16;  // that the lane names to the matrix copies
  u32 buffer = buffers + side * PIECE_BYTES, copy = COPIES ? buffers + 2 * PIECE_BYTES + side * COPY_BYTES : buffer;
  u32 place = buffer + row * 128 + ((lane / 16 ^ row & 7) << 4);
  u32 narrow_place = copy + row * 64 + ((lane / 16 ^ row >> 1 & 3) << 4);
#pragma unroll
  for (int half = 0; half < 2; half++, place += 64 * 128, narrow_place += 64 * 64) {
    float2 norms[2];
#pragma unroll
    for (int low = 0; low < 2; low++) {
      int own = half * 64 + warp * 16 + lane / 4 + low * 8;
      norms[low] = RESIDUAL ? ((const float2*)edges)[own] : make_float2(0, edges[own]);
    }
    u32 small[2][4];
    finish_columns<NUMBER * 4>(acc[half], edges, columns, norms, sums[half], place, small[0], lane);
    finish_columns<NUMBER * 4 + 1>(acc[half], edges, columns, norms, sums[half], place, small[0] + 2, lane);
    if (NARROW) store_matrices(narrow_place, small[0]);
    finish_columns<NUMBER * 4 + 2>(acc[half], edges, columns, norms, sums[half], place, small[1], lane);
    finish_columns<NUMBER * 4 + 3>(acc[half], edges, columns, norms, sums[half], place, small[1] + 2, lane);
    if (NARROW) store_matrices(further<1>(narrow_place), small[1]);
  }
  fence_copies();
  barrier_arrive(bars.written + 8 * side);
}

DEVICE void store_sums(const Argument& work, float2 (&sums)[2][2], Tile tile, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 own = add_neighbours(sums[i / 2][i % 2]);
    int row = tile.top + i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8;
    if (lane % 4 == 0 && row < work.num_rows) work.out_sums[(u64)row * work.across + tile.left / COLUMNS] = own;
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
    barrier_wait(bars.turns + 8 * group, turn / 2 & 1 ^ (group == 0 ? 1 : 0));
    multiply_tile(acc, ring, bars, turn * work.depth, work.depth, lane);
    barrier_arrive(bars.turns + 8 * (1 - group));
    wait_for_products<0>();
    fence_results(acc[0]);
    fence_results(acc[1]);
    if (lane == 0) barrier_arrive(bars.free + 8 * (((turn + 1) * work.depth - 1) % STAGES));
    barrier_wait(bars.edged, turn / 2 & 1);
    finish_piece<0>(acc, edges, columns, sums, buffers, bars, piece, warp, lane);
    finish_piece<1>(acc, edges, columns, sums, buffers, bars, piece + 1, warp, lane);
    finish_piece<2>(acc, edges, columns, sums, buffers, bars, piece + 2, warp, lane);
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
      float2 own = row < work.num_rows ? work.sums[(u64)row * work.parts + part] : float2();
      edges.rows[i].x += own.x, edges.rows[i].y += own.y;
    }
#pragma unroll
  for (int i = 0; i < ROWS / 32; i++) {
    float mean = edges.rows[i].x * work.share, square = edges.rows[i].y * work.share;
    float spread = rsqrtf(square - mean * mean + work.eps);
    if (E4M3 && !RESIDUAL) {
      int row = min(tile.top + i * 32 + lane, work.num_rows - 1);
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
  u32 side = piece & 1, bar = bars.open + 8 * side;
  barrier_expect(bar, PIECE_BYTES);
  load_tile(buffers + side * PIECE_BYTES, &work.residual, tile.left + piece % PIECES * PIECE, tile.top, bar);
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
      if (lane == 0) {
        if (COPIES)
          begin_store(&work.copy, buffers + 2 * PIECE_BYTES + side * COPY_BYTES, tile.left + number * PIECE, tile.top);
        store_tile(&work.out, buffers + side * PIECE_BYTES, tile.left + number * PIECE, tile.top);
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
  int count = (work.tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x, warp = threadIdx.x / 32;
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
