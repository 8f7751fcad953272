// What tiles of either precision have in common: vectors of the instruction set that the file is compiled
// for, the exponential, rows by position, and the online softmax of a strip of queries.
//
// All in an unnamed namespace: each object has its own.
#pragma once

#include <cmath>
#include <cstring>

#include "attention_tiles.h"

#if defined(PHX_AVX512)
#include <immintrin.h>
#endif

namespace phx {
namespace {

#if defined(PHX_AVX512)
constexpr int kLanes = 16, kRows = 8, kAtOnce = 2;
#elif defined(PHX_AVX2)
constexpr int kLanes = 8, kRows = 4, kAtOnce = 1;
#else
constexpr int kLanes = 4, kRows = 2, kAtOnce = 1;
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

// NaN where one of them is.
PHX_INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most || v[i] != v[i] ? v[i] : most;
  return most;
}

// The same where none is.
PHX_INLINE float greatest(Vec v) {
#if defined(PHX_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return largest(v);
#endif
}

PHX_INLINE float total(Vec v) {
#if defined(PHX_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t narrowed(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Asks for the row that is read a few rows later: those of a piece may lie in a page each, which no hardware
// reads ahead.
inline void ask_ahead(const Rows &rows, bool bf16, const int32_t *positions, int64_t at, int64_t n, int64_t d) {
  constexpr int64_t kAhead = 8, kLine = 64;
  if (at + kAhead >= n) return;
  const int64_t bytes = bf16 ? sizeof(uint16_t) : sizeof(float);
  const char *row = static_cast<const char *>(rows.data) + positions[at + kAhead] * rows.stride * bytes;
  for (int64_t i = 0; i < d * bytes; i += kLine) __builtin_prefetch(row + i);
}

// `d` numbers times `scale`, then zeros up to `width`.
inline void read_row(const Rows &rows, bool bf16, int64_t position, int64_t d, int64_t width, float scale,
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

inline void write_row(const Rows &rows, bool bf16, int64_t position, int64_t d, const float *from) {
  if (bf16) {
    uint16_t *to = static_cast<uint16_t *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = narrowed(from[i]);
  } else {
    float *to = static_cast<float *>(rows.data) + position * rows.stride;
    for (int64_t i = 0; i < d; ++i) to[i] = from[i];
  }
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

  bool none() const {
    for (int64_t s = 0; s < kTile / kSub; ++s)
      if (!none(s)) return false;
    return true;
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
inline void mask(const Piece &piece, int64_t query, int64_t n, int64_t tile, int64_t begin, int64_t end,
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
inline void key_tiles(const Piece &piece, int64_t query, int64_t n, int64_t &begin, int64_t &end) {
  begin = INT64_MAX, end = 0;
  for (int64_t i = query; i < query + n; ++i) {
    if (piece.first[i] >= piece.end[i]) continue;
    begin = piece.first[i] < begin ? piece.first[i] : begin;
    end = piece.end[i] > end ? piece.end[i] : end;
  }
  begin = begin / kTile * kTile;
}

// Sets what a strip [kSub, kTile] does not see to zero.
PHX_INLINE void clear_outside(int64_t low, int64_t high, float *strip) {
  for (int64_t i = 0; i < kSub; ++i) {
    float *row = strip + i * kTile;
    for (int64_t j = 0; j < low; j += kLanes) store(row + j, Vec{});
    for (int64_t j = high; j < kTile; j += kLanes) store(row + j, Vec{});
  }
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
    float above = greatest(high);
    if (above == -INFINITY) above = largest(high);  // nothing seen, or nothing that is a number
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

// Rows of a block of queries times `scale`, [kTile, width] fp32; zeros past its last.
inline void read_queries(const Task &task, const Rows &rows, int64_t query, int64_t n, int64_t width,
                         float scale, float *to) {
  const int32_t *positions = task.piece.queries + query;
  for (int64_t i = 0; i < n; ++i) {
    ask_ahead(rows, task.bf16, positions, i, n, task.d);
    read_row(rows, task.bf16, positions[i], task.d, width, scale, to + i * width);
  }
  std::memset(to + n * width, 0, (kTile - n) * width * sizeof(float));
}

// The online softmax of a block before its first key: from nothing, or from what earlier pieces left.
inline void start_block(const Task &task, int64_t query, int64_t n, int64_t width, float *out, float *most,
                        float *sum) {
  std::memset(out, 0, kTile * width * sizeof(float));
  for (int64_t i = 0; i < kTile; ++i) {
    most[i] = -INFINITY, sum[i] = 0;
    if (i >= n || task.begins) continue;
    const int64_t position = task.piece.queries[query + i];
    ask_ahead(task.out, false, task.piece.queries + query, i, n, task.d);
    read_row(task.out, false, position, task.d, width, 1.0f, out + i * width);
    most[i] = task.lse[position];
    sum[i] = most[i] == -INFINITY ? 0.0f : 1.0f;
  }
}

// After its last: the output and the log-sum-exp.
inline void finish_block(const Task &task, int64_t query, int64_t n, int64_t width, float *out,
                         const float *most, const float *sum) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = task.piece.queries[query + i];
    const float share = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    for (int64_t j = 0; j < width; ++j) out[i * width + j] *= share;
    task.lse[position] = most[i] + std::log(sum[i]);
    write_row(task.out, task.bf16_results, position, task.d, out + i * width);
  }
}

// Each query's log-sum-exp, and the product of its output and its output's gradient; `row` is scratch of
// two rows.
inline void read_deltas(const Task &task, int64_t query, int64_t n, int64_t width, float *lse, float *delta,
                        float *row) {
  for (int64_t i = 0; i < kTile; ++i) {
    lse[i] = delta[i] = 0;
    if (i >= n) continue;
    const int64_t position = task.piece.queries[query + i];
    if (task.begins) {
      ask_ahead(task.out, task.bf16, task.piece.queries + query, i, n, task.d);
      read_row(task.out, task.bf16, position, task.d, width, 1.0f, row);
      read_row(task.grad_out, task.bf16, position, task.d, width, 1.0f, row + width);
      Vec sum = Vec{};
      for (int64_t j = 0; j < width; j += kLanes) sum += load(row + j) * load(row + width + j);
      task.delta[position] = total(sum);
    }
    delta[i] = task.delta[position];
    lse[i] = task.lse[position];
  }
}

// Writes the gradients of a block of queries, `grad` times the scale, or adds them to earlier pieces'.
inline void finish_grad_q(const Task &task, int64_t query, int64_t n, int64_t width, float *grad,
                          float *row) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = task.piece.queries[query + i];
    float *of = grad + i * width;
    for (int64_t j = 0; j < width; ++j) of[j] *= task.scale;
    if (!task.begins) {
      ask_ahead(task.grad_q, false, task.piece.queries + query, i, n, task.d);
      read_row(task.grad_q, false, position, task.d, width, 1.0f, row);
      for (int64_t j = 0; j < width; ++j) of[j] += row[j];
    }
    write_row(task.grad_q, task.bf16_results, position, task.d, of);
  }
}

}  // namespace
}  // namespace phx
