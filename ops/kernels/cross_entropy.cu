// Cross-entropy of rows of logits against their targets, and its gradient over the logits where they lie.
//
// A row to a block. Logits are [rows, stride], of which the first `vocab` of a row are tokens; the others get
// no probability and a gradient of zero. `stride` is a multiple of V, `vocab` need not be.

constexpr float kNothing = -3.0e38f;

// losses[row] = log-sum-exp - logit of the target, in nats; NaN where the target is no token. Each logit
// becomes (probability - [it is the target's]) * scale. bias, [stride], is added to the logits if there is one.
template <typename T, int V>
PHX_DEVICE void loss_rows(T *logits, const T *bias, const i64 *targets, float *losses, i64 rows, i64 vocab,
                          i64 stride, float scale) {
  const i64 begin = static_cast<i64>(threadIdx.x) * V, step = static_cast<i64>(blockDim.x) * V;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    T *of_row = logits + row * stride;
    // The sum of exponentials so far, relative to the largest logit so far.
    float most = kNothing, sum = 0;
    for (i64 i = begin; i < vocab; i += step) {
      const Pack<T, V> a = read<V>(of_row + i);
      for (int j = 0; j < V; ++j) {
        if (i + j >= vocab) break;
        const float x = as_float(a.values[j]) + (bias != nullptr ? as_float(bias[i + j]) : 0.0f);
        if (x > most) {
          sum *= expf(most - x);
          most = x;
        }
        sum += expf(x - most);
      }
    }
    const float largest = block_max(most);
    const float lse = largest + logf(block_sum(sum * expf(most - largest)));
    const i64 target = targets[row];
    const bool known = target >= 0 && target < vocab;
    if (threadIdx.x == 0) {
      const float picked =
          known ? as_float(of_row[target]) + (bias != nullptr ? as_float(bias[target]) : 0.0f) : float_of(0x7fc00000u);
      losses[row] = lse - picked;
    }
    __syncthreads();  // the target's logit has been read
    for (i64 i = begin; i < stride; i += step) {
      Pack<T, V> a = read<V>(of_row + i);
      for (int j = 0; j < V; ++j) {
        const i64 token = i + j;
        float grad = 0;
        if (token < vocab) {
          const float x = as_float(a.values[j]) + (bias != nullptr ? as_float(bias[token]) : 0.0f);
          grad = (expf(x - lse) - (token == target ? 1.0f : 0.0f)) * scale;
        }
        put(a.values[j], grad);
      }
      write<V>(of_row + i, a);
    }
  }
}

#define PHX_LOSS(T, name, V)                                                                               \
  PHX_KERNEL void cross_entropy_##name(T *logits, const T *bias, const i64 *targets, float *losses,        \
                                       i64 rows, i64 vocab, i64 stride, float scale) {                     \
    loss_rows<T, V>(logits, bias, targets, losses, rows, vocab, stride, scale);                            \
  }

PHX_LOSS(float, f32x1, 1)
PHX_LOSS(float, f32x4, 4)
PHX_LOSS(bf16, bf16x1, 1)
PHX_LOSS(bf16, bf16x8, 8)
