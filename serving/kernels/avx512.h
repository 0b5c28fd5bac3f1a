/* Vector arithmetic for avx512.c: powers of two, GELU, and products of 8-bit rows and columns. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* A tile of a product is ROWS x COLS: 24 accumulators of the 32 registers. */
enum { ROWS = 6, COLS = 64, LANES = 16 };

INLINE __m512 splat(float x) { return _mm512_set1_ps(x); }

/* [first, last) of `total` that part t of n has. */
INLINE int share(int total, int t, int n) { return (int)((int64_t)total * t / n); }

INLINE __m512 power_of_two(__m512 x) { /* relative error 3.4e-6 */
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_fmadd_ps(splat(0.01355574723f), r, splat(0.05203236901f));
    p = _mm512_fmadd_ps(p, r, splat(0.2413797629f));
    p = _mm512_fmadd_ps(p, r, splat(0.6930321208f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, splat(1.0f)), x);
}

INLINE __m512 gelu(__m512 x) { /* x (1 + erf(x / sqrt 2)) / 2 within 9e-5, a hundredth of a step of 8 bits */
    __m512 c = _mm512_min_ps(splat(4.2f), _mm512_max_ps(splat(-4.2f), x)), u = _mm512_mul_ps(c, c);
    __m512 p = _mm512_fmadd_ps(splat(-9.0175295e-10f), u, splat(7.94133754e-8f));
    p = _mm512_fmadd_ps(p, u, splat(-3.03793104e-6f));
    p = _mm512_fmadd_ps(p, u, splat(6.68906869e-5f));
    p = _mm512_fmadd_ps(p, u, splat(-9.50657413e-4f));
    p = _mm512_fmadd_ps(p, u, splat(9.29822866e-3f));
    p = _mm512_fmadd_ps(p, u, splat(-6.55281991e-2f));
    p = _mm512_fmadd_ps(p, u, splat(0.398465872f));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(c, p, splat(0.5f)));
}

/* dotR: R rows of q times 64 columns of w, int32 [R, 64]. Accumulators have names: compilers keep arrays in memory. */
#define ROW_START(r) const uint8_t *q##r = q + (size_t)r * k; \
    __m512i a##r = _mm512_setzero_si512(), b##r = a##r, c##r = a##r, d##r = a##r;
#define ROW_STEP(r) { int32_t four; memcpy(&four, q##r + i, 4); __m512i v = _mm512_set1_epi32(four); \
    a##r = _mm512_dpbusd_epi32(a##r, v, w0); b##r = _mm512_dpbusd_epi32(b##r, v, w1); \
    c##r = _mm512_dpbusd_epi32(c##r, v, w2); d##r = _mm512_dpbusd_epi32(d##r, v, w3); }
#define ROW_END(r) _mm512_store_si512(out + r * COLS, a##r); _mm512_store_si512(out + r * COLS + 16, b##r); \
    _mm512_store_si512(out + r * COLS + 32, c##r); _mm512_store_si512(out + r * COLS + 48, d##r);
#define DOT(R, EACH) \
    static __attribute__((noinline)) void dot##R(const int8_t *w, const uint8_t *q, int k, int32_t *out) { \
        EACH(ROW_START) \
        for (int i = 0; i < k; i += 4, w += 4 * COLS) { \
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64); \
            __m512i w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192); \
            EACH(ROW_STEP) } \
        EACH(ROW_END) }
#define EACH1(X) X(0)
#define EACH2(X) EACH1(X) X(1)
#define EACH3(X) EACH2(X) X(2)
#define EACH4(X) EACH3(X) X(3)
#define EACH5(X) EACH4(X) X(4)
#define EACH6(X) EACH5(X) X(5)
#define EACH7(X) EACH6(X) X(6)
#define EACH8(X) EACH7(X) X(7)
DOT(1, EACH1) DOT(2, EACH2) DOT(3, EACH3) DOT(4, EACH4) DOT(5, EACH5) DOT(6, EACH6)
static void (*const dots[])(const int8_t *, const uint8_t *, int, int32_t *) = {0, dot1, dot2, dot3, dot4, dot5, dot6};
