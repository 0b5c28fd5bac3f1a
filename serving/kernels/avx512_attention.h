/* Attention of one head of one text for avx512.c: products of 16-bit integers, the softmax between them in float32.
 *
 * Queries and keys are rounded to as many steps as 32 bits have room for (8,191 where a head is 32 wide), values to
 * 32,767 of the largest, weights to 32,767 of their sum: finer than bfloat16, in as many instructions, on every
 * processor with VNNI.
 */
#pragma once
#include <math.h>

#include "avx512.h"

/* QUERIES of a text attend together, KEYS are one step of their scores, WHOLE is what weights sum to. */
enum { QUERIES = 8, KEYS = 2 * LANES, WHOLE = 32767 };

/* Numbers of 32 bits that `attend` needs as scratch: keys, values, scores and queries. */
INLINE size_t attend_scratch(int positions, int d) {
    return (size_t)(positions + KEYS - 1) / KEYS * KEYS * (d + QUERIES) + (size_t)QUERIES * d / 2;
}

/* Size of a step when the largest magnitude of rows [len, d] is so many; NaN where a number is, for the vector to
 * show it: as integers NaN is above all else. */
static float find_step(const float *x, int stride, int len, int d, float steps) {
    __m512i top = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int j = 0; j < len; j++)
        for (int i = 0; i < d; i += LANES)
            top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + (size_t)j * stride + i), magnitude));
    float step = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)_mm512_reduce_max_epu32(top)))) / steps;
    return step < 1e-30f ? 1e-30f : step; /* all zeros */
}

INLINE __m512i steps_of(const float *x, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse));
}

/* 32 numbers as 16 pairs, in an order that queries and keys share. */
INLINE __m512i pairs_of(const float *x, __m512 inverse) {
    return _mm512_packs_epi32(steps_of(x, inverse), steps_of(x + LANES, inverse));
}

INLINE void transpose(__m512i *r) { /* 16 x 16 */
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2)
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < LANES; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int k = i; k < LANES; k += 8) {
            t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88), t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++)
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
}

/* Keys as [len / 32][d / 2][32] pairs, zeros behind the last. */
static void pack_keys(const float *x, int stride, int len, int d, float step, int32_t *keys) {
    __m512 inverse = splat(1.0f / step);
    for (int first = 0; first < len; first += KEYS)
        for (int j = first; j < first + KEYS; j += LANES)
            for (int i = 0; i < d; i += 2 * LANES) {
                __m512i rows[LANES];
                for (int r = 0; r < LANES; r++)
                    rows[r] = j + r < len ? pairs_of(x + (size_t)(j + r) * stride + i, inverse) : _mm512_setzero_si512();
                transpose(rows);
                for (int r = 0; r < LANES; r++)
                    _mm512_storeu_si512(keys + (size_t)first * d / 2 + (i / 2 + r) * KEYS + (j - first), rows[r]);
            }
}

/* Values as [len / 2][d] pairs of one row and the next, zero behind the last. */
static void pack_values(const float *x, int stride, int len, int d, float step, int32_t *values) {
    __m512 inverse = splat(1.0f / step);
    for (int j = 0; j < len; j += 2)
        for (int i = 0; i < d; i += LANES) {
            const float *row = x + (size_t)j * stride + i;
            __m512i low = steps_of(row, inverse);
            __m512i high = j + 1 < len ? steps_of(row + stride, inverse) : _mm512_setzero_si512();
            low = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(values + (size_t)j / 2 * d + i, low);
        }
}

#define HEAD_START(r) __m512i a##r = _mm512_setzero_si512(), b##r = a##r;
#define HEAD_STEP(r, pair) { __m512i v = _mm512_set1_epi32(pair); \
    a##r = _mm512_dpwssd_epi32(a##r, v, c0); b##r = _mm512_dpwssd_epi32(b##r, v, c1); }
#define SCORE_STEP(r) HEAD_STEP(r, q[r * (d / 2) + i])
#define SCORE_END(r) _mm512_storeu_si512(p + (size_t)r * pad + j, a##r); \
    _mm512_storeu_si512(p + (size_t)r * pad + j + LANES, b##r);
#define MIX_STEP(r) HEAD_STEP(r, p[(size_t)r * pad + j])
#define MIX_END(r) { __m512 s = splat(scales[r]); float *o = out + (size_t)r * hidden + i; \
    _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_cvtepi32_ps(a##r), s)); \
    _mm512_storeu_ps(o + LANES, _mm512_mul_ps(_mm512_cvtepi32_ps(b##r), s)); }
/* scoreR: R queries [R, d / 2] times keys, [R, pad]. mixR: R rows of weights, pairs at the start of [R, pad], times
 * values, by the scale of each, [R, hidden]. */
#define HEAD(R, EACH) \
    static __attribute__((noinline)) void score##R(const int32_t *q, const int32_t *keys, int d, int pad, int32_t *p) { \
        for (int j = 0; j < pad; j += KEYS) { \
            EACH(HEAD_START) \
            for (int i = 0; i < d / 2; i++, keys += KEYS) { \
                __m512i c0 = _mm512_loadu_si512(keys), c1 = _mm512_loadu_si512(keys + LANES); \
                EACH(SCORE_STEP) } \
            EACH(SCORE_END) } } \
    static __attribute__((noinline)) void mix##R(const int32_t *p, const int32_t *values, int d, int len, int pad, \
                                                 const float *scales, int hidden, float *out) { \
        for (int i = 0; i < d; i += 2 * LANES) { \
            const int32_t *v = values + i; \
            EACH(HEAD_START) \
            for (int j = 0; j < (len + 1) / 2; j++, v += d) { \
                __m512i c0 = _mm512_loadu_si512(v), c1 = _mm512_loadu_si512(v + LANES); \
                EACH(MIX_STEP) } \
            EACH(MIX_END) } }
HEAD(1, EACH1) HEAD(2, EACH2) HEAD(3, EACH3) HEAD(4, EACH4) HEAD(5, EACH5) HEAD(6, EACH6) HEAD(7, EACH7) HEAD(8, EACH8)
static void (*const scores[])(const int32_t *, const int32_t *, int, int, int32_t *) = {
    0, score1, score2, score3, score4, score5, score6, score7, score8};
static void (*const mixes[])(const int32_t *, const int32_t *, int, int, int, const float *, int, float *) = {
    0, mix1, mix2, mix3, mix4, mix5, mix6, mix7, mix8};

/* Sixteen scores as shares of the highest. */
INLINE __m512 weigh(const int32_t *p, __m512 step, __m512 highest) {
    return power_of_two(_mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(p)), step, highest));
}

/* Turn a row of scores, in steps of `step` powers of two, into pairs of weights, zero behind `len`; returns their sum
 * before they were scaled to be WHOLE: NaN where a score is not finite. */
static float softmax(int32_t *p, int len, float step) {
    int last = (len - 1) / LANES * LANES; /* of the vector that may be part of one */
    __mmask16 live = (__mmask16)(0xffff >> (LANES - len + last));
    __m512i top = _mm512_mask_loadu_epi32(_mm512_set1_epi32(INT32_MIN), live, p + last);
    for (int j = 0; j < last; j += LANES) top = _mm512_max_epi32(top, _mm512_loadu_si512(p + j));
    __m512 scale = splat(step), highest = splat((float)_mm512_reduce_max_epi32(top) * step);
    __m512 tail = _mm512_maskz_mov_ps(live, weigh(p + last, scale, highest)), sum = tail;
    for (int j = 0; j < last; j += LANES) {
        __m512 t = weigh(p + j, scale, highest);
        sum = _mm512_add_ps(sum, t);
        _mm512_storeu_ps(p + j, t);
    }
    _mm512_storeu_ps(p + last, tail);
    float total = _mm512_reduce_add_ps(sum);
    __m512 inverse = splat(WHOLE / total);
    for (int j = 0; j < len; j += LANES) /* 16 weights of 16 bits go where 8 scores were */
        _mm256_storeu_si256((__m256i *)(p + j / 2), _mm512_cvtsepi32_epi16(
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + j), inverse))));
    return total;
}

/* One head of one text: qkv points at its first query, rows are 3 * hidden apart; context rows are `hidden` apart. */
static void attend(const float *qkv, int hidden, int d, int len, float *context, int32_t *scratch) {
    int stride = 3 * hidden, pad = (len + KEYS - 1) / KEYS * KEYS, num_blocks = (len + QUERIES - 1) / QUERIES;
    int32_t *keys = scratch, *values = keys + (size_t)pad * d / 2, *p = values + (size_t)pad * d / 2;
    int32_t *queries = p + (size_t)QUERIES * pad;
    float most = floorf(46340.0f / sqrtf((float)d)); /* d * most^2 < 2^31 */
    float key_step = find_step(qkv + hidden, stride, len, d, most);
    float value_step = find_step(qkv + 2 * hidden, stride, len, d, WHOLE);
    pack_keys(qkv + hidden, stride, len, d, key_step, keys);
    pack_values(qkv + 2 * hidden, stride, len, d, value_step, values);
    for (int block = 0; block < num_blocks; block++) {
        int first = share(len, block, num_blocks), rows = share(len, block + 1, num_blocks) - first;
        const float *q = qkv + (size_t)first * stride;
        float step = find_step(q, stride, rows, d, most), scales[QUERIES];
        __m512 inverse = splat(1.0f / step);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < d; i += 2 * LANES)
                _mm512_storeu_si512(queries + (r * d + i) / 2, pairs_of(q + (size_t)r * stride + i, inverse));
        scores[rows](queries, keys, d, pad, p);
        step *= key_step * 1.44269504f / sqrtf((float)d);
        for (int r = 0; r < rows; r++) /* 0 times what is not finite is NaN */
            scales[r] = value_step / WHOLE + 0.0f * softmax(p + (size_t)r * pad, len, step);
        mixes[rows](p, values, d, len, pad, scales, hidden, context + (size_t)first * hidden);
    }
}
