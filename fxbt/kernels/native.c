// Linears and attention in float32 on AVX2 or AVX-512 (native.py calls them).
//
// Both multiply tiles of ROWS x PANEL sums, which stay in registers while a panel of the second factor passes (Goto and
// van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008).

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
#define DEPTH (24576 / PANEL) // 96 KB of a panel, from the second cache: the first one's 24 write the sums 4 times
#define GROUP (2 * DEPTH)     // of several panels: 192 KB that stay in the second cache while the rows of x pass
#define LONGEST_SUM 192       // products that are added one by one, each rounding: so torch's are, and as exact
#define AHEAD (32 * PANEL)    // of a panel, that are fetched while these are multiplied
#define FEW_TILES 8           // where no more share a panel, it is waited for: the next one is fetched meanwhile
#define MOST_TILES 22         // 128 rows on AVX2, whose x, DEPTH wide, is found in the second cache by the next group
#define PIECES 6              // of the work for each thread: one that the system takes a processor from gets fewer
#define WORTH_THREADS 65536   // products: below, waking other threads takes longer

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES))); // of a comparison: -1 where it holds, else 0

static inline vector all(float value) { return (vector){0} + value; }

static inline vector either(integers where, vector yes, vector no) {
    return (vector)((where & (integers)yes) | (~where & (integers)no));
}

// e^x for x <= 0 to 2 ulp, 0 where it is no normal number: 2^times e^r, as x = times ln 2 + r.
static inline vector exponential(vector x) {
    const float to_whole = 12582912; // 1.5 * 2^23: its sum with a number keeps no digits behind the point
    vector shifted = x * 1.44269504f + to_whole, times = shifted - to_whole;
    vector r = x - times * 0.693359375f + times * 2.12194440e-4f;
    vector q = r * 1.3814465e-3f + 8.3687808e-3f; // (e^r - 1 - r) / r^2 to 3e-9, up to ln(2) / 2
    q = q * r + 4.16683943e-2f;
    q = q * r + 0.166665201f;
    q = q * r + 0.499999934f;
    vector power = (vector)(((integers)shifted << 23) + (127 << 23));
    return either(x < -87.3f, all(0), (q * r * r + r + 1) * power);
}

static inline vector sigmoid(vector x) {
    vector e = exponential(either(x < 0, x, -x));
    return either(x < 0, e, all(1)) / (1 + e);
}

// erf(x) to 4e-7: x times a quotient of polynomials of x^2, fitted to 2e-8.
static inline vector error_function(vector x) {
    vector z = x * x, above = z * 2.05008496e-6f + 2.84883776e-4f, below = z * 3.80917481e-5f + 1.16254436e-3f;
    above = above * z + 3.76565126e-3f, below = below * z + 1.49692846e-2f;
    above = above * z + 5.27488291e-2f, below = below * z + 0.114109434f;
    above = above * z + 0.190407231f, below = below * z + 0.502076745f;
    above = above * z + 1.12837911f, below = below * z + 1;
    vector inside = either(x < -3.92f, all(-1), x * above / below); // out there, off by less than 3e-8
    return either(x > 3.92f, all(1), inside);
}

enum { NONE, RELU, GELU, GELU_TANH, SILU }; // native.ACTIVATIONS

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

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

// to[rows, PANEL] = x[rows, depth] panel[depth, PANEL], or += where it adds; rows stand `stride` and `width` apart.
// Meanwhile `next` is fetched, `step` for each row of the panel; where it is NULL, more of the panel.
static inline __attribute__((always_inline)) void tile(
    int rows, int adds, float *to, int64_t width, const float *x, int64_t stride, int64_t depth, const float *panel,
    const float *next, int64_t step) {
    vector sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vector){0};
    for (int64_t j = 0; j < depth; j++, panel += PANEL) {
        vector left = *(const vector *)panel, right = *(const vector *)(panel + LANES);
        for (int i = 0; i < PANEL; i += 16) __builtin_prefetch((next ? next + j * step : panel + AHEAD) + i);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = x[i * stride + j];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        anywhere *left = (anywhere *)(to + i * width), *right = (anywhere *)(to + i * width + LANES);
        *left = adds ? *left + sums[i][0] : sums[i][0];
        *right = adds ? *right + sums[i][1] : sums[i][1];
    }
}

// The same for a number of rows up to ROWS that the compiler does not know, and any depth.
static void multiply(
    int64_t rows, float *to, int64_t width, const float *x, int64_t stride, int64_t depth, const float *panel,
    const float *next, int64_t step) {
    for (int64_t from = 0, count; from < depth; from += count, x += count, panel += count * PANEL) {
        count = least(depth - from, LONGEST_SUM);
        switch (next ? rows + ROWS : rows) {
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        if (rows <= ROWS) tile(rows, from > 0, to, width, x, stride, count, panel, NULL, 0);                           \
        break;                                                                                                         \
    case rows + ROWS:                                                                                                  \
        if (rows <= ROWS) tile(rows, from > 0, to, width, x, stride, count, panel, next + from * step, step);          \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
    }
}

// Of `left` rows, those of the next tile: as even as it goes, as few rows read a panel as slowly as many.
static inline int64_t next_rows(int64_t left) {
    return parts(left, parts(left, ROWS));
}

// --- linears ---------------------------------------------------------------------------------------------------------
//
// y = activation(x W^T + bias + residual), normed = layer_norm(y). W is packed by native.pack: cut into parts of DEPTH
// columns, and each part into panels of PANEL rows that stand side by side.

typedef struct { // native.LINEAR
    const float *x, *packed, *bias, *residual; // [m, k], W, [n] or NULL, [m, n] or NULL
    float *y;                                  // [m, n]
    const float *gamma, *beta;                 // [n] or NULL
    float *normed;                             // [m, n], y itself or another; no layer norm: NULL
    int64_t m, n, k;
    float epsilon;
    int32_t activation, threads;
} linear;

static inline vector activated(vector x, int activation) {
    const float sqrt_half = 0.70710678f, twice_sqrt_2_over_pi = 1.59576912f;
    switch (activation) {
    case RELU:
        return either(x < 0, all(0), x); // NaN stays
    case GELU:
        return 0.5f * x * (1 + error_function(x * sqrt_half));
    case GELU_TANH: // (1 + tanh(u)) / 2 = sigmoid(2u)
        return x * sigmoid(twice_sqrt_2_over_pi * (x + 0.044715f * x * x * x));
    case SILU:
        return x * sigmoid(x);
    }
    return x;
}

// Writes sums to y[row : row + rows, column : column + PANEL]: the first with bias and residual, others added to what
// is there, the last activated.
static inline __attribute__((always_inline)) void write_activated(
    const linear *l, const float *sums, int64_t rows, int64_t row, int64_t column, int is_first, int activation) {
    for (int64_t i = 0; i < rows * 2; i++) {
        int64_t start = column + i % 2 * LANES, count = l->n - start, at = (row + i / 2) * l->n + start;
        vector sum = *(vector *)(sums + i * LANES);
        if (!is_first) sum += load(l->y + at, count);
        if (is_first && l->bias) sum += load(l->bias + start, count);
        if (is_first && l->residual) sum += load(l->residual + at, count);
        store(l->y + at, activated(sum, activation), count);
    }
}

// A loop for each activation: asking for it at every vector would cost.
static void write(
    const linear *l, const float *sums, int64_t rows, int64_t row, int64_t column, int is_first, int is_last) {
    switch (is_last ? l->activation : NONE) {
#define ACTIVATION(name)                                                                                               \
    case name:                                                                                                         \
        write_activated(l, sums, rows, row, column, is_first, name);                                                   \
        break;
        ACTIVATION(NONE) ACTIVATION(RELU) ACTIVATION(GELU) ACTIVATION(GELU_TANH) ACTIVATION(SILU)
    }
}

// The rows from `begin` to `end`, `depth` columns of x after `from`, by the panels from `first` to `last`: a tile meets
// all of them while the first cache holds its part of x.
static void by_tiles(
    const linear *l, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t from, int64_t depth) {
    int64_t tiles = parts(end - begin, ROWS), step = parts(PANEL, tiles), size = depth * PANEL;
    const float *part = l->packed + from * parts(l->n, PANEL) * PANEL;
    const float *next = tiles <= FEW_TILES ? part + last * size : NULL;
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = next_rows(end - row);
        for (int64_t panel = first; panel < last; panel++) {
            float sums[ROWS * PANEL] __attribute__((aligned(64)));
            multiply(rows, sums, PANEL, l->x + row * l->k + from, l->k, depth, part + panel * size, next, step);
            write(l, sums, rows, row, panel * PANEL, from == 0, from + depth == l->k);
        }
        if (next) next += step * depth;
    }
}

// The rows from `begin` to `end` by the panels from `first` to `last`.
static void by_panels(const linear *l, int64_t begin, int64_t end, int64_t first, int64_t last) {
    int64_t are_few = parts(end - begin, ROWS) <= FEW_TILES;
    for (int64_t from = 0; from < l->k; from += DEPTH) {
        int64_t depth = least(l->k - from, DEPTH), group = are_few ? 1 : GROUP / depth;
        for (int64_t panel = first; panel < last; panel += group)
            by_tiles(l, begin, end, panel, least(panel + group, last), from, depth);
    }
}

static void normalize(const linear *l, int64_t row) {
    const float *y = l->y + row * l->n;
    float *normed = l->normed + row * l->n, mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < l->n; i++) mean += y[i];
    mean /= l->n;
#pragma omp simd reduction(+ : variance)
    for (int64_t i = 0; i < l->n; i++) variance += (y[i] - mean) * (y[i] - mean);
    float inverse = 1 / sqrtf(variance / l->n + l->epsilon);
#pragma omp simd
    for (int64_t i = 0; i < l->n; i++)
        normed[i] = (y[i] - mean) * inverse * (l->gamma ? l->gamma[i] : 1) + (l->beta ? l->beta[i] : 0);
}

void fxbt_linear(const linear *l) {
    if (l->m == 0) return;
    int64_t panels = parts(l->n, PANEL), tiles = parts(l->m, ROWS), blocks = parts(tiles, MOST_TILES);
    while (panels * blocks < 2 * l->threads && tiles > 2 * blocks) blocks++; // something for every thread
    int threads = l->m * l->n * l->k > WORTH_THREADS ? l->threads : 1;
    int64_t pieces = least(panels, parts(PIECES * threads, blocks)); // of each block of rows
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks * pieces; i++) {
            int64_t block = i / pieces, piece = i % pieces;
            int64_t begin = tiles * block / blocks * ROWS, end = tiles * (block + 1) / blocks * ROWS;
            by_panels(l, begin, least(end, l->m), panels * piece / pieces, panels * (piece + 1) / pieces);
        }
        if (l->normed) {
#pragma omp for schedule(dynamic, ROWS)
            for (int64_t row = 0; row < l->m; row++) normalize(l, row);
        }
    }
}

// --- attention -------------------------------------------------------------------------------------------------------
//
// softmax(scale Q K^T + bias) V: scores of a tile of queries by all keys stand in a cache, keys and values are copied
// into panels for each head.

typedef struct {
    int64_t sequence, head, token; // floats from one to the next
} strides;

typedef struct { // native.ATTENTION
    const float *query, *key, *value;
    float *output;
    const float *bias;     // or NULL
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

static int64_t up_to_panels(int64_t count) { return parts(count, PANEL) * PANEL; }

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

// Makes scores of products in place, then exp(score - largest), 0 behind the last key up to `width`, a multiple of
// LANES; returns 1 / their sum, 0 where all are blocked.
static float soften(float *scores, int64_t keys, int64_t width, float scale, const float *bias, int64_t bias_key) {
    float largest = -INFINITY, sum = 0, same = bias && !bias_key ? *bias : 0;
    vector sums = {0};
    if (bias && bias_key) { // a loop for both would make attention take a third longer
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < keys; j++) {
            scores[j] = scores[j] * scale + bias[j];
            largest = scores[j] > largest ? scores[j] : largest;
        }
    } else {
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < keys; j++) {
            scores[j] = scores[j] * scale + same;
            largest = scores[j] > largest ? scores[j] : largest;
        }
    }
    if (largest == -INFINITY) largest = 0; // exp(-inf) is 0, and NaN stays NaN
    for (int64_t j = keys; j < width; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < width; j += LANES) {
        vector *score = (vector *)(scores + j);
        sums += *score = exponential(*score - largest);
    }
    for (int64_t i = 0; i < LANES; i++) sum += sums[i];
    return sum == 0 ? 0 : 1 / sum;
}

static void attend_tile(const attention *a, const head *h, int64_t row, int64_t rows) {
    float inverse[ROWS], sums[ROWS * PANEL] __attribute__((aligned(64)));
    const float *query = h->query + row * a->of_query.token;
    int64_t seen = a->is_causal ? least(h->keys, row + rows) : h->keys;
    for (int64_t key = 0; key < seen; key += PANEL)
        multiply(
            rows, h->scores + key, h->width, query, a->of_query.token, a->head_dim, h->keys_packed + key * a->head_dim,
            NULL, 0);
    for (int64_t i = 0; i < rows; i++) {
        int64_t keys = a->is_causal ? least(seen, row + i + 1) : seen;
        float *scores = h->scores + i * h->width;
        const float *bias = h->bias ? h->bias + (row + i) * a->of_bias.token : NULL;
        inverse[i] = soften(scores, keys, up_to_panels(seen), a->scale, bias, a->bias_key);
    }
    for (int64_t dim = 0; dim < a->value_dim; dim += PANEL) {
        multiply(rows, sums, PANEL, h->scores, h->width, seen, h->values_packed + dim * h->keys, NULL, 0);
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

// Sequences of so many queries and keys, or, with bounds, sequences that stand side by side: tokens from each bound to
// the next attend to each other; strides from one sequence to the next are 0, and none is longer than `queries`.
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
        for (int64_t i = all * pieces - 1; i >= 0; i--) { // packed ones stand shortest first: long ones go first
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

// --- chains ----------------------------------------------------------------------------------------------------------
//
// Kernels one after the other on the same rows. What only they read stands in one block (chain.py plans it). An operand
// is a place there, in floats for each row, or, below 0, one of the addresses that are given; for a bias the strides to
// the next sequence, head, token and key follow it.

typedef struct { // native.STEP
    int64_t is_attention;
    int64_t x, packed, bias, residual, y, gamma, beta, normed; // operands: of an attention, x is its projection
    int64_t k, n;                                              // floats in a row of x and of y
    int64_t heads, heads_per_key, head_dim, query, key, value; // of an attention: where these begin in a row of x
    float number;                                              // epsilon or scale
    int32_t choice;                                            // activation or is_causal
} step;

typedef struct { // native.CHAIN
    float *block;
    const int32_t *bounds; // or NULL
    int64_t steps, rows, sequences, tokens, threads;
} chain;

static float *place(const chain *c, const int64_t *given, int64_t operand) {
    return operand < 0 ? (float *)(intptr_t)given[-1 - operand] : c->block + operand * c->rows;
}

static void link_linear(const chain *c, const step *s, const int64_t *given) {
    linear l = {
        .x = place(c, given, s->x),
        .packed = place(c, given, s->packed),
        .bias = place(c, given, s->bias),
        .residual = place(c, given, s->residual),
        .y = place(c, given, s->y),
        .gamma = place(c, given, s->gamma),
        .beta = place(c, given, s->beta),
        .normed = place(c, given, s->normed),
        .m = c->rows,
        .n = s->n,
        .k = s->k,
        .epsilon = s->number,
        .activation = s->choice,
        .threads = c->threads,
    };
    fxbt_linear(&l);
}

static int link_attention(const chain *c, const step *s, const int64_t *given) {
    const float *x = place(c, given, s->x), *bias = place(c, given, s->bias);
    int64_t apart = c->bounds ? 0 : c->tokens;
    strides along = {apart * s->k, s->head_dim, s->k};
    attention a = {
        .query = x + s->query,
        .key = x + s->key,
        .value = x + s->value,
        .output = place(c, given, s->y),
        .bias = bias,
        .bounds = c->bounds,
        .of_query = along,
        .of_key = along,
        .of_value = along,
        .of_output = {apart * s->n, s->head_dim, s->n},
        .sequences = c->sequences,
        .heads = s->heads,
        .heads_per_key = s->heads_per_key,
        .queries = c->tokens,
        .keys = c->tokens,
        .head_dim = s->head_dim,
        .value_dim = s->head_dim,
        .scale = s->number,
        .is_causal = s->choice,
        .threads = c->threads,
    };
    if (bias) {
        const int64_t *of = given - s->bias;
        a.of_bias = (strides){of[0], of[1], of[2]}, a.bias_key = of[3];
    }
    return fxbt_attention(&a);
}

// Returns whether there was memory for it.
int fxbt_chain(const chain *c, const step *steps, const int64_t *given) {
    for (const step *s = steps; s < steps + c->steps; s++) {
        if (!s->is_attention) link_linear(c, s, given);
        else if (!link_attention(c, s, given)) return 0;
    }
    return 1;
}

int fxbt_panel(void) { return PANEL; }
int fxbt_depth(void) { return DEPTH; }
