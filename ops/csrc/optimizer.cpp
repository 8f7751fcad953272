// Passes over flat fp32 buffers: the AdamW update and the partial sums of the gradient's norm.
//
// Each element is computed by the same sequence of correctly rounded operations wherever it lies
// (the build forbids contraction), so that results do not depend on how buffers are cut into shards.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

// One clone for each instruction set, chosen when the program is loaded.
#define PHX_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements per task: large against the cost of starting one, small against a cache

PHX_CLONES void adamw_range(float *param, const float *grad, float *exp_avg, float *exp_avg_sq,
                            int64_t n, float grad_scale, float keep, float beta1, float rest1,
                            float beta2, float rest2, float step_size, float root_scale,
                            float eps) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * grad_scale;
    const float m = beta1 * exp_avg[i] + rest1 * g;
    const float v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = keep * param[i] - step_size * (m / (std::sqrt(v) * root_scale + eps));
  }
}

// To nearest even, as libtorch rounds.
PHX_CLONES void round_range(const float *from, uint16_t *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<uint16_t>(from[i] == from[i] ? nearest : 0x7fc0);
  }
}

PHX_CLONES double sum_squares_range(const float *x, int64_t n) {
  // Sixteen lanes in a fixed order: the same sum with and without vector units.
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      const double value = x[i + lane];
      lanes[lane] += value * value;
    }
  }
  for (; i < n; ++i) {
    const double value = x[i];
    lanes[i % 16] += value * value;
  }
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

extern "C" {

// Loshchilov & Hutter 2019, as torch.optim.AdamW: `keep` = 1 - lr * decay, `rest` = 1 - beta (taken
// in f64, where it is exact enough), `step_size` = lr / (1 - beta1^t), `root_scale` = 1 / sqrt(1 -
// beta2^t). `rounded`, if not null, gets the parameters as bf16, a range after the other while it is near.
void phx_adamw(float *param, const float *grad, float *exp_avg, float *exp_avg_sq, uint16_t *rounded,
               int64_t n, float grad_scale, float keep, float beta1, float rest1, float beta2, float rest2,
               float step_size, float root_scale, float eps) {
  phx::in_ranges(n, kGrain, [&](int64_t begin, int64_t end) {
    adamw_range(param + begin, grad + begin, exp_avg + begin, exp_avg_sq + begin, end - begin,
                grad_scale, keep, beta1, rest1, beta2, rest2, step_size, root_scale, eps);
    if (rounded) round_range(param + begin, rounded + begin, end - begin);
  });
}

// partials[c] = sum of squares of chunk c of `chunk` elements, the last one shorter.
void phx_sum_squares(const float *x, int64_t n, int64_t chunk, double *partials) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  phx::in_ranges(chunks, kGrain / chunk + 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t start = c * chunk;
      partials[c] = sum_squares_range(x + start, n - start < chunk ? n - start : chunk);
    }
  });
}
}
