// What the kernels share: numbers in two precisions, read and written several at a time, and sums over a
// block and over blocks. Every sum is taken in one order that the launch fixes, so results repeat bit by bit.

struct bf16 {
  u16 bits;
};

PHX_DEVICE float as_float(float x) { return x; }
PHX_DEVICE float as_float(bf16 x) { return float_of(static_cast<u32>(x.bits) << 16); }

PHX_DEVICE void put(float &to, float x) { to = x; }
PHX_DEVICE void put(bf16 &to, float x) { to.bits = rounded_to_bf16(x); }

// V numbers that are read and written at once: 16 bytes where V is more than one.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

template <int V, typename T>
PHX_DEVICE Pack<T, V> read(const T *from) {
  return *reinterpret_cast<const Pack<T, V> *>(from);
}

template <int V, typename T>
PHX_DEVICE void write(T *to, const Pack<T, V> &pack) {
  *reinterpret_cast<Pack<T, V> *>(to) = pack;
}

// One value of each warp of a block, 32 at most.
PHX_DEVICE float *of_warps() {
  __shared__ float values[32];
  return values;
}

// The sum over the threads of a block, the same bits in each. All of them call it.
PHX_DEVICE float block_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  float *warps = of_warps();
  __syncthreads();  // the sum before has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (u32 warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
  return sum;
}

// The largest of a block's values, in each of its threads; of a NaN and a number, the number.
PHX_DEVICE float block_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, from_lane_xor(x, mask));
  float *warps = of_warps();
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float most = warps[0];
  for (u32 warp = 1; warp < blockDim.x / 32; ++warp) most = fmaxf(most, warps[warp]);
  return most;
}

// Adds the sums of the columns of `parts`, [count, columns] fp32, to `first`, which takes `split` of them,
// and to `second`, which takes the others. Blocks of 256: 32 columns, each in eight parts.
PHX_DEVICE void add_columns(const float *parts, float *first, float *second, i64 count, i64 columns,
                            i64 split) {
  __shared__ float sums[8][32];
  const u32 lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const i64 column = static_cast<i64>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (column < columns) {
    for (i64 row = part; row < count; row += 8) sum += parts[row * columns + column];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= columns) return;
  float total = 0;
  for (int i = 0; i < 8; ++i) total += sums[i][lane];
  if (column < split) {
    first[column] += total;
  } else {
    second[column - split] += total;
  }
}
