// The CPU's matrix unit (AMX, bf16): product.h's promises for CPUs that have it. Includes no header that
// other objects share but the vectors of attention_strips.h, so that no instruction gets into those.
//
// A block of output is 32 x 32: four accumulators, two tiles of each factor. The right factor's lines are
// packed in panels of 32, a block of them at a time that fits into the second cache, in the order the unit
// reads them: pairs of numbers of 16 lines. The left factor's are read where they lie, if they can be, and
// else packed a panel at a time.

#include "product.h"

#if defined(__AMX_BF16__)

#include "amx.h"
#include "gelu.h"

namespace phx {
namespace {

constexpr int64_t kTileNumel = 16 * kTileDeep;       // of a tile
constexpr int64_t kBlockNumel = 3 << 18;             // of packed right lines: 1.5 MiB
constexpr int64_t kLeastDeep = 1024, kMostDeep = 2048;  // and where they are fp32

PHX_INLINE void put(const Lines lines, uint16_t *to) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kTileDeep, lines[i]);
}

// Up to 16 lines of up to 32 numbers that lie along; zeros for the rest.
PHX_INLINE void take_along(const uint16_t *from, int64_t stride, int64_t lines, int64_t deep, Lines to) {
  const __mmask32 mask = first_32(deep);
  for (int i = 0; i < 16; ++i)
    to[i] = i < lines ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
}

// Up to 32 lines of up to 32 numbers that lie across, as pairs: each of 16 pairs for the first 16 lines and
// for the second.
PHX_INLINE void take_across(const uint16_t *from, int64_t stride, int64_t lines, int64_t deep, Lines low,
                            Lines high) {
  const __mmask32 mask = first_32(lines);
  const __m512i zero = _mm512_setzero_si512();
  for (int i = 0; i < 16; ++i) {
    const uint16_t *pair = from + 2 * i * stride;
    const __m512i even = 2 * i < deep ? _mm512_maskz_loadu_epi16(mask, pair) : zero;
    const __m512i odd = 2 * i + 1 < deep ? _mm512_maskz_loadu_epi16(mask, pair + stride) : zero;
    low[i] = pairs(even, odd, 0);
    high[i] = pairs(even, odd, 16);
  }
}

Factor moved(const Factor &factor, int64_t line, int64_t deep) {
  const int64_t at = factor.along ? line * factor.stride + deep : line + deep * factor.stride;
  return {factor.data + at, factor.stride, factor.along};
}

// A panel of lines: for each 32 numbers two tiles, of 16 lines each, or `as_pairs` of 16 pairs for these lines.
void pack(const Factor &factor, int64_t lines, int64_t deep, bool as_pairs, uint16_t *to) {
  for (int64_t d = 0; d < deep; d += kTileDeep, to += 2 * kTileNumel) {
    const uint16_t *from = moved(factor, 0, d).data;
    Lines low, high;
    if (factor.along) {
      take_along(from, factor.stride, lines, deep - d, low);
      take_along(from + 16 * factor.stride, factor.stride, lines - 16, deep - d, high);
    } else {
      take_across(from, factor.stride, lines, deep - d, low, high);
    }
    if (factor.along == as_pairs) {
      turn(low);
      turn(high);
    }
    put(low, to);
    put(high, to + kTileNumel);
  }
}

// Two tiles of left lines, and where the next two are.
struct Left {
  const uint16_t *low, *high;
  int64_t row_bytes, next;
};

// One block of 32 x 32: over `tiles` tiles of each factor.
PHX_INLINE void multiply(Left left, const uint16_t *right, int64_t tiles, float *block) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(4, left.low, left.row_bytes);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileNumel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left.high, left.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    left.low += left.next;
    left.high += left.next;
    right += 2 * kTileNumel;
  }
  _tile_stored(0, block, 4 * kPanel);
  _tile_stored(1, block + 16, 4 * kPanel);
  _tile_stored(2, block + 16 * kPanel, 4 * kPanel);
  _tile_stored(3, block + 16 * kPanel + 16, 4 * kPanel);
}

// A row's next 16 numbers of bf16 out, and their GELU; or that of others, the numbers first times its slope there.
template <Gelu kKind>
PHX_INLINE void write_curved(const Output &out, int64_t at, __mmask16 mask, __m512 sum) {
  const Curve &curve = *out.curve;
  const __m256i x = curve.before ? _mm256_maskz_loadu_epi16(mask, curve.before + at) : rounded(sum);
  const Curved of_x = gelu<kKind>((Vec)wide(x));
  const __m256i half = curve.before ? rounded(_mm512_mul_ps(sum, (__m512)of_x.slope)) : x;
  _mm256_mask_storeu_epi16(out.half + at, mask, half);
  _mm256_mask_storeu_epi16(curve.after + at, mask, rounded((__m512)of_x.value));
}

PHX_INLINE void write(const Output &out, bool add, int64_t row, int64_t rows, int64_t col, int64_t cols,
                      const float *block) {
  for (int64_t side = 0; side < cols; side += 16) {
    const __mmask16 mask = first_16(cols - side);
    const uint16_t *bias = out.bias ? out.bias + col + side : nullptr;
    const __m512 shift = bias ? wide(_mm256_maskz_loadu_epi16(mask, bias)) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(block + i * kPanel + side), shift);
      const int64_t at = (row + i) * out.stride + col + side;
      if (out.curve) {
        out.curve->kind == Gelu::kTanh ? write_curved<Gelu::kTanh>(out, at, mask, sum)
                                       : write_curved<Gelu::kExact>(out, at, mask, sum);
      } else if (out.half) {
        _mm256_mask_storeu_epi16(out.half + at, mask, rounded(sum));
      } else {
        const __m512 before = add ? _mm512_maskz_loadu_ps(mask, out.full + at) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(out.full + at, mask, _mm512_add_ps(before, sum));
      }
    }
  }
}

// How many numbers are summed at once. fp32 sums can be taken up again, so that a wider block is used.
int64_t depth(const Product &product) {
  const int64_t all = rounded_up(product.deep, kTileDeep);
  if (product.out.half) return all;
  int64_t fits = kBlockNumel / rounded_up(product.cols, kPanel) / kTileDeep * kTileDeep;
  fits = fits < kLeastDeep ? kLeastDeep : fits > kMostDeep ? kMostDeep : fits;
  return least(all, fits);
}

// Numbers of each line of a panel that is packed, given how many are summed.
int64_t packed_deep(int64_t deep) { return rounded_up(deep, kTileDeep); }

// Of all right lines packed, where the panel that begins at column `col` has its numbers from `d` on.
int64_t packed_at(const Product &product, int64_t d, int64_t deep, int64_t col) {
  return d * rounded_up(product.cols, kPanel) + col * packed_deep(deep);
}

}  // namespace

bool amx_was_built() { return true; }

int64_t product_block(const Product &product) {
  const int64_t cols = kBlockNumel / depth(product) / kPanel * kPanel;
  return cols < kPanel ? kPanel : cols;
}

int64_t product_scratch(const Product &product, bool packed) {
  return (kPanel + (packed ? 0 : product_block(product))) * depth(product);
}

int64_t packed_numel(const Product &product) {
  return rounded_up(product.cols, kPanel) * packed_deep(product.deep);
}

void pack_panel(const Product &product, int64_t panel, uint16_t *packed) {
  const int64_t most = depth(product), col = panel * kPanel;
  for (int64_t d = 0; d < product.deep; d += most) {
    const int64_t deep = least(most, product.deep - d);
    pack(moved(product.right, col, d), least(kPanel, product.cols - col), deep, /*as_pairs=*/true,
         packed + packed_at(product, d, deep, col));
  }
}

void product(const Product &product, const Part &part, const uint16_t *packed, uint16_t *scratch) {
  const Shape shape;
  _tile_loadconfig(&shape);
  alignas(64) float block[kPanel * kPanel];
  const int64_t most = depth(product), across = product_block(product);
  uint16_t *left = scratch, *own = scratch + kPanel * most;
  for (int64_t d = 0; d < product.deep; d += most) {
    const int64_t deep = least(most, product.deep - d), tiles = packed_deep(deep) / kTileDeep;
    const bool as_it_lies = product.left.along && deep % kTileDeep == 0;
    for (int64_t first = part.col_begin; first < part.col_end; first += across) {
      const int64_t end = least(first + across, part.col_end);
      for (int64_t j = first; j < end && !packed; j += kPanel)
        pack(moved(product.right, j, d), least(kPanel, end - j), deep, /*as_pairs=*/true,
             own + (j - first) * packed_deep(deep));
      const uint16_t *right = packed ? packed + packed_at(product, d, deep, first) : own;
      for (int64_t i = part.row_begin; i < part.row_end; i += kPanel) {
        const int64_t rows = least(kPanel, part.row_end - i);
        const Factor lines = moved(product.left, i, d);
        Left from{left, left + kTileNumel, 64, 2 * kTileNumel};
        if (as_it_lies && rows == kPanel) {
          from = {lines.data, lines.data + 16 * lines.stride, 2 * lines.stride, kTileDeep};
        } else {
          pack(lines, rows, deep, /*as_pairs=*/false, left);
        }
        for (int64_t j = first; j < end; j += kPanel) {
          multiply(from, right + (j - first) * packed_deep(deep), tiles, block);
          write(product.out, product.out.add || d > 0, i, rows, j, least(kPanel, end - j), block);
        }
      }
    }
  }
  _tile_release();
}

double cross_entropy_row(uint16_t *logits, int64_t n, int64_t padded, int64_t target, float scale) {
  const auto at = [&](int64_t i) { return wide(_mm256_loadu_si256((const __m256i *)(logits + i))); };
  const auto tail = [&](int64_t i, __m512 rest) {
    const __mmask16 mask = first_16(n - i);
    return _mm512_mask_blend_ps(mask, rest, wide(_mm256_maskz_loadu_epi16(mask, logits + i)));
  };
  const int64_t whole = n / 64 * 64;
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 high[4] = {lowest, lowest, lowest, lowest}, sum[4] = {};
  for (int64_t i = 0; i < whole; i += 64)
    for (int k = 0; k < 4; ++k) high[k] = _mm512_max_ps(high[k], at(i + 16 * k));
  for (int64_t i = whole; i < n; i += 16) high[0] = _mm512_max_ps(high[0], tail(i, lowest));
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(high[0], high[1]),
                                                        _mm512_max_ps(high[2], high[3])));
  const auto power = [](__m512 x, float over) { return (__m512)exponential((Vec)_mm512_sub_ps(x, _mm512_set1_ps(over))); };
  for (int64_t i = 0; i < whole; i += 64)
    for (int k = 0; k < 4; ++k) sum[k] = _mm512_add_ps(sum[k], power(at(i + 16 * k), most));
  for (int64_t i = whole; i < n; i += 16) sum[0] = _mm512_add_ps(sum[0], power(tail(i, lowest), most));
  const double total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]),
                                                          _mm512_add_ps(sum[2], sum[3])));
  const double lse = most + std::log(total), loss = lse - widened(logits[target]);
  const __m512 factor = _mm512_set1_ps(scale);
  const auto grad = [&](__m512 x) { return _mm512_mul_ps(power(x, static_cast<float>(lse)), factor); };
  const float seen = (std::exp(static_cast<float>(widened(logits[target]) - lse)) - 1.0f) * scale;
  for (int64_t i = 0; i < whole; i += 16) _mm256_storeu_si256((__m256i *)(logits + i), rounded(grad(at(i))));
  for (int64_t i = whole; i < padded; i += 16)
    _mm256_mask_storeu_epi16(logits + i, first_16(padded - i), rounded(grad(tail(i, lowest))));
  logits[target] = narrowed(seen);
  return loss;
}

void add_column_sums(const uint16_t *x, int64_t stride, int64_t rows, int64_t cols, float *sums) {
  for (int64_t col = 0; col < cols; col += 32) {
    const __mmask16 low = first_16(cols - col), high = first_16(cols - col - 16);
    __m512 a = _mm512_setzero_ps(), b = a;
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t *row = x + i * stride + col;
      a = _mm512_add_ps(a, wide(_mm256_maskz_loadu_epi16(low, row)));
      b = _mm512_add_ps(b, wide(_mm256_maskz_loadu_epi16(high, row + 16)));
    }
    _mm512_mask_storeu_ps(sums + col, low, _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, sums + col)));
    _mm512_mask_storeu_ps(sums + col + 16, high, _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, sums + col + 16)));
  }
}

}  // namespace phx

#else

namespace phx {

bool amx_was_built() { return false; }
int64_t product_block(const Product &) { return kPanel; }
int64_t product_scratch(const Product &, bool) { return 0; }
int64_t packed_numel(const Product &) { return 0; }
void pack_panel(const Product &, int64_t, uint16_t *) { __builtin_trap(); }
void product(const Product &, const Part &, const uint16_t *, uint16_t *) { __builtin_trap(); }
double cross_entropy_row(uint16_t *, int64_t, int64_t, int64_t, float) { __builtin_trap(); }
void add_column_sums(const uint16_t *, int64_t, int64_t, int64_t, float *) { __builtin_trap(); }

}  // namespace phx

#endif
