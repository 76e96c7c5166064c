// Linears and attention in float32 on AVX2 or AVX-512 (native.py calls them).
//
// Both multiply tiles of ROWS x PANEL sums, which stay in registers while a panel of the second factor is read from the
// first cache (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008).

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
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

// to[rows, PANEL] = x[rows, depth] panel[depth, PANEL], where rows stand `stride` and `width` apart.
static inline __attribute__((always_inline)) void tile(
    int rows, float *to, int64_t width, const float *x, int64_t stride, int64_t depth, const float *panel) {
    vector sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vector){0};
    for (int64_t j = 0; j < depth; j++, panel += PANEL) {
        vector left = *(const vector *)panel, right = *(const vector *)(panel + LANES);
        for (int i = 0; i < PANEL; i += 16) __builtin_prefetch(panel + AHEAD + i);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = x[i * stride + j];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        *(anywhere *)(to + i * width) = sums[i][0];
        *(anywhere *)(to + i * width + LANES) = sums[i][1];
    }
}

// The same for a number of rows up to ROWS that the compiler does not know.
static void multiply(
    int64_t rows, float *to, int64_t width, const float *x, int64_t stride, int64_t depth, const float *panel) {
    switch (rows) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        if (count <= ROWS) tile(count, to, width, x, stride, depth, panel);                                            \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
}

// Of `left` rows, those of the next tile: as even as it goes, as few rows read a panel as slowly as many.
static inline int64_t next_rows(int64_t left) {
    int64_t tiles = (left + ROWS - 1) / ROWS;
    return (left + tiles - 1) / tiles;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- linears ---------------------------------------------------------------------------------------------------------
//
// y = activation(x W^T + bias + residual). W is packed by native.pack: cut into parts of DEPTH columns, and each part into
// panels of PANEL rows that stand side by side.

typedef struct { // native.LINEAR
    const float *x, *packed, *bias, *residual; // [m, k], W, [n] or NULL, [m, n] or NULL
    float *y;                                  // [m, n]
    int64_t m, n, k;
    int32_t activation, threads;
} linear;

// Adds sums to y[row : row + rows, column : column + PANEL]: to bias and residual first, then to what is there.
static void add(const linear *l, const float *sums, int64_t rows, int64_t row, int64_t column, int is_first) {
    for (int64_t i = 0; i < rows * 2; i++) {
        int64_t start = column + i % 2 * LANES, count = l->n - start, at = (row + i / 2) * l->n + start;
        vector sum = *(const vector *)(sums + i * LANES);
        if (!is_first) sum += load(l->y + at, count);
        if (is_first && l->bias) sum += load(l->bias + start, count);
        if (is_first && l->residual) sum += load(l->residual + at, count);
        store(l->y + at, sum, count);
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

// The rows from `begin` to `end` by the panels from `first` to `last`, and what follows the sums.
static void by_panels(const linear *l, int64_t begin, int64_t end, int64_t first, int64_t last) {
    int64_t panels = (l->n + PANEL - 1) / PANEL;
    for (int64_t from = 0; from < l->k; from += DEPTH) {
        int64_t depth = least(l->k - from, DEPTH);
        const float *part = l->packed + from * panels * PANEL;
        for (int64_t panel = first; panel < last; panel++) {
            int64_t column = panel * PANEL;
            const float *weights = part + panel * depth * PANEL;
            for (int64_t row = begin, rows; row < end; row += rows) {
                float sums[ROWS * PANEL] __attribute__((aligned(64)));
                rows = next_rows(end - row);
                multiply(rows, sums, PANEL, l->x + row * l->k + from, l->k, depth, weights);
                add(l, sums, rows, row, column, from == 0);
            }
            if (l->activation == NONE || from + depth < l->k) continue;
            for (int64_t row = begin; row < end; row++)
                activate(l->y + row * l->n + column, least(l->n - column, PANEL), l->activation);
        }
    }
}

void fxbt_linear(const linear *l) {
    if (l->m == 0) return;
    int64_t panels = (l->n + PANEL - 1) / PANEL, blocks = (l->m + MOST_ROWS - 1) / MOST_ROWS;
    while (panels * blocks < 2 * l->threads && l->m > 2 * ROWS * blocks) blocks++; // something for every thread
    int threads = l->m * l->n * l->k > WORTH_THREADS ? l->threads : 1;
    int64_t pieces = least(panels, PIECES * threads / blocks + 1); // of each block of rows
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < blocks * pieces; i++) {
        int64_t block = i / pieces, piece = i % pieces, begin = l->m * block / blocks, end = l->m * (block + 1) / blocks;
        by_panels(l, begin, end, panels * piece / pieces, panels * (piece + 1) / pieces);
    }
}

// --- attention -------------------------------------------------------------------------------------------------------
//
// softmax(scale Q K^T + bias) V: scores of a tile of queries by all keys stand in a cache, keys and values are copied into
// panels for each head.

typedef struct {
    int64_t sequence, head, token; // floats from one to the next
} strides;

typedef struct { // native.ATTENTION
    const float *query, *key, *value, *bias; // no bias: NULL
    float *output;
    const int32_t *bounds; // [sequences + 1] or NULL
    strides of_query, of_key, of_value, of_output, of_bias;
    int64_t bias_key; // 1, or 0 if a query adds the same to all keys
    int64_t sequences, heads, heads_per_key, queries, keys, head_dim, value_dim;
    float scale;
    int32_t is_causal, threads;
} attention;

static inline int64_t at(strides of, int64_t sequence, int64_t head, int64_t token) {
    return sequence * of.sequence + head * of.head + token * of.token;
}

// One head of one sequence, from where its tensors begin, and its keys and values as panels.
typedef struct {
    const float *query, *bias;
    float *output, *keys_packed, *values_packed, *scores;
    int64_t keys, width; // of a row of scores
} head;

static int64_t up_to_panels(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

// to[panel, depth, PANEL] = from[token = panel, depth], with zeros behind the last token
static void pack_keys(float *to, const float *from, int64_t token, int64_t tokens, int64_t depth) {
    for (int64_t panel = 0; panel < tokens; panel += PANEL, to += depth * PANEL) {
        int64_t count = least(PANEL, tokens - panel);
        for (int64_t j = 0; j < depth; j++) {
            for (int64_t i = 0; i < count; i++) to[j * PANEL + i] = from[(panel + i) * token + j];
            for (int64_t i = count; i < PANEL; i++) to[j * PANEL + i] = 0;
        }
    }
}

// to[panel, token, PANEL] = from[token, dim = panel], with zeros behind the last dim
static void pack_values(float *to, const float *from, int64_t token, int64_t tokens, int64_t dims) {
    for (int64_t panel = 0; panel < dims; panel += PANEL) {
        int64_t count = dims - panel;
        for (int64_t i = 0; i < tokens; i++, to += PANEL) {
            const float *row = from + i * token + panel;
            *(vector *)to = load(row, count);
            *(vector *)(to + LANES) = load(row + LANES, count - LANES);
        }
    }
}

// Makes scores of products in place, then exp(score - largest); returns 1 / their sum, 0 where all are blocked.
static float soften(float *scores, int64_t keys, float scale, const float *bias, int64_t bias_key) {
    float largest = -INFINITY, sum = 0;
    if (bias && bias_key) {
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) scores[j] = scores[j] * scale + bias[j];
    } else {
        float same = bias ? *bias : 0;
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) scores[j] = scores[j] * scale + same;
    }
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < keys; j++) largest = scores[j] > largest ? scores[j] : largest;
    if (largest == -INFINITY) largest = 0; // exp(-inf) is 0, and NaN stays NaN
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < keys; j++) {
        scores[j] = expf(scores[j] - largest);
        sum += scores[j];
    }
    return sum == 0 ? 0 : 1 / sum;
}

static void attend_tile(const attention *a, const head *h, int64_t row, int64_t rows) {
    float inverse[ROWS], sums[ROWS * PANEL] __attribute__((aligned(64)));
    const float *query = h->query + row * a->of_query.token;
    int64_t seen = a->is_causal ? least(h->keys, row + rows) : h->keys;
    for (int64_t key = 0; key < seen; key += PANEL)
        multiply(
            rows, h->scores + key, h->width, query, a->of_query.token, a->head_dim, h->keys_packed + key * a->head_dim);
    for (int64_t i = 0; i < rows; i++) {
        int64_t keys = a->is_causal ? least(seen, row + i + 1) : seen;
        float *scores = h->scores + i * h->width;
        const float *bias = h->bias ? h->bias + (row + i) * a->of_bias.token : NULL;
        inverse[i] = soften(scores, keys, a->scale, bias, a->bias_key);
        for (int64_t j = keys; j < seen; j++) scores[j] = 0;
    }
    for (int64_t dim = 0; dim < a->value_dim; dim += PANEL) {
        multiply(rows, sums, PANEL, h->scores, h->width, seen, h->values_packed + dim * h->keys);
        for (int64_t i = 0; i < rows * 2; i++) {
            int64_t start = dim + i % 2 * LANES;
            float *output = h->output + (row + i / 2) * a->of_output.token + start;
            store(output, inverse[i / 2] * *(vector *)(sums + i * LANES), a->value_dim - start);
        }
    }
}

// Queries from `begin` to `end` of one head of a sequence that begins at token `first`.
static void attend(
    const attention *a, int64_t sequence, int64_t first, int64_t keys, int64_t index, int64_t begin, int64_t end,
    float *space) {
    int64_t key_head = index / a->heads_per_key, width = up_to_panels(keys);
    head h = {
        .query = a->query + at(a->of_query, sequence, index, first),
        .bias = a->bias ? a->bias + at(a->of_bias, sequence, index, first) : NULL,
        .output = a->output + at(a->of_output, sequence, index, first),
        .keys_packed = space,
        .values_packed = space + width * a->head_dim,
        .scores = space + width * a->head_dim + keys * up_to_panels(a->value_dim),
        .keys = keys,
        .width = width,
    };
    const float *key = a->key + at(a->of_key, sequence, key_head, first);
    const float *value = a->value + at(a->of_value, sequence, key_head, first);
    pack_keys(h.keys_packed, key, a->of_key.token, keys, a->head_dim);
    pack_values(h.values_packed, value, a->of_value.token, keys, a->value_dim);
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = next_rows(end - row);
        attend_tile(a, &h, row, rows);
    }
}

// Sequences of so many queries and keys, or, with bounds, sequences that stand side by side: tokens from each bound to the
// next attend to each other; strides from one sequence to the next are 0, and no sequence is longer than `queries`.
// Returns whether there was memory for it.
int fxbt_attention(const attention *a) {
    int64_t all = a->sequences * a->heads, pieces = 1, failed = 0;
    while (all * pieces < 2 * a->threads && a->queries > 4 * ROWS * pieces) pieces++;
    int64_t space = up_to_panels(a->keys) * (a->head_dim + up_to_panels(a->value_dim) + ROWS);
    int threads = all * a->queries * a->keys * a->head_dim > WORTH_THREADS ? a->threads : 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = aligned_alloc(64, (space / 16 + 1) * 64);
#pragma omp for schedule(dynamic) reduction(+ : failed)
        for (int64_t i = all * pieces - 1; i >= 0; i--) { // packed sequences stand shortest first, and long ones go first
            int64_t piece = i % pieces, index = i / pieces % a->heads, sequence = i / pieces / a->heads;
            int64_t first = a->bounds ? a->bounds[sequence] : 0;
            int64_t queries = a->bounds ? a->bounds[sequence + 1] - first : a->queries;
            int64_t begin = queries * piece / pieces, end = queries * (piece + 1) / pieces;
            failed += own == NULL;
            if (own) attend(a, sequence, first, a->bounds ? queries : a->keys, index, begin, end, own);
        }
        free(own);
    }
    return !failed;
}

int fxbt_panel(void) { return PANEL; }
int fxbt_depth(void) { return DEPTH; }
