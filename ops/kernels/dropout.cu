// Masks of dropout by Philox4x32-10 (Salmon et al. 2011): the bits that the host would make, see
// ops/src/dropout.rs and configs/src/random.rs.

struct Words {
  u32 a, b, c, d;
};

PHX_DEVICE Words philox(u64 key, u32 a, u32 b, u32 c, u32 d) {
  u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const u64 low = static_cast<u64>(a) * 0xD2511F53u, high = static_cast<u64>(c) * 0xCD9E8D57u;
    const u32 old_b = b, old_d = d;
    a = static_cast<u32>(high >> 32) ^ old_b ^ k0;
    b = static_cast<u32>(high);
    c = static_cast<u32>(low >> 32) ^ old_d ^ k1;
    d = static_cast<u32>(low);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{a, b, c, d};
}

// mask[sample, i], [gridDim.y, width]: 0 where the word of element i is below `dropped_below`, else `kept`.
// A thread makes the four elements of a block of words.
template <typename T>
PHX_DEVICE void mask_rows(T *mask, i64 width, i64 seed, i64 step, i64 first_sample, i64 layer, i64 place,
                          i64 dropped_below, float kept) {
  const u64 sample = static_cast<u64>(first_sample) + blockIdx.y;
  const Words of_sample = philox(static_cast<u64>(seed), static_cast<u32>(step),
                                 static_cast<u32>(static_cast<u64>(step) >> 32), static_cast<u32>(sample),
                                 static_cast<u32>(sample >> 32));
  const u64 key = static_cast<u64>(of_sample.b) << 32 | of_sample.a;
  const u32 below = static_cast<u32>(dropped_below);
  T *row = mask + static_cast<i64>(blockIdx.y) * width;
  const i64 blocks = (width + 3) / 4, stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 block = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; block < blocks; block += stride) {
    const Words w = philox(key, static_cast<u32>(block), static_cast<u32>(static_cast<u64>(block) >> 32),
                           static_cast<u32>(layer), static_cast<u32>(place));
    const u32 words[4] = {w.a, w.b, w.c, w.d};
    for (int j = 0; j < 4 && block * 4 + j < width; ++j) put(row[block * 4 + j], words[j] < below ? 0.0f : kept);
  }
}

#define PHX_DROPOUT(T, name)                                                                              \
  PHX_KERNEL void dropout_##name(T *mask, i64 width, i64 seed, i64 step, i64 first_sample, i64 layer,     \
                                 i64 place, i64 dropped_below, float kept) {                              \
    mask_rows<T>(mask, width, seed, step, first_sample, layer, place, dropped_below, kept);               \
  }

PHX_DROPOUT(float, f32)
PHX_DROPOUT(bf16, bf16)
