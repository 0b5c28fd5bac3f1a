// What the sixteen warps of a program do in a layer of few_tokens_cluster.cu, which says how they work together.
#pragma once
#include "few_tokens_layout.cuh"

DEVICE void meet() { meet_threads<THREADS>(); }

// Where chunk `chunk` (8 columns) of row `row` lies in its slice.
DEVICE u32 place(int row, int chunk) { return row * 64 + (((chunk ^ (row >> 1)) & 3) << 4); }

struct Worker {
  u8* memory;
  u32 base, rank;
  int warp, lane;
  u32 filled;                         // units of the ring that were used up
  int vectors;                        // this layer's, in shared memory
  u32 left;                           // what this lane says to ldmatrix and stmatrix: a row, one of two chunks
  u32 boxed;                          // the same for weights, from a box's begin on
  u32 pair;                           // where two columns of a row lie in a slice: 16 threads a row
  float eps;
  u32 own;                            // bit 16 n + i: of `attend`'s row n, key i of this lane is of the same sequence
  int begin, end;                     // of the sequence that `pool` has here

  DEVICE Worker(u8* shared, const Input& in) : memory(shared), base(address_of(shared)), rank(cluster_rank()) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, filled = 0, eps = in.eps;
    left = base + place(((lane >> 4) << 3) + (lane & 7), (lane >> 3) & 1);
    boxed = base + 2 * BOX_COLUMNS * (lane & 15) + (((lane >> 4) ^ (lane & 7)) << 4);
    pair = place(threadIdx.x >> 4, (lane >> 2) & 3) + 4 * (lane & 3);
  }
  DEVICE u32 word(u32 offset) const { return *(const u32*)(memory + offset); }
  DEVICE float vector(int index) const { return unpack(*(const u16*)(memory + vectors + 2 * index)).x; }

  DEVICE u32 next_unit() {
    u32 stage = filled % STAGES;
    barrier_wait(base + FULL + 8 * stage, filled / STAGES & 1);
    return RING + stage * UNIT;
  }
  DEVICE void release_unit() {
    __syncwarp();
    if (lane == 0) barrier_arrive(base + EMPTY + 8 * (filled % STAGES));
    filled++;
  }
  DEVICE void pass_units(u32 end) {
#pragma unroll 1
    while (filled < end) next_unit(), release_unit();
    filled = end;  // as it is: so the compiler knows where units lie
  }
  // acc += two tiles of weights x activations, COUNT steps from `first` on of those that lie at `boxes` and `from`.
  template <int COUNT>
  DEVICE void multiply_pair(Tile* acc, u32 boxes, u32 from, int first) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int step = first + i;
      u32 w[2][4], at = (boxes ^ ((step & 3) << 5)) + (step >> 2) * BOX;
      load4(w[0], at), load4(w[1], at + BOX / 2);
      u32 there = (from ^ ((step & 1) << 5)) + (step >> 1) * SLICE;
#pragma unroll
      for (int group = 0; group < GROUPS; group += 2) {
        u32 b[4];
        load4(b, there + group * 512);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          multiply(acc[tile][group], w[tile], b[0], b[1]);
          multiply(acc[tile][group + 1], w[tile], b[2], b[3]);
        }
      }
    }
  }
  // acc += what this warp has of a matrix x the activations from `from` on: COUNT boxes. In the ring lie the first boxes
  // of each of the SHARERS, then the second of each, and so on.
  template <int SHARERS, int COUNT>
  DEVICE void multiply_boxes(Tile* acc, u32 from) {
    static_assert(SHARERS >= BOXES && SHARERS * COUNT % BOXES == 0, "a unit has one box of a warp, of one matrix");
    u32 first = filled;
    if (warp < SHARERS)
#pragma unroll
      for (int turn = 0; turn < COUNT; turn++) {
        u32 number = turn * SHARERS + warp;
        pass_units(first + number / BOXES);
        multiply_pair<4>(acc, boxed + next_unit() + number % BOXES * BOX, from + 2 * turn * SLICE, 0);
        release_unit();
      }
    pass_units(first + SHARERS * COUNT / BOXES);
  }
  // A tile in float16 to columns 16 `number` .. of `area`.
  DEVICE void write_tile(const Tile& acc, u32 area, int number) {
    u32 there = ((left + area) ^ ((number & 1) << 5)) + (number >> 1) * SLICE;
#pragma unroll
    for (int group = 0; group < GROUPS; group += 2)
      store4_transposed(there + group * 512, pack(acc[group][0], acc[group][1]), pack(acc[group][2], acc[group][3]),
                        pack(acc[group + 1][0], acc[group + 1][1]), pack(acc[group + 1][2], acc[group + 1][3]));
  }
  DEVICE float4* sums(int slot) { return (float4*)(memory + SUMS) + slot * GROUPS * 32 + lane; }
  DEVICE void put_sums(const Tile& acc, int slot) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
      sums(slot)[32 * group] = make_float4(acc[group][0], acc[group][1], acc[group][2], acc[group][3]);
  }
  // Two warps have halves of the sum of the same two tiles: each finishes one, with bias, in acc[0].
  DEVICE void trade(Tile* acc, int half, int number, int bias, bool takes_part) {
    if (takes_part) {
      if (half) put_sums(acc[0], 2 * number);
      else put_sums(acc[1], 2 * number + 1);
    }
    meet();
    if (!takes_part) return;
    int feature = bias + 16 * (2 * number + half) + (lane >> 2);
    float top = vector(feature), bottom = vector(feature + 8);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      float4 other = sums(2 * number + half)[32 * group];
#pragma unroll
      for (int i = 0; i < 4; i++)
        acc[0][group][i] = (half ? acc[1][group][i] : acc[0][group][i]) + (&other.x)[i] + (i < 2 ? top : bottom);
    }
  }
  // This program's slice of `area` to all others.
  DEVICE void send_all(u32 area, u32 bar) {
    u32 slice = base + area + rank * SLICE;
    if (warp == 0 && lane < HEADS && lane != rank) send(slice, slice, SLICE, base + bar, lane);
  }
  // Wait for what all others sent, and say how much the next round brings.
  DEVICE void receive(u32 bar, u32 parity) {
    barrier_wait(base + bar, parity);
    if (threadIdx.x == 0) barrier_expect(base + bar, (HEADS - 1) * SLICE);
  }

  // What later methods need of the batch, read early: a read takes longer than a round.
  DEVICE void look_up(const Input& in) {
    int sequence = rank + HEADS * warp;
    bool live = sequence < in.num_rows;
    begin = live ? in.offsets[sequence] : 0, end = live ? in.offsets[sequence + 1] : 0, own = 0;
    if (warp < ROWS / 16)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        int row = 16 * warp + (lane >> 2) + 8 * part;
        int first = row < in.num_tokens ? in.starts[row] : 0, last = row < in.num_tokens ? in.ends[row] : 1;
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) {
          int key = 8 * (i >> 1) + 2 * (lane & 3) + (i & 1);
          own |= (u32)(key >= first && key < last) << (16 * part + i);
        }
      }
  }
  // Layer norms: a warp has two rows, four lanes a slice of 32 columns, and so three slices a lane.
  DEVICE int norm_row() const { return 2 * warp + (lane >> 2 & 1); }
  DEVICE int norm_column(int i) const { return 32 * (4 * i + (lane >> 3)) + 8 * (lane & 3); }
  DEVICE u32 norm_place(int i) const { return (4 * i + (lane >> 3)) * SLICE + place(norm_row(), lane & 3); }
  DEVICE static float over_row(float value) {
#pragma unroll
    for (int far = 1; far < 32; far *= far == 2 ? 4 : 2) value += __shfl_xor_sync(~0u, value, far);
    return value;
  }
  DEVICE void write_norm(float (*values)[8], const u16* weight) {
    constexpr int PARTS_OF = HEADS / 4;
    float total = 0.0f, square = 0.0f;
#pragma unroll
    for (int i = 0; i < 8 * PARTS_OF; i++) total += values[i / 8][i % 8];
    float mean = over_row(total) * (1.0f / HIDDEN);
#pragma unroll
    for (int i = 0; i < 8 * PARTS_OF; i++) {
      values[i / 8][i % 8] -= mean;
      square += values[i / 8][i % 8] * values[i / 8][i % 8];
    }
    float spread = rsqrtf(over_row(square) * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (int i = 0; i < PARTS_OF; i++) {
      uint4 scales = *(const uint4*)(weight + norm_column(i)), shifts = *(const uint4*)(weight + HIDDEN + norm_column(i)), out;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float2 scale = unpack((&scales.x)[j]), shift = unpack((&shifts.x)[j]);
        (&out.x)[j] = pack(values[i][2 * j] * spread * scale.x + shift.x, values[i][2 * j + 1] * spread * scale.y + shift.y);
      }
      *(uint4*)(memory + X + norm_place(i)) = out;
    }
  }
  DEVICE void embed(const Input& in) {
    int row = norm_row();
    if (2 * warp < ROWS) {
      float values[HEADS / 4][8] = {};
      if (row < in.num_tokens) {
        const u16* words = in.words + (long long)in.ids[row] * HIDDEN;
        const u16* positions = in.positions + (long long)(row - in.starts[row]) * HIDDEN;
#pragma unroll
        for (int i = 0; i < HEADS / 4; i++) {
          uint4 first = *(const uint4*)(words + norm_column(i)), second = *(const uint4*)(positions + norm_column(i));
#pragma unroll
          for (int j = 0; j < 4; j++) {
            float2 a = unpack((&first.x)[j]), b = unpack((&second.x)[j]);
            values[i][2 * j] = a.x + b.x, values[i][2 * j + 1] = a.y + b.y;
          }
        }
      }
      write_norm(values, in.norms);
    }
    meet();
  }
  DEVICE void normalize(int norm) {
    if (2 * warp < ROWS) {
      float values[HEADS / 4][8];
#pragma unroll
      for (int i = 0; i < HEADS / 4; i++) {
        uint4 both = *(const uint4*)(memory + Y + norm_place(i));
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float2 value = unpack((&both.x)[j]);
          values[i][2 * j] = value.x, values[i][2 * j + 1] = value.y;
        }
      }
      write_norm(values, (const u16*)(memory + vectors) + norm);
    }
    meet();
  }

  // PAIRS pairs of tiles over the state, half of the sum a warp. Whether this warp has a result, and then in acc[0].
  template <int PAIRS>
  DEVICE bool project_halves(Tile* acc, int bias) {
    int half = warp / PAIRS;
    bool takes_part = warp < 2 * PAIRS;
    multiply_boxes<2 * PAIRS, STEPS / 8>(acc, left + X + half * (STEPS / 4) * SLICE);
    trade(acc, half, warp % PAIRS, bias, takes_part);
    return takes_part;
  }
  // Queries, keys and values of this head: slices 0, 1 and 2 of LOCAL.
  DEVICE void project_qkv() {
    Tile acc[2] = {};
    if (project_halves<3>(acc, QKV_BIAS)) write_tile(acc[0], LOCAL, 2 * (warp % 3) + warp / 3);
    meet();
  }
  // This head's context for 16 tokens a warp, into its slice of CONTEXT.
  DEVICE void attend(float scale) {
    if (warp < ROWS / 16) {
      int top = 16 * warp, group = lane >> 3;
      float scores[GROUPS][4] = {};
#pragma unroll
      for (int step = 0; step < 2; step++) {
        u32 q[4];
        load4(q, base + LOCAL + place(top + ((group & 1) << 3) + (lane & 7), 2 * step + (group >> 1)));
#pragma unroll
        for (int key = 0; key < GROUPS; key += 2) {
          u32 k[4];
          load4(k, ((left + LOCAL) ^ (step << 5)) + SLICE + key * 512);
          multiply(scores[key], q, k[0], k[1]);
          multiply(scores[key + 1], q, k[2], k[3]);
        }
      }
      float inverse[2];
#pragma unroll
      for (int part = 0; part < 2; part++) {
        float highest = -1e30f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) {
          float& score = scores[i >> 1][2 * part + (i & 1)];
          score = own & 1u << (16 * part + i) ? score : -1e30f;
          highest = fmaxf(highest, score);
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2)) * scale;
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) {
          float& score = scores[i >> 1][2 * part + (i & 1)];
          sum += score = exp2_fast(score * scale - highest);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        inverse[part] = __fdividef(1.0f, sum);
      }
      float acc[4][4] = {};
#pragma unroll
      for (int key = 0; key < GROUPS; key += 2) {
        u32 p[4] = {pack(scores[key][0], scores[key][1]), pack(scores[key][2], scores[key][3]),
                    pack(scores[key + 1][0], scores[key + 1][1]), pack(scores[key + 1][2], scores[key + 1][3])};
#pragma unroll
        for (int chunk = 0; chunk < 4; chunk += 2) {
          u32 v[4];
          load4_transposed(v, base + LOCAL + 2 * SLICE + key * 512 + place(((group & 1) << 3) + (lane & 7), chunk + (group >> 1)));
          multiply(acc[chunk], p, v[0], v[1]);
          multiply(acc[chunk + 1], p, v[2], v[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int part = i & 1, chunk = i >> 1;
        u32 both = pack(acc[chunk][2 * part] * inverse[part], acc[chunk][2 * part + 1] * inverse[part]);
        *(u32*)(memory + CONTEXT + rank * SLICE + place(top + (lane >> 2) + 8 * part, chunk) + 4 * (lane & 3)) = both;
      }
      fence_copies();
    }
    meet();
    send_all(CONTEXT, CONTEXT_HERE);
  }
  // This program's columns of the output projection, with bias and residual, into its slice of Y. One pair of tiles, a
  // quarter of the sum a warp.
  DEVICE void project_out() {
    Tile acc[2] = {};
    u32 boxes = boxed + next_unit();
    if (warp < 4) {
      multiply_pair<STEPS / 4>(acc, boxes, left + CONTEXT, warp * (STEPS / 4));
      put_sums(acc[0], 2 * warp);
      put_sums(acc[1], 2 * warp + 1);
    }
    release_unit();
    meet();
    // A tile's sums lie as [part][tile][group][lane][4]: a thread finishes two tokens of one feature.
    int tile = threadIdx.x / (64 * GROUPS), rest = threadIdx.x % (64 * GROUPS);
    if (tile < 2) {
      int feature = 16 * tile + 8 * (rest & 1) + (rest >> 3 & 7), token = 8 * (rest >> 6) + (rest & 6);
      u32 top = rank * SLICE + 2 * (feature & 7), next = top + place(token + 1, feature >> 3);
      top += place(token, feature >> 3);
      float bias = vector(OUT_BIAS + feature);
      float first = bias + unpack(*(u16*)(memory + X + top)).x, second = bias + unpack(*(u16*)(memory + X + next)).x;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        float2 both = *(float2*)(memory + SUMS + ((2 * part + tile) * GROUPS * 64 + rest) * 8);
        first += both.x, second += both.y;
      }
      *(u16*)(memory + Y + top) = pack(first, 0.0f);
      *(u16*)(memory + Y + next) = pack(second, 0.0f);
    }
    fence_copies();
    meet();
    send_all(Y, Y_HERE);
  }
  // This program's 128 columns of the intermediate, into LOCAL.
  DEVICE void project_up() {
    Tile acc[2] = {};
    if (project_halves<4>(acc, UP_BIAS)) {
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; i++) acc[0][i >> 2][i & 3] = gelu(acc[0][i >> 2][i & 3]);
      write_tile(acc[0], LOCAL, 2 * (warp % 4) + warp / 4);
    }
    meet();
  }
  // What this program's intermediate adds to every column: warp w has the 32 columns of program w, and sends them there;
  // its own it writes in place, because a copy from a program to itself is none that CUDA's memcheck allows.
  DEVICE void project_down() {
    Tile acc[2] = {};
    multiply_boxes<HEADS, 2>(acc, left + LOCAL);
    if (warp < HEADS) {
      bool is_own = warp == rank;
      u32 slice = is_own ? PARTS + rank * SLICE : CONTEXT + warp * SLICE;  // nobody needs the contexts any more
      write_tile(acc[0], slice, 0), write_tile(acc[1], slice, 1);
      fence_copies(), __syncwarp();
      if (lane == 0 && is_own) barrier_arrive(base + PARTS_HERE);
      if (lane == 0 && !is_own) send(base + PARTS + rank * SLICE, base + slice, SLICE, base + PARTS_HERE, warp);
    }
  }
  // The sum of what all sent for this program's columns, with bias and residual, into its slice of Y.
  DEVICE void add_parts() {
    if (threadIdx.x < 16 * ROWS) {
      float2 bias = unpack(word(vectors + 2 * (DOWN_BIAS + 2 * (threadIdx.x & 15)))), residual = unpack(word(X + rank * SLICE + pair));
      float first = bias.x + residual.x, second = bias.y + residual.y;
#pragma unroll
      for (int part = 0; part < HEADS; part++) {
        float2 both = unpack(word(PARTS + part * SLICE + pair));
        first += both.x, second += both.y;
      }
      *(u32*)(memory + Y + rank * SLICE + pair) = pack(first, second);
    }
    fence_copies();
    meet();
    send_all(Y, Y_HERE);
  }
  // A warp a sequence: the vector of its rows of X.
  DEVICE void pool(float* out) {
    if (begin == end) return;
    int row = rank + HEADS * warp, count = POOLING == 0 ? end - begin : 1;
    if (POOLING == 1) end = begin + 1;
    if (POOLING == 2) begin = end - 1;
    float values[HEADS] = {}, square = 0.0f;
    for (int token = begin; token < end; token++)
#pragma unroll
      for (int slice = 0; slice < HEADS; slice++)
        values[slice] += unpack(*(u16*)(memory + X + slice * SLICE + place(token, lane >> 3) + 2 * (lane & 7))).x;
#pragma unroll
    for (int slice = 0; slice < HEADS; slice++) values[slice] /= count, square += values[slice] * values[slice];
#pragma unroll
    for (int far = 16; far; far >>= 1) square += __shfl_xor_sync(~0u, square, far);
    float length = NORMALIZE ? fmaxf(sqrtf(square), 1e-12f) : 1.0f;
#pragma unroll
    for (int slice = 0; slice < HEADS; slice++) out[row * HIDDEN + 32 * slice + lane] = values[slice] / length;
  }
};
