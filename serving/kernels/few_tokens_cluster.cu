// A whole encoder of MiniLM's width for few tokens: one cluster of HEADS programs, which hold the activations in shared
// memory and send each other what the others need. A 17th warp streams the weights through a ring ahead of everybody.
//
// Program h computes head h, its share of the intermediate and of the state's columns. A layer has four rounds: each
// ends with copies into the others' shared memory, and begins when those of all others have landed. Nobody can be more
// than one round ahead, and no buffer is written in two rounds in a row, so nothing is overwritten before it was read.
//
// Activations lie in slices of 32 columns, [slice][row][32], the 16-byte chunks of a row swapped so that eight rows are
// read without a conflict. Products are weight x activations^T: features down and tokens across, two tiles of 16
// features a warp. Weights come as they are, in boxes of 32 x 64 that the copy engine cuts out of the matrices: rows of
// 128 bytes, whose 16-byte chunks it swaps for the same reason.
//
// Compiled with ROWS (16 or 32), HEADS, SHARED (bytes), POOLING (0 mean, 1 cls, 2 lasttoken) and NORMALIZE.

#include "few_tokens_worker.cuh"

struct Place {
  int column, row;
};

// The 17th warp: vectors and weights of every layer, as soon as there is room.
struct Feeder {
  const Input& in;
  u32 base;
  int rank;
  u32 unit;  // of the ring

  DEVICE void wait_for_room() { barrier_wait(base + EMPTY + 8 * (unit % STAGES), unit / STAGES & 1 ^ 1); }
  // A layer's vectors take the place of those of two layers ago: by the time the ring has room for this layer's first
  // unit nobody reads those.
  DEVICE void feed_vectors(int layer) {
    u32 to = base + VECTOR + (layer & 1) * VECTORS, bar = base + VECTOR_FULL + 8 * (layer & 1);
    wait_for_room();
    barrier_expect(bar, VECTORS);
    copy_in(to, in.biases + (layer * HEADS + rank) * BIASES, BIASES, bar);
    copy_in(to + BIASES, in.norms + (2 + 4 * layer) * HIDDEN, NORMS, bar);
  }
  // COUNT boxes of a matrix, as `multiply_boxes` takes them; `find` says where the box of a number begins.
  template <int COUNT, typename Find>
  DEVICE void feed(const TensorMap& matrix, Find find) {
#pragma unroll 1
    for (int first = 0; first < COUNT; first += BOXES, unit++) {
      u32 to = base + RING + unit % STAGES * UNIT, full = base + FULL + 8 * (unit % STAGES);
      wait_for_room();
      barrier_expect(full, UNIT);
#pragma unroll
      for (int i = 0; i < BOXES; i++) {
        Place place = find(first + i);
        load_tile(to + i * BOX, &matrix, place.column, place.row, full);
      }
    }
  }
  // PAIRS pairs of tiles, `apart` rows from each other, for two halves of the sum.
  template <int PAIRS>
  DEVICE void feed_halves(const TensorMap& matrix, int top, int apart) {
    feed<STEPS / 4 * PAIRS>(matrix, [=](int number) {
      int turn = number / (2 * PAIRS), half = number / PAIRS % 2;
      return Place{half * (HIDDEN / 2) + turn * BOX_COLUMNS, top + number % PAIRS * apart};
    });
  }
  DEVICE void feed_layer(int layer) {
    int top = layer * HIDDEN, own = top + rank * BOX_ROWS, left = rank * 2 * BOX_COLUMNS;
    feed_vectors(layer);
    feed_halves<3>(in.query, 2 * top + own, HIDDEN);
    feed<BOXES>(in.output, [=](int number) { return Place{number * BOX_COLUMNS, own}; });
    feed_halves<4>(in.up, 4 * own, BOX_ROWS);
    feed<2 * HEADS>(in.down, [=](int number) {
      return Place{left + number / HEADS * BOX_COLUMNS, top + number % HEADS * BOX_ROWS};
    });
  }
};

DEVICE void make_barriers(u32 base) {
  for (int stage = 0; stage < STAGES; stage++) {
    barrier_init(base + FULL + 8 * stage, 1);
    barrier_init(base + EMPTY + 8 * stage, WARPS);
  }
  for (u32 bar = VECTOR_FULL; bar < PARTS_HERE; bar += 8) barrier_init(base + bar, 1);
  barrier_init(base + PARTS_HERE, 2);  // the others' bytes, and this program's own part
  fence_init();
  barrier_expect(base + CONTEXT_HERE, (HEADS - 1) * SLICE);
  barrier_expect(base + Y_HERE, (HEADS - 1) * SLICE);
  barrier_expect(base + PARTS_HERE, (HEADS - 1) * SLICE);
}

extern "C" __global__ void __cluster_dims__(HEADS, 1, 1) __launch_bounds__(THREADS + 32, 1) few_tokens_cluster(const __grid_constant__ Input in) {
  extern __shared__ __align__(1024) u8 memory[];
  Worker me(memory, in);
  if (me.warp == WARPS && me.lane == 0)
    fetch_map(&in.query), fetch_map(&in.output), fetch_map(&in.up), fetch_map(&in.down);
  if (threadIdx.x == 0) make_barriers(me.base);
  __syncthreads();
  arrive_cluster();
  if (me.warp < WARPS) {
    me.look_up(in);
    me.embed(in);
  } else if (me.lane == 0) {
    Feeder feeder{in, me.base, (int)me.rank, 0};
    for (int layer = 0; layer < in.num_layers; layer++) feeder.feed_layer(layer);
  }
  __syncwarp();
  wait_cluster();  // from here on everybody's barriers are ready
  if (me.warp < WARPS) {
    for (int layer = 0; layer < in.num_layers; layer++) {
      me.vectors = VECTOR + (layer & 1) * VECTORS;
      barrier_wait(me.base + VECTOR_FULL + 8 * (layer & 1), layer >> 1 & 1);
      me.project_qkv();
      me.attend(in.scale);
      me.receive(CONTEXT_HERE, layer & 1);
      me.project_out();
      me.receive(Y_HERE, 0);
      me.normalize(NORM_1);
      me.project_up();
      me.project_down();
      me.receive(PARTS_HERE, layer & 1);
      me.add_parts();
      me.receive(Y_HERE, 1);
      me.normalize(NORM_2);
    }
    me.pool(in.out);
  }
  __syncwarp();
  arrive_cluster();
  wait_cluster();  // nobody leaves while others still read its memory
}
