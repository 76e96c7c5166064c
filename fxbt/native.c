// y = activation(x W^T + bias + residual) in float32 on AVX2 or AVX-512, W packed by native.pack into panels of PANEL rows.
//
// Each thread takes whole panels, so that it reads its part of the weights once; a tile of ROWS x PANEL sums stays in
// registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008).

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12 // 24 sums, 2 parts of the panel and a factor: 27 of 32 registers
#else
#define LANES 8
#define ROWS 6 // 12 + 2 + 1 of 16
#endif
#define PANEL (2 * LANES)
#define DEPTH (6144 / PANEL) // of a panel at a time: 24 KB, which the first cache holds beside the rows of x
#define AHEAD (16 * PANEL)   // of the panel that is fetched while earlier ones are multiplied
#define MOST_ROWS 512        // of x that the second cache holds while the panels pass
#define WORTH_THREADS 65536  // products: below, waking other threads takes longer

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

// As glibc has them for vectors, to 4 ulp (libmvec).
__attribute__((simd("notinbranch"))) float erff(float);
__attribute__((simd("notinbranch"))) float tanhf(float);
__attribute__((simd("notinbranch"))) float expf(float);

enum { NONE, RELU, GELU, GELU_TANH, SILU }; // native.ACTIVATIONS

static inline vector load(const float *from, int64_t count) {
    if (count >= LANES) return *(const anywhere *)from;
    vector value = {0};
    if (count > 0) memcpy(&value, from, count * sizeof(float));
    return value;
}

static inline void store(float *to, vector value, int64_t count) {
    if (count >= LANES) *(anywhere *)to = value;
    else if (count > 0) memcpy(to, &value, count * sizeof(float));
}

typedef struct {
    const float *x, *packed, *bias, *residual;
    float *y;
    int64_t m, n, k;
    int activation;
} linear;

// y[row : row + rows, column : column + PANEL] over depth [from, to); what is there already is added to.
static inline __attribute__((always_inline)) void tile(
    const linear *l, int rows, int64_t row, int64_t column, int64_t from, int64_t to) {
    const float *x = l->x + row * l->k, *panel = l->packed + column * l->k;
    vector sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vector){0};
    for (int64_t depth = from; depth < to; depth++) {
        const float *weights = panel + depth * PANEL;
        vector left = *(const vector *)weights, right = *(const vector *)(weights + LANES);
        for (int i = 0; i < PANEL; i += 16) __builtin_prefetch(weights + AHEAD + i);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = x[i * l->k + depth];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        for (int half = 0; half < 2; half++) {
            int64_t start = column + half * LANES, count = l->n - start, at = (row + i) * l->n + start;
            vector sum = sums[i][half];
            if (from) sum += load(l->y + at, count);
            if (!from && l->bias) sum += load(l->bias + start, count);
            if (!from && l->residual) sum += load(l->residual + at, count);
            store(l->y + at, sum, count);
        }
    }
}

static void activate(float *y, int64_t count, int activation) {
    const float sqrt_half = 0.70710678f, sqrt_2_over_pi = 0.79788456f;
    switch (activation) {
    case RELU:
        for (int64_t i = 0; i < count; i++) y[i] = y[i] < 0 ? 0 : y[i]; // NaN stays
        break;
    case GELU:
#pragma omp simd
        for (int64_t i = 0; i < count; i++) y[i] = 0.5f * y[i] * (1 + erff(y[i] * sqrt_half));
        break;
    case GELU_TANH:
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            y[i] = 0.5f * y[i] * (1 + tanhf(sqrt_2_over_pi * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
        break;
    case SILU:
#pragma omp simd
        for (int64_t i = 0; i < count; i++) y[i] = y[i] / (1 + expf(-y[i]));
        break;
    }
}

// y[begin : end, column : column + PANEL]
static void block(const linear *l, int64_t begin, int64_t end, int64_t column) {
    int64_t tiles = (end - begin + ROWS - 1) / ROWS;
    for (int64_t from = 0; from < l->k; from += DEPTH) {
        int64_t to = from + DEPTH < l->k ? from + DEPTH : l->k;
        int64_t row = begin;
        for (int64_t left = tiles; left > 0; left--) {
            int64_t rows = (end - row + left - 1) / left; // as even as it goes: few rows read the panel as slowly as many
            switch (rows) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        if (count <= ROWS) tile(l, count, row, column, from, to);                                                      \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
            row += rows;
        }
    }
    if (l->activation == NONE) return;
    int64_t count = l->n - column < PANEL ? l->n - column : PANEL;
    for (int64_t row = begin; row < end; row++) activate(l->y + row * l->n + column, count, l->activation);
}

// x [m, k], packed [panels, k, PANEL], bias [n] or NULL, residual [m, n] or NULL, y [m, n]
void fxbt_linear(
    const float *x, const float *packed, const float *bias, const float *residual, float *y, int64_t m, int64_t n,
    int64_t k, int activation, int threads) {
    linear l = {x, packed, bias, residual, y, m, n, k, activation};
    int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + MOST_ROWS - 1) / MOST_ROWS;
    while (panels * blocks < 2 * threads && m > 2 * ROWS * blocks) blocks++; // enough for every thread
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n * k > WORTH_THREADS)
    for (int64_t i = 0; i < panels * blocks; i++)
        block(&l, m * (i / panels) / blocks, m * (i / panels + 1) / blocks, i % panels * PANEL);
}

int fxbt_panel(void) { return PANEL; }
