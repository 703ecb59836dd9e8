// The selective scan of Mamba (modules/mamba.py), forward and backward, without writing all states to memory: only the state
// before each piece of time is saved, and the backward pass recomputes the others (arXiv 2312.00752, section 3.3.2).
//
//     state[t, i, n] = exp(step[t, i] rates[i, n]) state[t - 1, i, n] + step[t, i] u[t, i] write[t, n]
//     out[t, i] = sum over n of state[t, i, n] read[t, n]
//
// B batch, T time, I channels, N numbers of state for each channel. Blocks of channels are independent.

#include "kernels.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int WIDTH = 64;  // channels of a block, in vectors
constexpr float LOG2_E = 1.44269504f;

struct Scan {
    const float *u, *step, *rates, *write, *read;
    const int32_t *first;  // (B, T), where the story of each token starts, or null for 0
    float *states;         // (B, pieces, blocks, N, WIDTH)
    int64_t B, T, I, N, piece;

    int64_t blocks() const { return (I + WIDTH - 1) / WIDTH; }
    int64_t pieces() const { return (T + piece - 1) / piece; }
};

// A number for each channel of a block, filled up with zeros.
struct alignas(64) Row {
    float at[WIDTH] = {};

    Row() = default;
    Row(const float *from, int64_t count) { std::copy(from, from + count, at); }
    void write(float *to, int64_t count) const { std::copy(at, at + count, to); }
};

// A block of channels of one row of the batch.
class Block {
    const Scan &of;
    const int64_t b, number, first_channel, width, size;
    std::vector<float> rates, state;  // each (N, WIDTH); rates times log2(e)

    int64_t offset(int64_t t) const { return (b * of.T + t) * of.I + first_channel; }
    float *saved_state(int64_t t) const { return of.states + ((b * of.pieces() + t / of.piece) * of.blocks() + number) * size; }
    bool is_start(int64_t t) const { return of.first && of.first[b * of.T + t] == t; }

  public:
    Block(const Scan &of, int64_t item)
        : of(of), b(item / of.blocks()), number(item % of.blocks()), first_channel(number * WIDTH),
          width(std::min<int64_t>(WIDTH, of.I - first_channel)), size(of.N * WIDTH), rates(size), state(size) {
        for (int64_t i = 0; i < width; i++)
            for (int64_t n = 0; n < of.N; n++) rates[n * WIDTH + i] = of.rates[(first_channel + i) * of.N + n] * LOG2_E;
    }

    void forward(float *out) {
        for (int64_t t = 0; t < of.T; t++) {
            if (t % of.piece == 0) std::copy(state.begin(), state.end(), saved_state(t));
            if (is_start(t)) std::fill(state.begin(), state.end(), 0.0f);
            const Row step(of.step + offset(t), width), u(of.u + offset(t), width);
            Row input, result;
            for (int i = 0; i < WIDTH; i++) input.at[i] = step.at[i] * u.at[i];
            for (int64_t n = 0; n < of.N; n++) {
                const float write = of.write[(b * of.T + t) * of.N + n], read = of.read[(b * of.T + t) * of.N + n];
                const float *rate = rates.data() + n * WIDTH;
                float *h = state.data() + n * WIDTH;
#pragma omp simd
                for (int i = 0; i < WIDTH; i++) {
                    h[i] = exp2<float, int32_t>(step.at[i] * rate[i]) * h[i] + input.at[i] * write;
                    result.at[i] += h[i] * read;
                }
            }
            result.write(out + offset(t), width);
        }
    }

    // d_rates (B, I, N), d_write and d_read (blocks, B, T, N) are the terms of this row and this block.
    void backward(const float *d_out, float *d_u, float *d_step, float *d_rates, float *d_write, float *d_read) {
        std::vector<float> before(of.piece * size), decays(of.piece * size), d_state(size), d_rate(size);
        for (int64_t from = (of.pieces() - 1) * of.piece; from >= 0; from -= of.piece) {
            const int64_t to = std::min(from + of.piece, of.T);
            recompute(from, to, before.data(), decays.data());
            for (int64_t t = to - 1; t >= from; t--) {
                const Row step(of.step + offset(t), width), u(of.u + offset(t), width), d(d_out + offset(t), width);
                const float keeps = is_start(t) ? 0.0f : 1.0f;
                Row input, d_input, d_exponent;
                for (int i = 0; i < WIDTH; i++) input.at[i] = step.at[i] * u.at[i];
                for (int64_t n = 0; n < of.N; n++) {
                    const int64_t token = (b * of.T + t) * of.N + n, partial = number * of.B * of.T * of.N + token;
                    const float write = of.write[token], read = of.read[token];
                    const float *earlier = before.data() + (t - from) * size + n * WIDTH;
                    const float *decay = decays.data() + (t - from) * size + n * WIDTH, *rate = rates.data() + n * WIDTH;
                    float *d_h = d_state.data() + n * WIDTH, *d_r = d_rate.data() + n * WIDTH;
                    float written = 0.0f, was_read = 0.0f;
#pragma omp simd reduction(+ : written, was_read)
                    for (int i = 0; i < WIDTH; i++) {
                        was_read += d.at[i] * (decay[i] * earlier[i] + input.at[i] * write);
                        const float gradient = d_h[i] + d.at[i] * read, through = gradient * decay[i];
                        written += gradient * input.at[i];
                        d_input.at[i] += gradient * write;
                        const float exponent = through * earlier[i];
                        d_exponent.at[i] += exponent * rate[i];
                        d_r[i] += exponent * step.at[i];
                        d_h[i] = through * keeps;
                    }
                    d_write[partial] = written;
                    d_read[partial] = was_read;
                }
                for (int i = 0; i < width; i++) {
                    d_u[offset(t) + i] = d_input.at[i] * step.at[i];
                    d_step[offset(t) + i] = d_input.at[i] * u.at[i] + d_exponent.at[i] * (1.0f / LOG2_E);
                }
            }
        }
        for (int64_t i = 0; i < width; i++)
            for (int64_t n = 0; n < of.N; n++) d_rates[(b * of.I + first_channel + i) * of.N + n] = d_rate[n * WIDTH + i];
    }

  private:
    // The state before each token of a piece of time, and its decay there.
    void recompute(int64_t from, int64_t to, float *before, float *decays) {
        std::copy(saved_state(from), saved_state(from) + size, state.begin());
        for (int64_t t = from; t < to; t++, before += size, decays += size) {
            if (is_start(t)) std::fill(state.begin(), state.end(), 0.0f);
            std::copy(state.begin(), state.end(), before);
            const Row step(of.step + offset(t), width), u(of.u + offset(t), width);
            Row input;
            for (int i = 0; i < WIDTH; i++) input.at[i] = step.at[i] * u.at[i];
            for (int64_t n = 0; n < of.N; n++) {
                const float write = of.write[(b * of.T + t) * of.N + n];
                const float *rate = rates.data() + n * WIDTH;
                float *h = state.data() + n * WIDTH, *decay = decays + n * WIDTH;
#pragma omp simd
                for (int i = 0; i < WIDTH; i++) {
                    decay[i] = exp2<float, int32_t>(step.at[i] * rate[i]);
                    h[i] = decay[i] * h[i] + input.at[i] * write;
                }
            }
        }
    }
};

}  // namespace

extern "C" {

void selective_scan_forward(const float *u, const float *step, const float *rates, const float *write, const float *read,
                            const int32_t *first, float *out, float *states, int64_t B, int64_t T, int64_t I, int64_t N,
                            int64_t piece, int64_t threads) {
    const Scan scan = {u, step, rates, write, read, first, states, B, T, I, N, piece};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < B * scan.blocks(); item++) Block(scan, item).forward(out);
}

void selective_scan_backward(const float *u, const float *step, const float *rates, const float *write, const float *read,
                             const int32_t *first, float *states, const float *d_out, float *d_u, float *d_step,
                             float *d_rates, float *d_write, float *d_read, int64_t B, int64_t T, int64_t I, int64_t N,
                             int64_t piece, int64_t threads) {
    const Scan scan = {u, step, rates, write, read, first, states, B, T, I, N, piece};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < B * scan.blocks(); item++)
        Block(scan, item).backward(d_out, d_u, d_step, d_rates, d_write, d_read);
}
}
