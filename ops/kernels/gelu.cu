// Bias and GELU (Hendrycks & Gimpel 2016), exact and by tanh, forward and backward.
//
// A thread has V columns, and the rows blockIdx.y, blockIdx.y + gridDim.y and so on, so that it reads its
// bias once and has the sum of its columns to itself. Rows are [rows, width], `width` a multiple of V.

constexpr float kRootHalf = 0.70710678118654752f;
constexpr float kDensity = 0.39894228040143268f;  // 1 / sqrt(2 pi)
constexpr float kScale = 0.79788456080286536f;    // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

PHX_DEVICE float gelu(float x, bool by_tanh) {
  if (by_tanh) return 0.5f * x * (1.0f + tanhf(kScale * (x + kCubic * x * x * x)));
  return 0.5f * x * (1.0f + erff(x * kRootHalf));
}

PHX_DEVICE float gelu_slope(float x, bool by_tanh) {
  if (by_tanh) {
    const float t = tanhf(kScale * (x + kCubic * x * x * x));
    const float inner = kScale * (1.0f + 3.0f * kCubic * x * x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
  }
  return 0.5f * (1.0f + erff(x * kRootHalf)) + x * kDensity * expf(-0.5f * x * x);
}

// out = gelu(x + bias).
template <typename T, int V>
PHX_DEVICE void forward_rows(const T *x, const T *bias, T *out, i64 rows, i64 width, i64 by_tanh) {
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= width) return;
  const Pack<T, V> b = read<V>(bias + column);
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    Pack<T, V> a = read<V>(x + row * width + column);
    for (int j = 0; j < V; ++j) {
      put(a.values[j], gelu(as_float(a.values[j]) + as_float(b.values[j]), by_tanh != 0));
    }
    write<V>(out + row * width + column, a);
  }
}

// grad = grad_out * gelu'(x + bias), which is the gradient of x; its sums over the rows blockIdx.y and so
// on go to parts, [gridDim.y, width] fp32.
template <typename T, int V>
PHX_DEVICE void backward_rows(const T *grad_out, const T *x, const T *bias, T *grad, float *parts, i64 rows,
                              i64 width, i64 by_tanh) {
  const i64 column = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (column >= width) return;
  const Pack<T, V> b = read<V>(bias + column);
  float sums[V] = {};
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const Pack<T, V> a = read<V>(x + row * width + column);
    Pack<T, V> d = read<V>(grad_out + row * width + column);
    for (int j = 0; j < V; ++j) {
      const float slope = gelu_slope(as_float(a.values[j]) + as_float(b.values[j]), by_tanh != 0);
      const float passed = as_float(d.values[j]) * slope;
      sums[j] += passed;
      put(d.values[j], passed);
    }
    write<V>(grad + row * width + column, d);
  }
  for (int j = 0; j < V; ++j) parts[static_cast<i64>(blockIdx.y) * width + column + j] = sums[j];
}

#define PHX_GELU(T, name, V)                                                                            \
  PHX_KERNEL void gelu_forward_##name(const T *x, const T *bias, T *out, i64 rows, i64 width,           \
                                      i64 by_tanh) {                                                    \
    forward_rows<T, V>(x, bias, out, rows, width, by_tanh);                                             \
  }                                                                                                     \
  PHX_KERNEL void gelu_backward_##name(const T *grad_out, const T *x, const T *bias, T *grad,           \
                                       float *parts, i64 rows, i64 width, i64 by_tanh) {                \
    backward_rows<T, V>(grad_out, x, bias, grad, parts, rows, width, by_tanh);                          \
  }

PHX_GELU(float, f32x1, 1)
PHX_GELU(float, f32x4, 4)
PHX_GELU(bf16, bf16x1, 1)
PHX_GELU(bf16, bf16x8, 8)

PHX_KERNEL void gelu_columns(const float *parts, float *bias, i64 count, i64 columns) {
  add_columns(parts, bias, nullptr, count, columns, columns);
}
