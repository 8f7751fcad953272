// Attention in tiles of 64 queries and 64 keys, online softmax (Milakov & Gimelshein 2018, Dao et al.
// 2022): no matrix of T x T. Knows no pattern: a query sees the keys from `first` to `end`.
//
// Compiled once for each instruction set; includes nothing that other objects might share. All sums are
// fp32, in an order that depends on the task alone.

#include "attention_tiles.h"

#include <cmath>
#include <cstring>

namespace phx {
namespace {

#if defined(PHX_AVX512)
constexpr int kLanes = 16, kRows = 8;
#elif defined(PHX_AVX2)
constexpr int kLanes = 8, kRows = 4;
#else
constexpr int kLanes = 4, kRows = 2;
#endif
constexpr int kColumns = 16;                  // of a register block: all that is computed comes in these
constexpr int kVectors = kColumns / kLanes;   // of a row of it
constexpr int64_t kSub = 16;                  // queries of a strip: what no query of it sees is skipped

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#define PHX_INLINE inline __attribute__((always_inline))

PHX_INLINE Vec load(const float *p) { return *reinterpret_cast<const Vec *>(p); }
PHX_INLINE void store(float *p, Vec v) { *reinterpret_cast<Vec *>(p) = v; }
PHX_INLINE Vec splat(float x) { return x - Vec{}; }

// C[kRows, 16] (+)= A[kRows, depth] B[depth, 16]; A's element (i, k) is at a[i * row + k * col].
template <bool kAdd>
PHX_INLINE void block(int64_t depth, const float *a, int64_t row, int64_t col, const float *b,
                      int64_t ldb, float *c, int64_t ldc) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = kAdd ? load(c + i * ldc + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = splat(a[i * row + k * col]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

// C[kSub, n] (+)= A[kSub, depth] B[depth, n], n a multiple of 16.
template <bool kAdd>
PHX_INLINE void product(int64_t n, int64_t depth, const float *a, int64_t row, int64_t col,
                        const float *b, int64_t ldb, float *c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kColumns)
    for (int64_t i = 0; i < kSub; i += kRows)
      block<kAdd>(depth, a + i * row, row, col, b + j, ldb, c + i * ldc + j, ldc);
}

// e^x to about 2 ulp; 0 below -87, where it is tiny; NaN stays NaN. x is at most about 0.
PHX_INLINE Vec exponential(Vec x) {
  const Vec low = splat(-87.0f);
  const Vec inside = x < low ? low : x;
  const Vec shifted = inside * splat(1.44269504088896341f) + splat(12582912.0f);
  const Vec n = shifted - splat(12582912.0f);
  Vec r = inside - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const Ints scaled = reinterpret_cast<Ints &>(p) + (reinterpret_cast<const Ints &>(shifted) << 23);
  p = reinterpret_cast<const Vec &>(scaled);
  return x < low ? Vec{} : p;
}

PHX_INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most || v[i] != v[i] ? v[i] : most;
  return most;
}

PHX_INLINE float total(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t narrowed(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// `d` numbers times `scale`, then zeros up to `width`.
void read_row(const Rows &rows, bool bf16, int64_t position, int64_t d, int64_t width, float scale,
              float *to) {
  if (bf16) {
    const uint16_t *from = static_cast<const uint16_t *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = widened(from[i]) * scale;
  } else {
    const float *from = static_cast<const float *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = from[i] * scale;
  }
  for (int64_t i = d; i < width; ++i) to[i] = 0;
}

void write_row(const Rows &rows, bool bf16, int64_t position, int64_t d, const float *from) {
  if (bf16) {
    uint16_t *to = static_cast<uint16_t *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = narrowed(from[i]);
  } else {
    float *to = static_cast<float *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = from[i];
  }
}

// A task's keys and values, tile after tile: as rows [kTile, width], or turned over [width, kTile].
struct Packed {
  int64_t width, begin;
  float *tile(float *all, int64_t key) const { return all + (key - begin) * width; }
};

// Copies the rows of keys of a task; those past the piece's last are zeros.
void pack_rows(const Task &task, const Rows &rows, int64_t width, float *to) {
  for (int64_t key = task.key_begin; key < task.key_end; ++key, to += width) {
    if (key < task.piece.n_keys) {
      read_row(rows, task.bf16, task.piece.keys[key], task.d, width, 1.0f, to);
    } else {
      std::memset(to, 0, width * sizeof(float));
    }
  }
}

// Tiles [kTile, width] turned over, each in its place: [width, kTile].
void turn_over(int64_t tiles, int64_t width, const float *from, float *to) {
  for (int64_t tile = 0; tile < tiles; ++tile, from += kTile * width, to += kTile * width)
    for (int64_t i = 0; i < width; i += 8)
      for (int64_t key = 0; key < kTile; key += 8)
        for (int64_t x = 0; x < 8; ++x)
          for (int64_t y = 0; y < 8; ++y) to[(i + x) * kTile + key + y] = from[(key + y) * width + i + x];
}

// Which keys of a tile the strips of a block see, in whole register blocks: [begin, end) of each.
struct Strips {
  int64_t begin[kTile / kSub], end[kTile / kSub];

  // `tile` is the number of the tile's first key; rows past the block's see nothing.
  Strips(const Piece &piece, int64_t first_query, int64_t n, int64_t tile) {
    for (int64_t s = 0; s < kTile / kSub; ++s) {
      int64_t low = kTile, high = 0;
      for (int64_t i = s * kSub; i < (s + 1) * kSub && i < n; ++i) {
        int64_t from, to;
        seen(piece, first_query + i, tile, from, to);
        if (from >= to) continue;
        low = from < low ? from : low;
        high = to > high ? to : high;
      }
      begin[s] = low / kColumns * kColumns;
      end[s] = (high + kColumns - 1) / kColumns * kColumns;
    }
  }

  bool none(int64_t s) const { return begin[s] >= end[s]; }

  // The keys of the tile that a query sees.
  static void seen(const Piece &piece, int64_t query, int64_t tile, int64_t &from, int64_t &to) {
    from = piece.first[query] - tile;
    to = piece.end[query] - tile;
    from = from < 0 ? 0 : from;
    to = to > kTile ? kTile : to;
  }
};

// Sets what a strip's queries do not see of [begin, end) to `value`.
void mask(const Piece &piece, int64_t query, int64_t n, int64_t tile, int64_t begin, int64_t end,
          float value, float *scores) {
  for (int64_t i = 0; i < kSub; ++i) {
    float *row = scores + i * kTile;
    int64_t from = end, to = end;
    if (i < n) {
      Strips::seen(piece, query + i, tile, from, to);
      from = from < to ? from : end;
    }
    for (int64_t j = begin; j < from; ++j) row[j] = value;
    for (int64_t j = to > begin ? to : begin; j < end; ++j) row[j] = value;
  }
}

// The keys that a block sees, as whole tiles.
void key_tiles(const Piece &piece, int64_t query, int64_t n, int64_t &begin, int64_t &end) {
  begin = INT64_MAX, end = 0;
  for (int64_t i = query; i < query + n; ++i) {
    if (piece.first[i] >= piece.end[i]) continue;
    begin = piece.first[i] < begin ? piece.first[i] : begin;
    end = piece.end[i] > end ? piece.end[i] : end;
  }
  begin = begin / kTile * kTile;
}

// One step of the online softmax of a strip: scores become probabilities with the new maximum.
PHX_INLINE void soften(int64_t begin, int64_t end, int64_t width, float *scores, float *most,
                       float *sum, float *out) {
  for (int64_t i = 0; i < kSub; ++i) {
    float *row = scores + i * kTile;
    Vec high = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) {
      const Vec x = load(row + j);
      high = x > high ? x : high;
    }
    const float above = largest(high);
    const float before = most[i];
    const float now = above > before || above != above ? above : before;
    if (now == -INFINITY) {  // nothing seen yet
      for (int64_t j = begin; j < end; ++j) row[j] = 0;
      continue;
    }
    Vec added = Vec{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exponential(load(row + j) - splat(now));
      store(row + j, p);
      added += p;
    }
    if (now != before) {
      const float kept = std::exp(before - now);
      sum[i] *= kept;
      for (int64_t j = 0; j < width; j += kLanes) store(out + i * width + j, load(out + i * width + j) * splat(kept));
      most[i] = now;
    }
    sum[i] += total(added);
  }
}

void forward_block(const Task &task, int64_t block, const Packed &packed, float *keys, float *values,
                   float *scratch) {
  const Piece &piece = task.piece;
  const int64_t query = piece.blocks[block], n = piece.blocks[block + 1] - query, width = packed.width;
  float *q = scratch, *out = q + kTile * width, *scores = out + kTile * width;
  float *most = scores + kSub * kTile, *sum = most + kTile;
  for (int64_t i = 0; i < kTile; ++i) {
    most[i] = -INFINITY, sum[i] = 0;
    if (i >= n || task.begins) std::memset(out + i * width, 0, width * sizeof(float));
    if (i >= n) {
      std::memset(q + i * width, 0, width * sizeof(float));
      continue;
    }
    const int64_t position = piece.queries[query + i];
    read_row(task.q, task.bf16, position, task.d, width, task.scale, q + i * width);
    if (!task.begins) {
      read_row(task.out, false, position, task.d, width, 1.0f, out + i * width);
      most[i] = task.lse[position];
      sum[i] = most[i] == -INFINITY ? 0.0f : 1.0f;
    }
  }
  int64_t begin, end;
  key_tiles(piece, query, n, begin, end);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Strips strips(piece, query, n, tile);
    for (int64_t s = 0; s < kTile / kSub; ++s) {
      if (strips.none(s)) continue;
      const int64_t low = strips.begin[s], high = strips.end[s], first = s * kSub;
      product<false>(high - low, width, q + first * width, width, 1, packed.tile(keys, tile) + low, kTile,
                     scores + low, kTile);
      mask(piece, query + first, n - first, tile, low, high, -INFINITY, scores);
      soften(low, high, width, scores, most + first, sum + first, out + first * width);
      product<true>(width, high - low, scores + low, kTile, 1, packed.tile(values, tile) + low * width,
                    width, out + first * width, width);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = piece.queries[query + i];
    float *row = out + i * width;
    const float share = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    for (int64_t j = 0; j < width; ++j) row[j] *= share;
    task.lse[position] = most[i] + std::log(sum[i]);
    write_row(task.out, task.bf16_results, position, task.d, row);
  }
}

void forward(const Task &task, float *scratch) {
  const Packed packed{padded(task.d), task.key_begin};
  const int64_t span = (task.key_end - task.key_begin) * packed.width;
  float *keys = scratch, *values = keys + span, *rest = values + span;
  pack_rows(task, task.k, packed.width, values);
  turn_over((task.key_end - task.key_begin) / kTile, packed.width, values, keys);
  pack_rows(task, task.v, packed.width, values);
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    forward_block(task, block, packed, keys, values, rest);
}

// What backward keeps of a block of queries, all of it [kTile, width] or [kTile].
struct Queries {
  float *q, *grad_out, *grad_q, *lse, *delta;
};

Queries read_queries(const Task &task, int64_t query, int64_t n, int64_t width, float *scratch) {
  const int64_t size = kTile * width;
  Queries to{scratch, scratch + size, scratch + 2 * size, scratch + 4 * size, scratch + 4 * size + kTile};
  float *out = scratch + 3 * size;
  std::memset(to.grad_q, 0, size * sizeof(float));
  for (int64_t i = 0; i < kTile; ++i) {
    to.lse[i] = to.delta[i] = 0;
    if (i >= n) {
      std::memset(to.q + i * width, 0, width * sizeof(float));
      std::memset(to.grad_out + i * width, 0, width * sizeof(float));
      continue;
    }
    const int64_t position = task.piece.queries[query + i];
    read_row(task.q, task.bf16, position, task.d, width, task.scale, to.q + i * width);
    read_row(task.grad_out, task.bf16, position, task.d, width, 1.0f, to.grad_out + i * width);
    read_row(task.out, task.bf16, position, task.d, width, 1.0f, out);
    Vec delta = Vec{};
    for (int64_t j = 0; j < width; j += kLanes) delta += load(out + j) * load(to.grad_out + i * width + j);
    to.delta[i] = total(delta);
    to.lse[i] = task.lse[position];
  }
  return to;
}

// Scores and the probabilities' gradients of a strip become probabilities and the scores' gradients.
PHX_INLINE void harden(int64_t begin, int64_t end, const float *lse, const float *delta, float *scores,
                       float *grads) {
  for (int64_t i = 0; i < kSub; ++i) {
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exponential(load(scores + i * kTile + j) - splat(lse[i]));
      store(scores + i * kTile + j, p);
      store(grads + i * kTile + j, p * (load(grads + i * kTile + j) - splat(delta[i])));
    }
  }
}

struct Span {
  Packed packed;
  float *keys, *turned_keys, *turned_values;
};

// Adds what a tile of keys gets from a block of queries: strips of 16 keys, each from the queries between
// the first and the last strip that see any of them.
void key_gradients(const Task &task, const Span &span, const Strips &strips, int64_t tile,
                   const Queries &queries, const float *p, const float *ds) {
  const int64_t width = span.packed.width;
  for (int64_t key = 0; key < kTile; key += kSub) {
    int64_t from = kTile, to = 0;
    for (int64_t s = 0; s < kTile / kSub; ++s) {
      if (strips.none(s) || strips.begin[s] >= key + kSub || strips.end[s] <= key) continue;
      from = s * kSub < from ? s * kSub : from;
      to = (s + 1) * kSub;
    }
    if (from >= to) continue;
    const int64_t at = (tile + key - task.key_begin) * width;
    product<true>(width, to - from, p + from * kTile + key, 1, kTile, queries.grad_out + from * width,
                  width, task.grad_v + at, width);
    product<true>(width, to - from, ds + from * kTile + key, 1, kTile, queries.q + from * width, width,
                  task.grad_k + at, width);
  }
}

void backward_block(const Task &task, int64_t block, const Span &span, float *scratch) {
  const Piece &piece = task.piece;
  const int64_t query = piece.blocks[block], n = piece.blocks[block + 1] - query;
  const int64_t width = span.packed.width;
  float *p = scratch, *ds = p + kTile * kTile;
  const Queries queries = read_queries(task, query, n, width, ds + kTile * kTile);
  int64_t begin, end;
  key_tiles(piece, query, n, begin, end);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Strips strips(piece, query, n, tile);
    std::memset(p, 0, 2 * kTile * kTile * sizeof(float));
    for (int64_t s = 0; s < kTile / kSub; ++s) {
      if (strips.none(s)) continue;
      const int64_t low = strips.begin[s], high = strips.end[s], first = s * kSub;
      float *scores = p + first * kTile, *grads = ds + first * kTile;
      product<false>(high - low, width, queries.q + first * width, width, 1,
                     span.packed.tile(span.turned_keys, tile) + low, kTile, scores + low, kTile);
      product<false>(high - low, width, queries.grad_out + first * width, width, 1,
                     span.packed.tile(span.turned_values, tile) + low, kTile, grads + low, kTile);
      mask(piece, query + first, n - first, tile, low, high, -INFINITY, scores);
      harden(low, high, queries.lse + first, queries.delta + first, scores, grads);
      product<true>(width, high - low, grads + low, kTile, 1,
                    span.packed.tile(span.keys, tile) + low * width, width, queries.grad_q + first * width,
                    width);
    }
    key_gradients(task, span, strips, tile, queries, p, ds);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = piece.queries[query + i];
    float *row = queries.grad_q + i * width, *before = p;
    for (int64_t j = 0; j < width; ++j) row[j] *= task.scale;
    if (!task.begins) {
      read_row(task.grad_q, false, position, task.d, width, 1.0f, before);
      for (int64_t j = 0; j < width; ++j) row[j] += before[j];
    }
    write_row(task.grad_q, task.bf16_results, position, task.d, row);
  }
}

void backward(const Task &task, float *scratch) {
  const Packed packed{padded(task.d), task.key_begin};
  const int64_t keys = task.key_end - task.key_begin, numel = keys * packed.width;
  const Span span{packed, scratch, scratch + numel, scratch + 2 * numel};
  pack_rows(task, task.v, packed.width, span.keys);
  turn_over(keys / kTile, packed.width, span.keys, span.turned_values);
  pack_rows(task, task.k, packed.width, span.keys);
  turn_over(keys / kTile, packed.width, span.keys, span.turned_keys);
  std::memset(task.grad_k, 0, numel * sizeof(float));
  std::memset(task.grad_v, 0, numel * sizeof(float));
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    backward_block(task, block, span, scratch + 3 * numel);
}

}  // namespace

#if defined(PHX_AVX512)
const Kernels attention_avx512 = {forward, backward};
#elif defined(PHX_AVX2)
const Kernels attention_avx2 = {forward, backward};
#else
const Kernels attention_plain = {forward, backward};
#endif

}  // namespace phx
