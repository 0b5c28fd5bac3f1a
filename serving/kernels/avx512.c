/* BERT-family encoders in 8-bit integers, for x86 processors with AVX-512 VNNI: packed texts in, vectors out.
 *
 * Weights are int8 by output channel, inputs of a linear layer uint8 by token with a zero point; sums are exact, all
 * else but the products of attention is float32. Nothing is padded. Threads of a run share the columns of a product and
 * the rows of everything else, take heads of texts as they come to them, and meet at a barrier in between.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"
#include "avx512_attention.h"

/* A block of rows stays in the cache. */
enum { ROW_BLOCK = 192, MAX_THREADS = 64 };
enum { MEAN, FIRST, LAST };
enum { PLAIN, GELU, RESIDUAL };
/* Waiting threads spin this often before they give up their core: between the phases of a run, which take microseconds,
 * and between runs, for a millisecond or two: a client alone is answered in 1.36 ms, after 4,000 spins in 1.58. */
enum { BARRIER_SPINS = 20000, IDLE_SPINS = 100000 };

/* y[n] = scale[n] * (sum over k of w[n, k] q[k]) * s + low * sum[n] + bias[n], for an input x * factor that is
 * q * s + low; w is packed as [n / 64][k / 4][64][4]. Without a factor (NULL) the input is x. */
typedef struct { int32_t n, k; const int8_t *w; const float *scale, *sum, *bias, *factor; } Linear;
typedef struct { Linear qkv, out, up, down; const float *norm1, *norm2; /* weights, then biases */ } Layer;
typedef struct {
    int32_t hidden, heads, ffn, num_layers, positions, pooling, normalize; float eps;
    const int8_t *words; const float *word_scales, *position, *norm;
    const Layer *layers;
} Model;

typedef struct { uint8_t *q; float *scale, *low; } Quantised;

typedef struct {
    const Model *model; int num_threads;
    int num_tokens, num_texts; const int32_t *ids, *starts; float *out; /* of the run */
    float *x, *qkv, *context, *inner; int32_t *scratch; size_t scratch_size; Quantised narrow, wide;
    _Atomic int arrived, phase, next_head, job, is_stopping;
    pthread_t threads[MAX_THREADS];
} Runner;

typedef struct { Runner *runner; int thread; } Place;

INLINE void tile(int num_rows, int kind, const Linear *l, int col, const Quantised *a, int row, float *out) {
    int32_t sums[ROWS * COLS] __attribute__((aligned(64)));
    dots[num_rows](l->w + (size_t)col * l->k, a->q + (size_t)row * l->k, l->k, sums);
    for (int r = 0; r < num_rows; r++) {
        __m512 s = splat(a->scale[row + r]), low = splat(a->low[row + r]);
        float *o = out + (size_t)(row + r) * l->n + col;
        for (int i = 0; i < COLS; i += LANES) {
            int n = col + i;
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * COLS + i)), s);
            __m512 y = _mm512_fmadd_ps(low, _mm512_loadu_ps(l->sum + n), _mm512_loadu_ps(l->bias + n));
            y = _mm512_fmadd_ps(sum, _mm512_loadu_ps(l->scale + n), y);
            if (kind == GELU) y = gelu(y);
            if (kind == RESIDUAL) y = _mm512_add_ps(y, _mm512_loadu_ps(o + i));
            _mm512_storeu_ps(o + i, y);
        }
    }
}

/* Thread t's columns of a product; RESIDUAL adds to what `out` holds. A block of rows stays in the cache. */
INLINE void product(const Runner *e, int t, const int kind, const Linear *l, const Quantised *a, float *out) {
    int units = l->n / COLS, first = share(units, t, e->num_threads), last = share(units, t + 1, e->num_threads);
    for (int block = 0; block < e->num_tokens; block += ROW_BLOCK) {
        int end = block + ROW_BLOCK < e->num_tokens ? block + ROW_BLOCK : e->num_tokens;
        for (int u = first; u < last; u++)
            for (int row = block; row < end; row += ROWS)
                tile(end - row < ROWS ? end - row : ROWS, kind, l, u * COLS, a, row, out);
    }
}

static void barrier(Runner *e) {
    if (e->num_threads == 1) return;
    int phase = atomic_load_explicit(&e->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&e->arrived, 1, memory_order_acq_rel) == e->num_threads - 1) {
        atomic_store_explicit(&e->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&e->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&e->phase, memory_order_acquire) == phase; spins++)
        if (spins < BARRIER_SPINS) _mm_pause(); else sched_yield();
}

INLINE __m512 scaled(const float *x, const float *factor, int i) {
    __m512 v = _mm512_loadu_ps(x + i);
    return factor ? _mm512_mul_ps(v, _mm512_loadu_ps(factor + i)) : v;
}

/* The input x [n] of `l` as row `row` of q. */
static void quantise(const float *x, const Linear *l, const Quantised *q, int row) {
    int n = l->k;
    __m512 lows = splat(INFINITY), highs = splat(-INFINITY);
    __mmask16 nans = 0;
    for (int i = 0; i < n; i += LANES) {
        __m512 v = scaled(x, l->factor, i);
        lows = _mm512_min_ps(lows, v), highs = _mm512_max_ps(highs, v);
        nans |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    float low = _mm512_reduce_min_ps(lows), scale = (_mm512_reduce_max_ps(highs) - low) / 255.0f;
    if (scale < 1e-20f) scale = 1e-20f; /* all alike */
    if (nans) scale = NAN; /* minima skip it: the vector must show it */
    __m512 inverse = splat(1.0f / scale), offset = splat(low / scale);
    for (int i = 0; i < n; i += LANES) {
        __m512 v = _mm512_fmsub_ps(scaled(x, l->factor, i), inverse, offset);
        _mm_storeu_si128((__m128i *)(q->q + (size_t)row * n + i), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    q->scale[row] = scale, q->low[row] = low;
}

static void layer_norm(float *x, int n, const float *weights, float eps) { /* n is a multiple of two vectors */
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int i = 0; i < n; i += 2 * LANES) {
        even = _mm512_add_ps(even, _mm512_loadu_ps(x + i));
        odd = _mm512_add_ps(odd, _mm512_loadu_ps(x + i + LANES));
    }
    __m512 mean = splat(_mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / n);
    even = odd = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 2 * LANES) {
        __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean), f = _mm512_sub_ps(_mm512_loadu_ps(x + i + LANES), mean);
        even = _mm512_fmadd_ps(d, d, even), odd = _mm512_fmadd_ps(f, f, odd);
    }
    __m512 inverse = splat(1.0f / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / n + eps));
    for (int i = 0; i < n; i += LANES) {
        __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), inverse);
        _mm512_storeu_ps(x + i, _mm512_fmadd_ps(d, _mm512_loadu_ps(weights + i), _mm512_loadu_ps(weights + n + i)));
    }
}

static void look_up(const Runner *e, int first, int last) {
    const Model *m = e->model;
    for (int text = 0; text < e->num_texts; text++) {
        int start = e->starts[text], end = e->starts[text + 1] < last ? e->starts[text + 1] : last;
        for (int row = start > first ? start : first; row < end; row++) {
            const int8_t *word = m->words + (size_t)e->ids[row] * m->hidden;
            const float *position = m->position + (size_t)(row - start) * m->hidden;
            float *x = e->x + (size_t)row * m->hidden;
            __m512 scale = splat(m->word_scales[e->ids[row]]);
            for (int i = 0; i < m->hidden; i += LANES) {
                __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(word + i))));
                _mm512_storeu_ps(x + i, _mm512_fmadd_ps(v, scale, _mm512_loadu_ps(position + i)));
            }
        }
    }
}

static void pool(const Runner *e, int text) {
    const Model *m = e->model;
    int first = e->starts[text], last = e->starts[text + 1];
    if (m->pooling == FIRST) last = first + 1;
    if (m->pooling == LAST) first = last - 1;
    float *out = e->out + (size_t)text * m->hidden;
    __m512 squares = _mm512_setzero_ps(), share = splat(1.0f / (last - first));
    for (int i = 0; i < m->hidden; i += LANES) {
        __m512 v = _mm512_setzero_ps();
        for (int row = first; row < last; row++)
            v = _mm512_add_ps(v, _mm512_loadu_ps(e->x + (size_t)row * m->hidden + i));
        v = _mm512_mul_ps(v, share);
        squares = _mm512_fmadd_ps(v, v, squares);
        _mm512_storeu_ps(out + i, v);
    }
    if (!m->normalize) return;
    __m512 inverse = splat(1.0f / fmaxf(sqrtf(_mm512_reduce_add_ps(squares)), 1e-12f));
    for (int i = 0; i < m->hidden; i += LANES)
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(out + i), inverse));
}

/* Norm rows, and quantise them for the product that comes next, if one does. */
static void settle(const Runner *e, int first, int last, const float *norm, const Linear *next) {
    int hidden = e->model->hidden;
    for (int row = first; row < last; row++) {
        float *x = e->x + (size_t)row * hidden;
        layer_norm(x, hidden, norm, e->model->eps);
        if (next) quantise(x, next, &e->narrow, row);
    }
}

static void run_layer(Runner *e, int t, const Layer *l, const Layer *next, int first, int last) {
    const Model *m = e->model;
    int hidden = m->hidden, d = hidden / m->heads, num_heads = e->num_texts * m->heads;
    if (t == 0) atomic_store_explicit(&e->next_head, 0, memory_order_relaxed);
    product(e, t, PLAIN, &l->qkv, &e->narrow, e->qkv);
    barrier(e);
    for (int u; (u = atomic_fetch_add_explicit(&e->next_head, 1, memory_order_relaxed)) < num_heads;) {
        int text = u / m->heads, head = u % m->heads, start = e->starts[text], len = e->starts[text + 1] - start;
        attend(e->qkv + (size_t)start * 3 * hidden + head * d, hidden, d, len,
               e->context + (size_t)start * hidden + head * d, e->scratch + t * e->scratch_size);
    }
    barrier(e);
    for (int row = first; row < last; row++) quantise(e->context + (size_t)row * hidden, &l->out, &e->narrow, row);
    barrier(e);
    product(e, t, RESIDUAL, &l->out, &e->narrow, e->x);
    barrier(e);
    settle(e, first, last, l->norm1, &l->up);
    barrier(e);
    product(e, t, GELU, &l->up, &e->narrow, e->inner);
    barrier(e);
    for (int row = first; row < last; row++) quantise(e->inner + (size_t)row * m->ffn, &l->down, &e->wide, row);
    barrier(e);
    product(e, t, RESIDUAL, &l->down, &e->wide, e->x);
    barrier(e);
    settle(e, first, last, l->norm2, next ? &next->qkv : NULL);
    barrier(e);
}

static void run_share(Runner *e, int t) {
    int first = share(e->num_tokens, t, e->num_threads), last = share(e->num_tokens, t + 1, e->num_threads);
    const Layer *layer = e->model->layers, *end = layer + e->model->num_layers;
    look_up(e, first, last);
    settle(e, first, last, e->model->norm, &layer->qkv);
    barrier(e);
    for (; layer < end; layer++) run_layer(e, t, layer, layer + 1 < end ? layer + 1 : NULL, first, last);
    for (int text = share(e->num_texts, t, e->num_threads); text < share(e->num_texts, t + 1, e->num_threads); text++)
        pool(e, text);
    barrier(e);
}

static void *serve(void *argument) {
    Place place = *(Place *)argument;
    Runner *e = place.runner;
    free(argument);
    for (int seen = 0;;) {
        for (int spins = 0; atomic_load_explicit(&e->job, memory_order_acquire) == seen; spins++)
            if (spins < IDLE_SPINS) _mm_pause();
            else syscall(SYS_futex, &e->job, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        seen = atomic_load_explicit(&e->job, memory_order_acquire);
        if (atomic_load(&e->is_stopping)) return NULL;
        run_share(e, place.thread);
    }
}

static void wake(Runner *e) {
    atomic_fetch_add_explicit(&e->job, 1, memory_order_release);
    syscall(SYS_futex, &e->job, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

/* Whether this processor has the instructions; compiled for any. */
__attribute__((target("no-avx"))) int encoder_is_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

void encoder_close(Runner *e) {
    atomic_store(&e->is_stopping, 1);
    wake(e);
    for (int t = 1; t < e->num_threads; t++) pthread_join(e->threads[t], NULL);
    free(e->x);
    free(e);
}

/* Space for runs of `max_tokens` on `num_threads` (at most 64), in one piece; NULL where there is no memory. */
Runner *encoder_open(const Model *m, int max_tokens, int num_threads) {
    Runner *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    size_t tokens = (size_t)max_tokens, hidden = (size_t)m->hidden, ffn = (size_t)m->ffn;
    e->model = m, e->num_threads = 1;
    e->scratch_size = attend_scratch(m->positions, m->hidden / m->heads);
    size_t numbers = tokens * (5 * hidden + ffn + 4) + e->scratch_size * num_threads;
    if (posix_memalign((void **)&e->x, 64, 4 * numbers + tokens * (hidden + ffn))) { free(e); return NULL; }
    e->qkv = e->x + tokens * hidden, e->context = e->qkv + tokens * 3 * hidden, e->inner = e->context + tokens * hidden;
    e->scratch = (int32_t *)(e->inner + tokens * ffn);
    e->narrow.scale = (float *)(e->scratch + e->scratch_size * num_threads), e->narrow.low = e->narrow.scale + tokens;
    e->wide.scale = e->narrow.low + tokens, e->wide.low = e->wide.scale + tokens;
    e->narrow.q = (uint8_t *)(e->wide.low + tokens), e->wide.q = e->narrow.q + tokens * hidden;
    for (; e->num_threads < num_threads; e->num_threads++) {
        Place *place = malloc(sizeof *place);
        if (place) *place = (Place){e, e->num_threads};
        if (!place || pthread_create(&e->threads[e->num_threads], NULL, serve, place)) {
            free(place);
            encoder_close(e);
            return NULL;
        }
    }
    return e;
}

/* `starts` has num_texts + 1 entries, ascending from 0; vectors are float32 [num_texts, hidden]. One run at a time. */
void encoder_run(Runner *e, const int32_t *ids, const int32_t *starts, int num_texts, float *out) {
    e->ids = ids, e->starts = starts, e->num_texts = num_texts, e->num_tokens = starts[num_texts], e->out = out;
    if (e->num_threads > 1) wake(e);
    run_share(e, 0);
}
