// What few_tokens_cluster.cu is given, and where everything lies in a program's shared memory.
#pragma once
#include "cluster.cuh"

constexpr int HIDDEN = HEADS * 32;
constexpr int STEPS = HIDDEN / 16;  // of a product over the state
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int GROUPS = ROWS / 8;    // of tokens
constexpr int SLICE = ROWS * 64;    // bytes
constexpr int STATE = HEADS * SLICE;
// A box is 32 x 64 weights, two tiles over four steps, in bytes; a unit is one fill of the ring.
constexpr int BOX_ROWS = 32, BOX_COLUMNS = 64, BOX = 2 * BOX_ROWS * BOX_COLUMNS, BOXES = 6, UNIT = BOXES * BOX;
constexpr int BIASES = 2 * (96 + 32 + 128 + 32), NORMS = 2 * 4 * HIDDEN, VECTORS = BIASES + NORMS;  // bytes of a layer
// Offsets of the vectors, in halves.
constexpr int QKV_BIAS = 0, OUT_BIAS = 96, UP_BIAS = 128, DOWN_BIAS = 256, NORM_1 = 288, NORM_2 = 288 + 2 * HIDDEN;
// Shared memory: what is left after everything else is the ring.
constexpr int X = 0, CONTEXT = STATE, Y = 2 * STATE, PARTS = 3 * STATE, LOCAL = 4 * STATE, SUMS = LOCAL + 4 * SLICE;
constexpr int VECTOR = SUMS + 8 * 16 * 4 * ROWS, VECTOR_FULL = VECTOR + 2 * VECTORS;
constexpr int CONTEXT_HERE = VECTOR_FULL + 16, Y_HERE = CONTEXT_HERE + 8, PARTS_HERE = Y_HERE + 8, FULL = PARTS_HERE + 8;
constexpr int SPAN = 1024;  // of the swizzle: where a box may begin
constexpr int STAGES = (SHARED - FULL - SPAN) / (UNIT + 16), EMPTY = FULL + 8 * STAGES;
constexpr int RING = (EMPTY + 8 * STAGES + SPAN - 1) / SPAN * SPAN;
static_assert(STAGES >= 2, "no room for the ring");
static_assert(BOX % SPAN == 0 && RING + STAGES * UNIT <= SHARED, "boxes begin where the swizzle does, in the memory");

struct Input {
  TensorMap query, output, up, down;  // float16: matrices of all layers below each other, [layers * N, K]
  const int *ids, *starts, *ends, *offsets;
  const u16 *words, *positions, *norms;  // float16: [V, H], [P, H], [1 + 2 * layers, 2, H]
  const u8* biases;                      // [layers, HEADS, BIASES] bytes
  float* out;
  int num_tokens, num_rows, num_layers;
  float eps, scale;
};

typedef float Tile[GROUPS][4];  // 16 features of all tokens, as the products leave them
