// y = activation(x W^T + bias + residual) in float32 on AVX2 or AVX-512.
//
// W is packed by native.pack: cut into parts of DEPTH columns, and each part into panels of PANEL rows that stand side by
// side. A tile of ROWS x PANEL sums stays in registers while a panel of the part is read from the first cache and rows of
// x from the second (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008).

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
#define DEPTH (6144 / PANEL) // 24 KB of a panel, which the first cache holds beside a tile's rows of x
#define AHEAD (16 * PANEL)   // of the weights that are fetched while these are multiplied
#define MOST_ROWS 256        // of x: DEPTH of each stay in the second cache while the panels pass
#define PIECES 6 // of the work for each thread: one that the system takes a processor from gets fewer
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

// y[row : row + rows, column : column + PANEL] from `depth` columns of x on; what earlier ones gave is added to.
static inline __attribute__((always_inline)) void tile(
    const linear *l, int rows, int64_t row, int64_t column, int64_t from, int64_t depth, const float *weights) {
    const float *x = l->x + row * l->k + from;
    vector sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vector){0};
    for (int64_t j = 0; j < depth; j++, weights += PANEL) {
        vector left = *(const vector *)weights, right = *(const vector *)(weights + LANES);
        for (int i = 0; i < PANEL; i += 16) __builtin_prefetch(weights + AHEAD + i);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = x[i * l->k + j];
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

// The rows from `begin` to `end` by one panel.
static void by_panel(
    const linear *l, int64_t begin, int64_t end, int64_t column, int64_t from, int64_t depth, const float *weights) {
    int64_t row = begin;
    for (int64_t left = (end - begin + ROWS - 1) / ROWS; left > 0; left--) {
        int64_t rows = (end - row + left - 1) / left; // as even as it goes: few rows read the panel as slowly as many
        switch (rows) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        if (count <= ROWS) tile(l, count, row, column, from, depth, weights);                                          \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
        row += rows;
    }
}

// The same by the panels from `first` to `last`, and what follows the sums.
static void by_panels(const linear *l, int64_t begin, int64_t end, int64_t first, int64_t last) {
    int64_t panels = (l->n + PANEL - 1) / PANEL;
    for (int64_t from = 0; from < l->k; from += DEPTH) {
        int64_t depth = l->k - from < DEPTH ? l->k - from : DEPTH;
        const float *part = l->packed + from * panels * PANEL;
        for (int64_t panel = first; panel < last; panel++) {
            int64_t column = panel * PANEL, count = l->n - column < PANEL ? l->n - column : PANEL;
            by_panel(l, begin, end, column, from, depth, part + panel * depth * PANEL);
            if (l->activation == NONE || from + depth < l->k) continue;
            for (int64_t row = begin; row < end; row++) activate(l->y + row * l->n + column, count, l->activation);
        }
    }
}

// x [m, k], bias [n] or NULL, residual [m, n] or NULL, y [m, n]
void fxbt_linear(
    const float *x, const float *packed, const float *bias, const float *residual, float *y, int64_t m, int64_t n,
    int64_t k, int activation, int threads) {
    linear l = {x, packed, bias, residual, y, m, n, k, activation};
    int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + MOST_ROWS - 1) / MOST_ROWS;
    while (panels * blocks < 2 * threads && m > 2 * ROWS * blocks) blocks++; // something for every thread
    threads = m * n * k > WORTH_THREADS ? threads : 1;
    int64_t pieces = PIECES * threads / blocks + 1, most = panels < pieces ? panels : pieces; // of each block of rows
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks * most; i++) {
        int64_t block = i / most, piece = i % most;
        by_panels(
            &l, m * block / blocks, m * (block + 1) / blocks, panels * piece / most, panels * (piece + 1) / most);
    }
}

int fxbt_panel(void) { return PANEL; }
int fxbt_depth(void) { return DEPTH; }
