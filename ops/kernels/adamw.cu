// The AdamW update of flat fp32 buffers (Loshchilov & Hutter 2019), with the weights rounded to bf16 in the
// same pass, and sums of squares by chunks. Compiled without contraction: each number goes through the same
// correctly rounded operations as in csrc/optimizer.cpp, and has the same bits.

PHX_KERNEL void adamw(float *param, const float *grad, float *exp_avg, float *exp_avg_sq, bf16 *weights, i64 n,
                      float grad_scale, float keep, float beta1, float rest1, float beta2, float rest2,
                      float step_size, float root_scale, float eps) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const float g = grad[i] * grad_scale;
    const float m = beta1 * exp_avg[i] + rest1 * g;
    const float v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    const float p = keep * param[i] - step_size * (m / (sqrtf(v) * root_scale + eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = p;
    if (weights != nullptr) put(weights[i], p);
  }
}

// sums[c] = the sum of squares of chunk c of `chunk` elements, the last one shorter, in f64. Blocks of 128: eight
// chunks of sixteen lanes; lane l adds up the elements l, l + 16 and so on.
PHX_KERNEL void chunk_squares(const float *x, double *sums, i64 n, i64 chunk) {
  __shared__ double lanes[8][16];
  const u32 lane = threadIdx.x % 16, of_block = threadIdx.x / 16;
  const i64 number = static_cast<i64>(blockIdx.x) * 8 + of_block, start = number * chunk;
  const i64 end = start + chunk < n ? start + chunk : n;
  double sum = 0;
  for (i64 i = start + lane; i < end; i += 16) {
    const double value = x[i];
    sum += value * value;
  }
  lanes[of_block][lane] = sum;
  __syncthreads();
  if (lane != 0 || start >= n) return;
  double total = 0;
  for (int i = 0; i < 16; ++i) total += lanes[of_block][i];
  sums[number] = total;
}
