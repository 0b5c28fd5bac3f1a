// The feed-forward block of a layer of 384 columns in E4M3, in one kernel for Hopper: up, GELU, down, and the sum with
// the normalised input. The intermediate never leaves the processors.
//
// A cluster of two programs takes 128 rows, of which each of two groups of four warps in both has 64. A program
// computes half of the intermediate, in chunks of 64 columns, and half of the results, in registers: the accumulators
// of a chunk become, behind the GELU, an operand of the product into the results, and are sent to the other program,
// which multiplies by it as well. Groups take turns at the tensor cores, so that the GELU of one runs while the other
// multiplies. One warp streams the weights through a ring, in stages that both groups read: of a chunk two up, one
// down, and one down for the other program's chunk. Another warp for each group does what waits for memory: it loads
// the operand two tiles ahead, the rows that are added one ahead and the norms of rows, and it sends finished pieces.
//
// x lies as it is before its norm. For the product the norm is a factor a row: its scale is in the weights, its shift
// in the bias, and weights whose rows sum to zero take the mean away. What is added is normalised on the way. The sums
// over each half of the columns are left for the norm of who reads the rows.
//
// The product reads a copy of x in E4M3; with COPIES the results leave such a copy. A thread has columns 2 t, 2 t + 1,
// 8 + 2 t and 9 + 2 t of each 16, and they are left side by side: who reads them has its weights in that order.

#include "feed_forward_group.cuh"

// The weights of every tile, chunk after chunk.
DEVICE void produce(const Argument& work, u32 ring, const Barriers& bars, u32 rank, int count) {
  const char* weights = work.weights + rank * FILLS * STAGE_BYTES;
  for (int fill = 0; fill < count * FILLS; fill++) {
    u32 slot = fill % STAGES, bar = bars.full + 8 * slot;
    barrier_wait(bars.free + 8 * slot, fill / STAGES & 1 ^ 1);
    barrier_expect(bar, STAGE_BYTES);
    copy_in(ring + slot * STAGE_BYTES, weights + fill % FILLS * STAGE_BYTES, STAGE_BYTES, bar);
  }
}

// Of a normalised row: mean times spread, negative, and spread.
DEVICE float2 find_norm(const Argument& work, int row) {
  float mean = 0, square = 0;
  for (int part = 0; part < work.parts && row < work.num_rows; part++) {
    float2 own = work.sums[row * work.parts + part];
    mean += own.x, square += own.y;
  }
  mean *= 1.0f / HIDDEN;
  float spread = rsqrtf(fmaf(square, 1.0f / HIDDEN, fmaf(-mean, mean, work.eps)));
  return make_float2(-mean * spread, spread);
}

DEVICE void load_operand(const Argument& work, u32 tile, const Barriers& bars, int round, int top) {
  u32 bar = bars.operands + 8 * (round & 1), at = tile + (round & 1) * OPERAND_BYTES;
  barrier_expect(bar, OPERAND_BYTES);
  for (int piece = 0; piece < PIECES; piece++)
    load_tile(at + piece * BLOCK_BYTES, &work.narrow, piece * PIECE, top, bar);
}

DEVICE void load_added(const Argument& work, u32 tile, const Barriers& bars, u32 rank, int number, int top) {
  barrier_expect(bars.added, ADDED_BYTES);
  load_tile(tile + ADDED + number * ADDED_BYTES, &work.x, (rank * OWN + number) * PIECE, top, bars.added);
}

// What a group needs of memory. That it has written the last piece of a tile says that it has read the norms, and that
// nobody needs its operand any more.
DEVICE void attend(const Argument& work, u32 tile, float2* norms, const Barriers& bars, u32 rank, int group,
                   int count) {
  int lane = threadIdx.x % 32;
  wait_for_kernel_before();
  for (int round = 0; lane == 0 && round < min(2, count); round++)
    load_operand(work, tile, bars, round, find_top(work, round, group));
  for (int i = 0; lane == 0 && i < OWN; i++) load_added(work, tile, bars, rank, i, find_top(work, 0, group));
  float2 next[2];
  for (int i = 0; i < 2; i++) next[i] = find_norm(work, find_top(work, 0, group) + i * 32 + lane);
  for (int round = 0; round < count; round++) {
    for (int i = 0; i < 2; i++) norms[i * 32 + lane] = next[i];
    barrier_arrive(bars.normed);
    int top = find_top(work, round, group), coming = find_top(work, round + 1, group);
    for (int i = 0; i < 2 && round + 1 < count; i++) next[i] = find_norm(work, coming + i * 32 + lane);
#pragma unroll 1  // unrolled it takes registers that this warp does not have
    for (int i = 0; i < OWN; i++) {
      int column = (rank * OWN + i) * PIECE;
      barrier_wait(bars.written + 8 * i, round & 1);
      __syncwarp();
      if (lane > 0) continue;
      if (COPIES) begin_store(&work.narrow, tile + (round & 1) * OPERAND_BYTES + column * ROWS, column, top);
      begin_store(&work.x, tile + ADDED + i * ADDED_BYTES, column, top);
      wait_for_reads();
      if (round + 1 < count) load_added(work, tile, bars, rank, i, coming);
    }
    if (lane == 0 && round + 2 < count) load_operand(work, tile, bars, round + 2, find_top(work, round + 2, group));
    __syncwarp();
  }
  if (lane == 0) wait_for_stores();
}

DEVICE void keep(const Argument& work, Kept& kept, u32 rank) {
  int column = rank * (HIDDEN / 2) + threadIdx.x;
  for (int i = threadIdx.x; i < INNER / 8; i += blockDim.x) {
    const u32* pairs = (const u32*)(work.up_bias + rank * (INNER / 2) + i / 4 * 16 + i % 4 * 2);
    float2 left = unpack(pairs[0]), right = unpack(pairs[4]);
    kept.up_bias[i] = make_float4(0.5f * left.x, 0.5f * left.y, 0.5f * right.x, 0.5f * right.y);
  }
  if (threadIdx.x < HIDDEN / 2) kept.columns[threadIdx.x] = work.down_bias[column] | work.scales[column] << 16;
  if (threadIdx.x > 0) return;
  kept.up_factor = 0.5f * *work.x_scale * *work.up_scale;
  kept.down_factor = *work.inner_scale * *work.down_scale;
  kept.inner_factor = pack(*work.inner_factor, *work.inner_factor);
  if (COPIES) kept.out_factor = pack(*work.out_factor, *work.out_factor);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    feed_forward(const __grid_constant__ Argument work) {
  extern __shared__ __align__(1024) char area[];
  let_next_kernel_start();
  u32 rank = cluster_rank(), ring = address_of(area);
  Kept& kept = *(Kept*)(area + STAGES * STAGE_BYTES + 2 * GROUP_BYTES);
  u32 bars = address_of(&kept + 1);
  keep(work, kept, rank);
  if (threadIdx.x == 0) make_barriers(bars);
  __syncthreads();
  arrive_cluster();
  wait_cluster();  // from here on both programs' barriers are ready
  int pairs = gridDim.x / 2, count = (work.tiles - (int)blockIdx.x / 2 + pairs - 1) / pairs;
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), number = warp < 4 ? warp - 1 : warp / 4 - 1;
  u32 tile = ring + STAGES * STAGE_BYTES + number * GROUP_BYTES;
  Barriers own = find_barriers(bars, number);
  if (warp < 4) {
    leave_registers<40>();
    if (threadIdx.x == 0) produce(work, ring, own, rank, count);
    if (warp == 1 || warp == 2) attend(work, tile, kept.norms[number], own, rank, number, count);
  } else {
    take_registers<232>();
    Group group = {own, ring, tile, rank, number, warp % 4, (int)threadIdx.x % 32, 0, 0, 0};
    group.consume(work, kept, count);
  }
  __syncwarp();
  arrive_cluster();
  wait_cluster();  // nobody leaves while the other still writes to it
}
