// Residual addition and layer norm (Ba et al. 2016), and their backward with the residual's join.
//
// A row to a block. Sums are fp32. Rows are [rows, width], `width` a multiple of V.

// sum = x + y, or x where there is no y (sum is then not written); out = (sum - mean) / sqrt(variance +
// eps) * gamma + beta. The mean and the reciprocal root are kept for backward, [rows] fp32.
template <typename T, int V>
PHX_DEVICE void forward_rows(const T *x, const T *y, const T *gamma, const T *beta, T *sum, T *out,
                             float *mean_out, float *rstd_out, i64 rows, i64 width, float eps) {
  const i64 begin = static_cast<i64>(threadIdx.x) * V, step = static_cast<i64>(blockDim.x) * V;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const i64 at = row * width;
    const T *of_row = (y != nullptr ? sum : x) + at;
    float total = 0;
    for (i64 i = begin; i < width; i += step) {
      Pack<T, V> a = read<V>(x + at + i);
      if (y != nullptr) {
        const Pack<T, V> b = read<V>(y + at + i);
        for (int j = 0; j < V; ++j) put(a.values[j], as_float(a.values[j]) + as_float(b.values[j]));
        write<V>(sum + at + i, a);
      }
      for (int j = 0; j < V; ++j) total += as_float(a.values[j]);
    }
    const float mean = block_sum(total) / static_cast<float>(width);
    float squares = 0;
    for (i64 i = begin; i < width; i += step) {
      const Pack<T, V> a = read<V>(of_row + i);
      for (int j = 0; j < V; ++j) {
        const float off = as_float(a.values[j]) - mean;
        squares += off * off;
      }
    }
    const float rstd = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + eps);
    for (i64 i = begin; i < width; i += step) {
      const Pack<T, V> a = read<V>(of_row + i), g = read<V>(gamma + i), b = read<V>(beta + i);
      Pack<T, V> o;
      for (int j = 0; j < V; ++j) {
        const float normal = (as_float(a.values[j]) - mean) * rstd;
        put(o.values[j], normal * as_float(g.values[j]) + as_float(b.values[j]));
      }
      write<V>(out + at + i, o);
    }
    if (threadIdx.x == 0) {
      mean_out[row] = mean;
      rstd_out[row] = rstd;
    }
  }
}

// grad = the gradient of the sum: that through the norm, from `grad_out`, and what else arrives there,
// `grad_sum`, if anything does. parts, [gridDim.x, 2, width] fp32, gets each block's sums for gamma and
// for beta. Shared memory: 2 * width floats, element j of pack p at j * packs + p, so that neighbouring
// threads have neighbouring banks; each is one thread's own.
template <typename T, int V>
PHX_DEVICE void backward_rows(const T *grad_out, const T *grad_sum, const T *sum, const T *gamma,
                              const float *means, const float *rstds, T *grad, float *parts, i64 rows,
                              i64 width) {
  PHX_DYNAMIC_SHARED(float, columns);
  const i64 packs = width / V, begin = threadIdx.x, step = blockDim.x;
  float *gammas = columns, *betas = columns + width;
  for (i64 p = begin; p < packs; p += step) {
    for (int j = 0; j < V; ++j) gammas[j * packs + p] = betas[j * packs + p] = 0;
  }
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const i64 at = row * width;
    const float mean = means[row], rstd = rstds[row];
    float along_one = 0, along_normal = 0;
    for (i64 p = begin; p < packs; p += step) {
      const Pack<T, V> d = read<V>(grad_out + at + p * V), s = read<V>(sum + at + p * V),
                       g = read<V>(gamma + p * V);
      for (int j = 0; j < V; ++j) {
        const float arrives = as_float(d.values[j]), normal = (as_float(s.values[j]) - mean) * rstd;
        gammas[j * packs + p] += arrives * normal;
        betas[j * packs + p] += arrives;
        along_one += arrives * as_float(g.values[j]);
        along_normal += arrives * as_float(g.values[j]) * normal;
      }
    }
    along_one = block_sum(along_one) / static_cast<float>(width);
    along_normal = block_sum(along_normal) / static_cast<float>(width);
    for (i64 p = begin; p < packs; p += step) {
      const Pack<T, V> d = read<V>(grad_out + at + p * V), s = read<V>(sum + at + p * V),
                       g = read<V>(gamma + p * V);
      Pack<T, V> joined;
      if (grad_sum != nullptr) joined = read<V>(grad_sum + at + p * V);
      for (int j = 0; j < V; ++j) {
        const float normal = (as_float(s.values[j]) - mean) * rstd;
        const float through =
            rstd * (as_float(d.values[j]) * as_float(g.values[j]) - along_one - normal * along_normal);
        const float beside = grad_sum != nullptr ? as_float(joined.values[j]) : 0.0f;
        put(joined.values[j], through + beside);
      }
      write<V>(grad + at + p * V, joined);
    }
  }
  float *own = parts + static_cast<i64>(blockIdx.x) * 2 * width;
  for (i64 p = begin; p < packs; p += step) {
    for (int j = 0; j < V; ++j) {
      own[p * V + j] = gammas[j * packs + p];
      own[width + p * V + j] = betas[j * packs + p];
    }
  }
}

#define PHX_NORM(T, name, V)                                                                               \
  PHX_KERNEL void norm_forward_##name(const T *x, const T *y, const T *gamma, const T *beta, T *sum,       \
                                      T *out, float *mean, float *rstd, i64 rows, i64 width, float eps) {  \
    forward_rows<T, V>(x, y, gamma, beta, sum, out, mean, rstd, rows, width, eps);                         \
  }                                                                                                        \
  PHX_KERNEL void norm_backward_##name(const T *grad_out, const T *grad_sum, const T *sum, const T *gamma, \
                                       const float *means, const float *rstds, T *grad, float *parts,      \
                                       i64 rows, i64 width) {                                              \
    backward_rows<T, V>(grad_out, grad_sum, sum, gamma, means, rstds, grad, parts, rows, width);           \
  }

PHX_NORM(float, f32x1, 1)
PHX_NORM(float, f32x4, 4)
PHX_NORM(bf16, bf16x1, 1)
PHX_NORM(bf16, bf16x8, 8)

PHX_KERNEL void norm_columns(const float *parts, float *gamma, float *beta, i64 count, i64 columns, i64 split) {
  add_columns(parts, gamma, beta, count, columns, split);
}
