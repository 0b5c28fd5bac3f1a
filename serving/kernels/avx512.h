/* Vector arithmetic for avx512.c: exponential, GELU, and products of 8-bit rows and columns. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* A tile of a product is ROWS x COLS: 24 accumulators of the 32 registers. */
enum { ROWS = 6, COLS = 64, LANES = 16 };

INLINE __m512 splat(float x) { return _mm512_set1_ps(x); }

INLINE __m512 exponential(__m512 x) { /* Cephes expf, error below 2 ulp */
    x = _mm512_max_ps(x, splat(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, splat(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4f), r);
    __m512 p = _mm512_fmadd_ps(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, splat(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, splat(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, splat(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, splat(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, splat(1.0f)));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512 gelu(__m512 x) { /* x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, error 1.5e-7 */
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), splat(0.70710678f));
    __m512 d = _mm512_fmadd_ps(z, splat(0.3275911f), splat(1.0f)), t = _mm512_rcp14_ps(d);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, splat(2.0f)));
    __m512 p = _mm512_fmadd_ps(splat(1.061405429f), t, splat(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, splat(1.421413741f));
    p = _mm512_fmadd_ps(p, t, splat(-0.284496736f));
    p = _mm512_mul_ps(_mm512_fmadd_ps(p, t, splat(0.254829592f)), t);
    __m512 square = _mm512_mul_ps(z, z), half = _mm512_mul_ps(x, splat(0.5f));
    __m512 erf = _mm512_fnmadd_ps(p, exponential(_mm512_sub_ps(_mm512_setzero_ps(), square)), splat(1.0f));
    return _mm512_fmadd_ps(_mm512_abs_ps(half), erf, half);
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
#define EACH8(X) EACH6(X) X(6) X(7)
DOT(1, EACH1) DOT(2, EACH2) DOT(3, EACH3) DOT(4, EACH4) DOT(5, EACH5) DOT(6, EACH6)
static void (*const dots[])(const int8_t *, const uint8_t *, int, int32_t *) = {0, dot1, dot2, dot3, dot4, dot5, dot6};
