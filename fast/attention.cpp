// Causal attention for training on a CPU, forward and backward; the backward pass recomputes the scores (FlashAttention: Dao
// et al. 2022, arXiv 2205.14135). Plain C++17 with the vector extensions of GCC and Clang: AVX2, AVX-512 or NEON.
//
// B batch, H query heads, G key/value heads, T time, K head dim; query head h reads key/value head h / (H / G). The query at
// time t sees the keys from first[b, t] to t. Products are computed in small tiles whose sums stay in registers; tiles that no
// query sees are skipped. The queries are multiplied by log2(e) / sqrt(K), so that a weight is exp2(score - lse).

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // of a vector; of a tile, which has 2 vectors a row: limited by the registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int BLOCK = 8 * ROWS;  // queries or keys: the data of the backward pass for a block of each fit into the L1 cache

using Index = std::ptrdiff_t;
template <int N>
using Floats __attribute__((vector_size(N * sizeof(float)))) = float;
using Vector = Floats<LANES>;
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vector load(const float *from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float *to, Vector x) { std::memcpy(to, &x, sizeof x); }

inline Vector filled(float x) { return x - Vector{}; }

// Joins the halves of x recursively, down to one number.
template <int N, class Join>
inline float reduce(Floats<N> x, Join join) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        Floats<N / 2> halves[2];
        std::memcpy(halves, &x, sizeof x);
        return reduce<N / 2>(join(halves[0], halves[1]), join);
    }
}

inline float sum(Vector x) {
    return reduce<LANES>(x, [](auto a, auto b) { return a + b; });
}

inline float largest(Vector x) {
    return reduce<LANES>(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline float dot(const float *a, const float *b, int K) {
    Vector products = {};
    float remainder = 0.0f;
    int k = 0;
    for (; k + LANES <= K; k += LANES) products += load(a + k) * load(b + k);
    for (; k < K; k++) remainder += a[k] * b[k];
    return sum(products) + remainder;
}

inline int round_down(int x, int step) { return x / step * step; }
inline int round_up(int x, int step) { return (x + step - 1) / step * step; }

struct Span {
    int from, to;
};

// A tile of a matrix product: passes ROWS x N vectors of start + A B to finish. Element (row, step) of A is at
// a[row * a_row + step * a_step], vector n of row `step` of B at b[step * b_step + n * b_vector].
template <int N, class Start, class Finish>
inline __attribute__((always_inline)) void tile(const float *a, Index a_row, Index a_step, const float *b, Index b_step,
                                                Index b_vector, int steps, Start start, Finish finish) {
    Vector sums[ROWS][N];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sums[row][n] = start(row, n);
    for (int step = 0; step < steps; step++, a += a_step, b += b_step) {
        Vector factor[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) factor[n] = load(b + n * b_vector);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) sums[row][n] += a[row * a_row] * factor[n];
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) finish(row, n, sums[row][n]);
}

// Calls columns(number of vectors, first column) for two vectors at a time, and for one at the end of an odd number.
template <class Columns>
inline __attribute__((always_inline)) void by_two_vectors(Span span, Columns columns) {
    int column = span.from;
    for (; column + 2 * LANES <= span.to; column += 2 * LANES) columns(std::integral_constant<int, 2>(), column);
    if (column < span.to) columns(std::integral_constant<int, 1>(), column);
}

// result (ROWS, width) += A B over the steps of the span; the rows of B and of the result are `width` apart.
void add_product(float *result, const float *a, Index a_row, Index a_step, const float *b, int width, Span steps) {
    if (steps.from >= steps.to) return;
    a += steps.from * a_step, b += steps.from * (Index)width;
    by_two_vectors({0, width}, [=](auto vectors, int column) __attribute__((always_inline)) {
        float *to = result + column;
        tile<vectors>(a, a_row, a_step, b + column, width, LANES, steps.to - steps.from,
            [=](int row, int n) { return load(to + row * width + n * LANES); },
            [=](int row, int n, Vector x) { store(to + row * width + n * LANES, x); });
    });
}

// finish(row, key, start(row) + A B) for ROWS rows of A (`width` apart) and the panels of B with the keys of the span.
template <class Start, class Finish>
inline __attribute__((always_inline)) void each_score(const float *a, const float *panels, int K, int width, Span keys,
                                                      Start start, Finish finish) {
    by_two_vectors(keys, [=](auto vectors, int key) __attribute__((always_inline)) {
        tile<vectors>(a, width, 1, panels + key * (Index)width, LANES, LANES * (Index)width, K,
            [=](int row, int) { return start(row); },
            [=](int row, int n, Vector x) { finish(row, key + n * LANES, x); });
    });
}

template <class To, class From>
inline void copy_row(To *to, const From *from, int K, float factor) {
#pragma omp simd
    for (int k = 0; k < K; k++) to[k] = (float)from[k] * factor;
}

struct View {  // a tensor (B, heads, T, K) of float, or BFloat16 if half, and its first three strides; the last is 1
    void *data;
    int64_t batch, head, time, half;

    Index offset(int b, int h, int t) const { return b * batch + h * head + t * time; }

    void read(float *to, int b, int h, int t, int K, float factor = 1.0f) const {
        with_type(half, [=, *this](auto type) { copy_row(to, (const decltype(type) *)data + offset(b, h, t), K, factor); });
    }

    void write(const float *from, int b, int h, int t, int K, float factor) const {
        with_type(half, [=, *this](auto type) { copy_row((decltype(type) *)data + offset(b, h, t), from, K, factor); });
    }
};

// Rows of a view times a factor, `width` apart, with zeros after their K numbers and in the rows from T on.
void pack_rows(float *to, const View &view, int b, int h, Span times, int T, int K, int width, float factor = 1.0f) {
    for (int t = times.from; t < times.to; t++, to += width) {
        const int used = t < T ? K : 0;
        if (used) view.read(to, b, h, t, used, factor);
        std::fill(to + used, to + width, 0.0f);
    }
}

void unpack_rows(const View &view, const float *from, int b, int h, int T, int K, int width, float factor) {
    for (int t = 0; t < T; t++, from += width) view.write(from, b, h, t, K, factor);
}

// Panels of LANES rows, transposed: a column of all rows is one vector.
void pack_panels(float *panels, const float *rows, int num_rows, int width) {
    for (int panel = 0; panel < num_rows; panel += LANES, panels += LANES * width, rows += LANES * width)
        for (int column = 0; column < width; column++)
            for (int lane = 0; lane < LANES; lane++) panels[column * LANES + lane] = rows[lane * width + column];
}

// Memory that a thread reuses between calls: new pages would cost more time than the computation.
class Scratch {
    float *next;

  public:
    explicit Scratch(size_t numbers) {
        static thread_local std::vector<float> memory;
        if (memory.size() < numbers + 16) memory.resize(numbers + 16);
        next = (float *)round_up_to_line((uintptr_t)memory.data());
    }
    static uintptr_t round_up_to_line(uintptr_t x) { return (x + 63) & ~(uintptr_t)63; }

    template <class Kind>
    Kind *take(size_t count) {
        Kind *taken = (Kind *)next;
        next += round_up_to_line(count * sizeof(Kind)) / sizeof(float);
        return taken;
    }
};

// The keys [begin, end) that each query of a row sees; none for the padding of the last tile.
struct Sight {
    int *begin, *end;
    Span *any, *all;  // for each tile of ROWS queries: the keys that any or all of them see

    static size_t scratch(int padded) { return 4 * (size_t)padded + 64; }

    Sight(Scratch &scratch, const int32_t *first, int T, int padded) {
        begin = scratch.take<int>(padded), end = scratch.take<int>(padded);
        any = scratch.take<Span>(padded / ROWS), all = scratch.take<Span>(padded / ROWS);
        for (int t = 0; t < padded; t++) {
            begin[t] = t >= T ? begin[T - 1] : first ? std::min(std::max(first[t], 0), t) : 0;
            end[t] = t >= T ? 0 : t + 1;
        }
        for (int t = 0; t < padded; t += ROWS) {
            auto [lowest, highest] = std::minmax_element(begin + t, begin + t + ROWS);
            auto [soonest, latest] = std::minmax_element(end + t, end + t + ROWS);
            any[t / ROWS] = {*lowest, *latest}, all[t / ROWS] = {*highest, *soonest};
        }
    }

    // Sets the scores of ROWS queries from time t on to `hidden` where a query does not see the key.
    void hide(float *scores, int stride, int t, Span keys, float hidden) const {
        const Span open = all[t / ROWS];
        for (int key = keys.from; key < keys.to; key += LANES) {
            if (key >= open.from && key + LANES <= open.to) continue;
            Integers positions;
            for (int lane = 0; lane < LANES; lane++) positions[lane] = key + lane;
            for (int row = 0; row < ROWS; row++) {
                float *at = scores + row * stride + key;
                store(at, ((positions >= begin[t + row]) & (positions < end[t + row])) ? load(at) : filled(hidden));
            }
        }
    }
};

}  // namespace

struct Attention {  // the arguments; the forward pass writes out and lse, the backward pass d_q, d_k and d_v
    int64_t B, H, G, T, K, threads;
    const int32_t *first;  // (B, T), the first key that each query sees, or null for 0
    float *lse;            // (B, H, T), log2 of the sum of exp2(score)
    View q, k, v, out, d_out, d_q, d_k, d_v;

    int width() const { return round_up(K, LANES); }
    float scale() const { return 1.0f / std::sqrt((float)K); }
    const int32_t *first_of(int b) const { return first ? first + (Index)b * T : nullptr; }
    float *lse_of(int b, int h) const { return lse + ((Index)b * H + h) * T; }
};

namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr float HIDDEN = -INFINITY;  // the score of a masked key

// Turns the scores of ROWS queries into weights, still to be divided by their totals.
inline void softmax(float *scores, int stride, Span keys, float *highest, float *totals) {
    Vector top[ROWS], total[ROWS];
    std::fill(top, top + ROWS, filled(HIDDEN));
    std::fill(total, total + ROWS, Vector{});
    for (int key = keys.from; key < keys.to; key += LANES)
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            Vector x = load(scores + row * stride + key);
            top[row] = top[row] > x ? top[row] : x;
        }
    for (int row = 0; row < ROWS; row++) top[row] = filled(highest[row] = largest(top[row]));
    for (int key = keys.from; key < keys.to; key += LANES)
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            Vector weight = exp2<Vector, Integers>(load(scores + row * stride + key) - top[row]);
            store(scores + row * stride + key, weight);
            total[row] += weight;
        }
    for (int row = 0; row < ROWS; row++) totals[row] = sum(total[row]);
}

// The outputs at some times, from a multiple of ROWS on, of all query heads that share key/value head g.
void forward(const Attention &of, int b, int g, Span times) {
    const int T = of.T, K = of.K, group = of.H / of.G, width = of.width();
    const int num_keys = round_up(times.to, LANES), stride = num_keys + LANES, padded = round_up(T, ROWS);
    const size_t matrix = (size_t)num_keys * width;
    Scratch scratch(3 * matrix + ROWS * (2 * width + stride) + 128 + Sight::scratch(padded));
    float *keys = scratch.take<float>(matrix), *values = scratch.take<float>(matrix), *panels = scratch.take<float>(matrix);
    float *queries = scratch.take<float>(ROWS * width), *mixed = scratch.take<float>(ROWS * width);
    float *scores = scratch.take<float>(ROWS * stride), highest[ROWS], totals[ROWS];
    const Sight sight(scratch, of.first_of(b), T, padded);

    pack_rows(values, of.v, b, g, {0, num_keys}, T, K, width);
    pack_rows(keys, of.k, b, g, {0, num_keys}, T, K, width);
    pack_panels(panels, keys, num_keys, width);
    for (int h = g * group; h < (g + 1) * group; h++)
        for (int t = times.from; t < times.to; t += ROWS) {
            const Span visible = sight.any[t / ROWS], near = {round_down(visible.from, LANES), round_up(visible.to, LANES)};
            pack_rows(queries, of.q, b, h, {t, t + ROWS}, T, K, width, of.scale() * LOG2_E);
            each_score(queries, panels, K, width, near, [](int) { return Vector{}; },
                [=](int row, int key, Vector x) { store(scores + row * stride + key, x); });
            sight.hide(scores, stride, t, near, HIDDEN);
            softmax(scores, stride, near, highest, totals);
            std::fill(mixed, mixed + ROWS * width, 0.0f);
            add_product(mixed, scores, stride, 1, values, width, visible);
            for (int row = 0; row < ROWS && t + row < T; row++) {
                of.out.write(mixed + row * width, b, h, t + row, K, 1.0f / totals[row]);
                of.lse_of(b, h)[t + row] = highest[row] + std::log2(totals[row]);
            }
        }
}

// The gradients of key/value head g and of the query heads that share it.
struct Backward {
    const Attention &of;
    const int b, g, T, K, width, padded;
    const size_t matrix;
    Scratch scratch;
    float *keys, *key_panels, *value_panels, *queries, *d_out, *d_queries, *d_keys, *d_values;  // each (padded, width)
    float *minus_lse, *minus_delta;                                                            // each (padded)
    float *mixed;                                                                              // (width)
    float *weights, *d_scores;                                                                 // each (BLOCK, BLOCK)
    const Sight sight;

    static Scratch space(int padded, size_t matrix) {
        return Scratch(8 * matrix + 2 * (size_t)padded + matrix / padded + 2 * BLOCK * BLOCK + 272 + Sight::scratch(padded));
    }

    Backward(const Attention &of, int b, int g)
        : of(of), b(b), g(g), T(of.T), K(of.K), width(of.width()), padded(round_up(T, BLOCK)), matrix((size_t)padded * width),
          scratch(space(padded, matrix)), sight(scratch, of.first_of(b), T, padded) {
        for (float **each : {&keys, &key_panels, &value_panels, &queries, &d_out, &d_queries, &d_keys, &d_values})
            *each = scratch.take<float>(matrix);
        for (float **each : {&minus_lse, &minus_delta}) *each = scratch.take<float>(padded);
        mixed = scratch.take<float>(width);
        for (float **each : {&weights, &d_scores}) *each = scratch.take<float>(BLOCK * BLOCK);
    }

    void run() {
        const int group = of.H / of.G;
        pack_rows(keys, of.v, b, g, {0, padded}, T, K, width);
        pack_panels(value_panels, keys, padded, width);
        pack_rows(keys, of.k, b, g, {0, padded}, T, K, width);
        pack_panels(key_panels, keys, padded, width);
        std::fill(d_keys, d_keys + matrix, 0.0f);
        std::fill(d_values, d_values + matrix, 0.0f);
        for (int h = g * group; h < (g + 1) * group; h++) {
            pack_queries(h);
            for (int key0 = 0; key0 < T; key0 += BLOCK)
                for (int t0 = key0; t0 < T; t0 += BLOCK) add_block(key0, {t0, std::min(t0 + BLOCK, round_up(T, ROWS))});
            unpack_rows(of.d_q, d_queries, b, h, T, K, width, of.scale());
        }
        unpack_rows(of.d_k, d_keys, b, g, T, K, width, 1.0f / LOG2_E);  // the packed queries include the scale and log2(e)
        unpack_rows(of.d_v, d_values, b, g, T, K, width, 1.0f);
    }

    void pack_queries(int h) {
        pack_rows(queries, of.q, b, h, {0, padded}, T, K, width, of.scale() * LOG2_E);
        pack_rows(d_out, of.d_out, b, h, {0, padded}, T, K, width);
        std::fill(d_queries, d_queries + matrix, 0.0f);
        for (int t = 0; t < padded; t++) {
            if (t < T) of.out.read(mixed, b, h, t, K);
            minus_delta[t] = t < T ? -dot(mixed, d_out + t * width, K) : 0.0f;
            minus_lse[t] = t < T ? -of.lse_of(b, h)[t] : 0.0f;
        }
    }

    // Adds the terms of a block of keys and a block of queries to all three gradients.
    void add_block(int key0, Span times) {
        bool visible = false;
        for (int t = times.from; t < times.to; t += ROWS) visible |= sight.any[t / ROWS].from < key0 + BLOCK;
        if (!visible) return;
        for (int t = times.from; t < times.to; t += ROWS) add_to_queries(key0, t, (t - times.from) * BLOCK - key0);
        for (int key = key0; key < key0 + BLOCK; key += ROWS) {
            Span see = {std::max(times.from, key), times.to};
            while (see.from < see.to && sight.begin[see.to - 1] >= key + ROWS) see.to--;
            const int column = key - key0 - times.from * BLOCK;
            add_product(d_values + key * width, weights + column, 1, BLOCK, d_out, width, see);
            add_product(d_keys + key * width, d_scores + column, 1, BLOCK, queries, width, see);
        }
    }

    // Weights and score gradients of ROWS queries for a block of keys; the row of time t starts at `offset`.
    void add_to_queries(int key0, int t, int offset) {
        float *p = weights + offset, *d_s = d_scores + offset;
        const Span any = sight.any[t / ROWS], visible = {std::max(any.from, key0), std::min(any.to, key0 + BLOCK)};
        const bool is_empty = visible.from >= visible.to;
        const Span near = {is_empty ? key0 : round_down(visible.from, LANES), is_empty ? key0 : round_up(visible.to, LANES)};
        for (int row = 0; row < ROWS; row++) {
            for (float *to : {p + row * BLOCK, d_s + row * BLOCK}) {
                std::fill(to + key0, to + near.from, 0.0f);
                std::fill(to + near.to, to + key0 + BLOCK, 0.0f);
            }
        }
        const float *lse = minus_lse + t, *delta = minus_delta + t;
        each_score(queries + t * width, key_panels, K, width, near, [=](int row) { return filled(lse[row]); },
            [=](int row, int key, Vector x) { store(p + row * BLOCK + key, (exp2<Vector, Integers>(x))); });
        sight.hide(p, BLOCK, t, near, 0.0f);
        each_score(d_out + t * width, value_panels, K, width, near, [=](int row) { return filled(delta[row]); },
            [=](int row, int key, Vector x) { store(d_s + row * BLOCK + key, load(p + row * BLOCK + key) * x); });
        add_product(d_queries + t * width, d_s, BLOCK, 1, keys, width, visible);
    }
};

}  // namespace

extern "C" {

void attention_forward(const Attention *of) {
    // a few pieces of work for each thread; their number does not change the result
    const int G = of->G, T = of->T, threads = of->threads, items = of->B * G, blocks = round_up(T, BLOCK) / BLOCK;
    const int pieces = std::min(blocks, (4 * threads + items - 1) / std::max(items, 1));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int work = 0; work < items * pieces; work++) {
        const int item = work / pieces, piece = work % pieces;
        const Span times = {blocks * piece / pieces * BLOCK, std::min(blocks * (piece + 1) / pieces * BLOCK, T)};
        forward(*of, item / G, item % G, times);
    }
}

void attention_backward(const Attention *of) {
    const int G = of->G, threads = of->threads, items = of->T ? of->B * G : 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int item = 0; item < items; item++) Backward(*of, item / G, item % G).run();
}
}
