// Elementwise kernels, forward and backward: norms, rotations, short convolutions, activations and the loss, each in one pass
// over memory. half: whether the tensors are BFloat16 (1) or float (0); weights and their gradients are float, as are all
// computations. Rows are split into parts whose number does not depend on the threads, and so neither do sums over rows.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int PARTS = 48;  // divisible by 2, 3, 4, 6, 8, 12 and 16 threads
constexpr float LOG2_E = 1.44269504f;

// Calls work(part, from, to) for each part of the rows, in parallel.
template <class Work>
void each_part(int64_t rows, int64_t threads, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < PARTS; part++) work(part, rows * part / PARTS, rows * (part + 1) / PARTS);
}

// Sums over all rows: one for each part, which are then added up in order.
class Sums {
    const int64_t count;
    std::vector<float> parts;

  public:
    explicit Sums(int64_t count) : count(count), parts(PARTS * count) {}
    float *of(int part) { return parts.data() + part * count; }
    void write(float *to) const {
        std::fill(to, to + count, 0.0f);
        for (int part = 0; part < PARTS; part++)
            for (int64_t i = 0; i < count; i++) to[i] += parts[part * count + i];
    }
};

template <class Term>
inline float sum_over(int64_t from, int64_t to, Term term) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = from; i < to; i++) total += term(i);
    return total;
}

inline float fast_exp(float x) { return exp2<float, int32_t>(x * LOG2_E); }

// 0 for -inf, and 1 for +inf; exp2(128) is infinite.
inline float sigmoid(float x) {
    const float exponent = -x * LOG2_E;
    return 1.0f / (1.0f + exp2<float, int32_t>(exponent > 128.0f ? 128.0f : exponent));
}

// Activations: their value at x, and the gradient of x for the gradient d of the value.
struct SiLU {
    static float value(float x) { return x * sigmoid(x); }
    static float gradient(float x, float d) {
        const float s = sigmoid(x);
        return d * (s + x * s * (1.0f - s));
    }
};

struct GELU {  // 0.5 x (1 + tanh(u / 2)) = x sigmoid(u)
    static constexpr float A = 1.59576912f, B = 0.044715f;  // A = 2 sqrt(2 / pi)
    static float value(float x) { return x * sigmoid(A * (x + B * x * x * x)); }
    static float gradient(float x, float d) {
        const float s = sigmoid(A * (x + B * x * x * x));
        return d * (s + x * s * (1.0f - s) * A * (1.0f + 3.0f * B * x * x));
    }
};

struct ReLU {
    static float value(float x) { return x < 0.0f ? 0.0f : x; }
    static float gradient(float x, float d) { return x <= 0.0f ? 0.0f : d; }
};

struct ReLU2 {
    static float value(float x) { return x < 0.0f ? 0.0f : x * x; }
    static float gradient(float x, float d) { return x <= 0.0f ? 0.0f : d * 2.0f * x; }
};

template <class Call>
void with_activation(int64_t number, Call call) {  // in the order of ACTIVATIONS in ops.py
    switch (number) {
        case 0: return call(SiLU());
        case 1: return call(GELU());
        case 2: return call(ReLU());
        case 3: return call(ReLU2());
    }
}

// Loss of one token, and its gradient, softmax - one-hot, in place of the logits.
float cross_entropy_of_row(float *logits, int64_t V, int64_t target, float soft_cap, float *slopes) {
    if (soft_cap > 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < V; i++) {
            const float capped = 2.0f * sigmoid(2.0f * logits[i] / soft_cap) - 1.0f;  // tanh
            slopes[i] = 1.0f - capped * capped;
            logits[i] = soft_cap * capped;
        }
    }
    float highest = logits[0], total = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < V; i++) highest = logits[i] > highest ? logits[i] : highest;
    const float right = logits[target];
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < V; i++) total += logits[i] = fast_exp(logits[i] - highest);
    const float scale = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < V; i++) logits[i] *= scale;
    logits[target] -= 1.0f;
    if (soft_cap > 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < V; i++) logits[i] *= slopes[i];
    }
    return std::log(total) + highest - right;
}

}  // namespace

extern "C" {

// out = x / rms(x) * weight for each row of D numbers; weight may be null. x_half is the type of x, half that of out.
void rms_norm_forward(const void *all_x, const float *weight, void *all_out, float *inverse_rms, int64_t rows, int64_t D,
                      float eps, int64_t x_half, int64_t half, int64_t threads) {
    const std::vector<float> ones(weight ? 0 : D, 1.0f);
    const float *gain = weight ? weight : ones.data();
    with_type(x_half, [=](auto x_type) {
        with_type(half, [=](auto out_type) {
            const auto *x = (const decltype(x_type) *)all_x;
            auto *out = (decltype(out_type) *)all_out;
            each_part(rows, threads, [=](int, int64_t from, int64_t to) {
                for (int64_t row = from; row < to; row++) {
                    const auto *in = x + row * D;
                    auto *result = out + row * D;
                    const float squares = sum_over(0, D, [=](int64_t d) { return (float)in[d] * (float)in[d]; });
                    const float inverse = inverse_rms[row] = 1.0f / std::sqrt(squares / D + eps);
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) result[d] = (float)in[d] * inverse * gain[d];
                }
            });
        });
    });
}

// d_x has the type of x, d_out that of out.
void rms_norm_backward(const void *all_d_out, const void *all_x, const float *weight, const float *inverse_rms, void *all_d_x,
                       float *d_weight, int64_t rows, int64_t D, int64_t x_half, int64_t half, int64_t threads) {
    const std::vector<float> ones(weight ? 0 : D, 1.0f);
    const float *gain = weight ? weight : ones.data();
    Sums d_gain(D);
    with_type(x_half, [=, &d_gain](auto x_type) {
        with_type(half, [=, &d_gain](auto out_type) {
            const auto *x = (const decltype(x_type) *)all_x;
            const auto *d_out = (const decltype(out_type) *)all_d_out;
            auto *d_x = (decltype(x_type) *)all_d_x;
            each_part(rows, threads, [=, &d_gain](int part, int64_t from, int64_t to) {
                float *sum = d_gain.of(part);
                for (int64_t row = from; row < to; row++) {
                    const auto *in = x + row * D;
                    const auto *d = d_out + row * D;
                    auto *result = d_x + row * D;
                    const float inverse = inverse_rms[row];
                    const float product = sum_over(0, D, [=](int64_t i) { return (float)d[i] * gain[i] * (float)in[i]; });
                    const float share = product / D * inverse * inverse;
#pragma omp simd
                    for (int64_t i = 0; i < D; i++) result[i] = inverse * ((float)d[i] * gain[i] - (float)in[i] * share);
#pragma omp simd
                    for (int64_t i = 0; i < D; i++) sum[i] += (float)d[i] * (float)in[i] * inverse;
                }
            });
        });
    });
    if (weight) d_gain.write(d_weight);
}

// x and out (B, T, H, 2 pairs), cos and sin (T, pairs); direction is 1, or -1 for the gradient.
void rope(const void *all_x, const float *cos, const float *sin, void *all_out, int64_t BT, int64_t T, int64_t H, int64_t pairs,
          float direction, int64_t half, int64_t threads) {
    with_type(half, [=](auto type) {
        const auto *x = (const decltype(type) *)all_x;
        auto *out = (decltype(type) *)all_out;
        each_part(BT, threads, [=](int, int64_t from, int64_t to) {
            for (int64_t row = from * H; row < to * H; row++) {
                const int64_t t = row / H % T;
                const float *c = cos + t * pairs, *s = sin + t * pairs;
                const auto *first = x + row * 2 * pairs, *second = first + pairs;
                auto *turned = out + row * 2 * pairs, *other = turned + pairs;
#pragma omp simd
                for (int64_t k = 0; k < pairs; k++) {
                    const float sine = direction * s[k], one = first[k], two = second[k];
                    turned[k] = one * c[k] - two * sine;
                    other[k] = one * sine + two * c[k];
                }
            }
        });
    });
}

// out[t] = x[t] + bias + sum over back of x[t - back] * weight[back], for t - back >= first[t]; x (B, T, D), weight (width, D),
// bias (D) or null, first (B, T), where the story of each token starts, or null for 0.
void short_conv_forward(const void *all_x, const float *weight, const float *bias, const int32_t *first, void *all_out,
                        int64_t BT, int64_t T, int64_t D, int64_t width, int64_t half, int64_t threads) {
    with_type(half, [=](auto type) {
        const auto *x = (const decltype(type) *)all_x;
        auto *out = (decltype(type) *)all_out;
        each_part(BT, threads, [=](int, int64_t from, int64_t to) {
            std::vector<float> buffer(D);
            float *result = buffer.data();
            for (int64_t row = from; row < to; row++) {
                const int64_t t = row % T, reach = std::min(width - 1, t - (first ? std::max(first[row], 0) : 0));
                const auto *in = x + row * D;
                auto *to_row = out + row * D;
#pragma omp simd
                for (int64_t d = 0; d < D; d++) result[d] = (float)in[d] * (1.0f + weight[d]) + (bias ? bias[d] : 0.0f);
                for (int64_t back = 1; back <= reach; back++) {
                    const auto *earlier = in - back * D;
                    const float *w = weight + back * D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) result[d] += (float)earlier[d] * w[d];
                }
#pragma omp simd
                for (int64_t d = 0; d < D; d++) to_row[d] = result[d];
            }
        });
    });
}

// d_bias may be null.
void short_conv_backward(const void *all_d_out, const void *all_x, const float *weight, const int32_t *first, void *all_d_x,
                         float *d_weight, float *d_bias, int64_t BT, int64_t T, int64_t D, int64_t width, int64_t half,
                         int64_t threads) {
    Sums weight_sums(width * D), bias_sums(d_bias ? D : 0);
    with_type(half, [=, &weight_sums, &bias_sums](auto type) {
        const auto *x = (const decltype(type) *)all_x, *d_out = (const decltype(type) *)all_d_out;
        auto *d_x = (decltype(type) *)all_d_x;
        each_part(BT, threads, [=, &weight_sums, &bias_sums](int part, int64_t from, int64_t to) {
            float *d_w = weight_sums.of(part), *d_b = bias_sums.of(part);
            std::vector<float> buffer(D);
            float *result = buffer.data();
            for (int64_t row = from; row < to; row++) {
                const int64_t t = row % T, reach = std::min(width - 1, t - (first ? std::max(first[row], 0) : 0));
                const auto *in = x + row * D, *d = d_out + row * D;
                auto *to_row = d_x + row * D;
#pragma omp simd
                for (int64_t i = 0; i < D; i++) result[i] = (float)d[i] * (1.0f + weight[i]);
                for (int64_t ahead = 1; ahead < width && t + ahead < T; ahead++) {
                    if (first && first[row + ahead] > t) continue;
                    const auto *later = d + ahead * D;
                    const float *w = weight + ahead * D;
#pragma omp simd
                    for (int64_t i = 0; i < D; i++) result[i] += (float)later[i] * w[i];
                }
#pragma omp simd
                for (int64_t i = 0; i < D; i++) to_row[i] = result[i];
                for (int64_t back = 0; back <= reach; back++) {
                    const auto *earlier = in - back * D;
                    float *sum = d_w + back * D;
#pragma omp simd
                    for (int64_t i = 0; i < D; i++) sum[i] += (float)d[i] * (float)earlier[i];
                }
                if (d_bias) {
#pragma omp simd
                    for (int64_t i = 0; i < D; i++) d_b[i] += (float)d[i];
                }
            }
        });
    });
    weight_sums.write(d_weight);
    if (d_bias) bias_sums.write(d_bias);
}

// out = activation(x) * factor; factor may be null.
void activation_forward(int64_t activation, const void *all_x, const void *all_factors, void *all_out, int64_t size,
                        int64_t half, int64_t threads) {
    with_type(half, [=](auto type) {
        const auto *x = (const decltype(type) *)all_x, *factor = (const decltype(type) *)all_factors;
        auto *out = (decltype(type) *)all_out;
        with_activation(activation, [=](auto kind) {
            each_part(size, threads, [=](int, int64_t from, int64_t to) {
#pragma omp simd
                for (int64_t i = from; i < to; i++) out[i] = kind.value(x[i]) * (factor ? (float)factor[i] : 1.0f);
            });
        });
    });
}

void activation_backward(int64_t activation, const void *all_d_out, const void *all_x, const void *all_factors, void *all_d_x,
                         void *all_d_factors, int64_t size, int64_t half, int64_t threads) {
    with_type(half, [=](auto type) {
        const auto *d_out = (const decltype(type) *)all_d_out, *x = (const decltype(type) *)all_x;
        const auto *factor = (const decltype(type) *)all_factors;
        auto *d_x = (decltype(type) *)all_d_x, *d_factor = (decltype(type) *)all_d_factors;
        with_activation(activation, [=](auto kind) {
            each_part(size, threads, [=](int, int64_t from, int64_t to) {
                if (factor) {
#pragma omp simd
                    for (int64_t i = from; i < to; i++) {
                        const float d = d_out[i], in = x[i], by = factor[i];
                        d_x[i] = kind.gradient(in, d * by);
                        d_factor[i] = d * kind.value(in);
                    }
                } else {
#pragma omp simd
                    for (int64_t i = from; i < to; i++) d_x[i] = kind.gradient(x[i], d_out[i]);
                }
            });
        });
    });
}

// out = weights[0] x + weights[1] y
void weighted_sum_forward(const float *x, const float *y, const float *weights, float *out, int64_t size, int64_t threads) {
    const float a = weights[0], b = weights[1];
    each_part(size, threads, [=](int, int64_t from, int64_t to) {
#pragma omp simd
        for (int64_t i = from; i < to; i++) out[i] = a * x[i] + b * y[i];
    });
}

void weighted_sum_backward(const float *d_out, const float *x, const float *y, const float *weights, float *d_x, float *d_y,
                           float *d_weights, int64_t size, int64_t threads) {
    const float a = weights[0], b = weights[1];
    Sums sums(2);
    each_part(size, threads, [=, &sums](int part, int64_t from, int64_t to) {
#pragma omp simd
        for (int64_t i = from; i < to; i++) d_x[i] = a * d_out[i], d_y[i] = b * d_out[i];
        sums.of(part)[0] = sum_over(from, to, [=](int64_t i) { return d_out[i] * x[i]; });
        sums.of(part)[1] = sum_over(from, to, [=](int64_t i) { return d_out[i] * y[i]; });
    });
    sums.write(d_weights);
}

// Writes the loss of each row, and its gradient in place of logits (rows, V). Rows with negative targets are ignored. soft_cap = 0: none.
void cross_entropy(void *all_logits, const int64_t *targets, float *losses, int64_t rows, int64_t V, float soft_cap,
                   int64_t half, int64_t threads) {
    with_type(half, [=](auto type) {
        auto *logits = (decltype(type) *)all_logits;
        each_part(rows, threads, [=](int, int64_t from, int64_t to) {
            std::vector<float> slopes(soft_cap > 0.0f ? V : 0), buffer(V);
            float *row_in_float = buffer.data();
            for (int64_t row = from; row < to; row++) {
                auto *of_row = logits + row * V;
                if (targets[row] < 0) {
                    std::fill(of_row, of_row + V, decltype(type){});
                    losses[row] = 0.0f;
                    continue;
                }
#pragma omp simd
                for (int64_t i = 0; i < V; i++) row_in_float[i] = of_row[i];
                losses[row] = cross_entropy_of_row(row_in_float, V, targets[row], soft_cap, slopes.data());
#pragma omp simd
                for (int64_t i = 0; i < V; i++) of_row[i] = row_in_float[i];
            }
        });
    });
}
}
