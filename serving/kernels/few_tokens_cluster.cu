// A whole encoder of MiniLM's width for few tokens: one cluster of HEADS programs, which hold the activations in shared
// memory and send each other what the others need. A 17th warp streams the weights through a ring ahead of everybody.
//
// Program h computes head h, its share of the intermediate and of the state's columns. A layer has four rounds: each
// ends with copies into the others' shared memory, and begins when those of all others have landed. Nobody can be more
// than one round ahead, and no buffer is written in two rounds in a row, so nothing is overwritten before it was read.
//
// Activations lie in slices of 32 columns, [slice][row][32], the 16-byte chunks of a row swapped so that eight rows are
// read without a conflict. Products are weight x activations^T: features down and tokens across, two tiles of 16
// features a warp. Weights come packed as fragments (few_tokens_cluster.py): 512 bytes are a warp's 16 x 16.
//
// Compiled with ROWS (16 or 32), HEADS, SHARED (bytes), POOLING (0 mean, 1 cls, 2 lasttoken) and NORMALIZE.

#include "few_tokens_worker.cuh"

// The 17th warp: vectors and weights of every layer, as soon as there is room. A layer's vectors take the place of
// those of two layers ago: by the time the ring has room for this layer's first unit nobody reads those.
DEVICE void feed(const Input& in, u32 base, u32 rank) {
  for (int layer = 0, unit = 0; layer < in.num_layers; layer++) {
    int part = layer * HEADS + rank;
    for (int i = 0; i < UNITS; i++, unit++) {
      u32 stage = unit % STAGES, full = base + FULL + 8 * stage;
      barrier_wait(base + EMPTY + 8 * stage, unit / STAGES & 1 ^ 1);
      barrier_expect(full, UNIT);
      copy_in(base + RING + stage * UNIT, in.weights + ((long long)part * UNITS + i) * UNIT, UNIT, full);
      if (i == 0) {
        u32 bar = base + VECTOR_FULL + 8 * (layer & 1);
        barrier_expect(bar, VECTORS);
        copy_in(base + VECTOR + (layer & 1) * VECTORS, in.vectors + (long long)part * VECTORS, VECTORS, bar);
      }
    }
  }
}

extern "C" __global__ void __cluster_dims__(HEADS, 1, 1) __launch_bounds__(THREADS + 32, 1) few_tokens_cluster(const Input in) {
  extern __shared__ __align__(128) u8 memory[];
  Worker me(memory, in);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(me.base + FULL + 8 * stage, 1);
      barrier_init(me.base + EMPTY + 8 * stage, WARPS);
    }
    for (u32 bar = VECTOR_FULL; bar < PARTS_HERE; bar += 8) barrier_init(me.base + bar, 1);
    barrier_init(me.base + PARTS_HERE, 2);  // the others' bytes, and this program's own part
    fence_init();
    barrier_expect(me.base + CONTEXT_HERE, (HEADS - 1) * SLICE);
    barrier_expect(me.base + Y_HERE, (HEADS - 1) * SLICE);
    barrier_expect(me.base + PARTS_HERE, (HEADS - 1) * SLICE);
  }
  __syncthreads();
  arrive_cluster();
  if (me.warp < WARPS) {
    me.look_up(in);
    me.embed(in);
  } else if (me.lane == 0) {
    feed(in, me.base, me.rank);
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
