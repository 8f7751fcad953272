// Attention in tiles of 64 queries and 64 keys, online softmax (Milakov & Gimelshein 2018, Dao et al.
// 2022): no matrix of T x T. Knows no pattern: a query sees the keys from `first` to `end`.
//
// Compiled once for each instruction set; includes nothing that other objects might share. All sums are
// fp32, in an order that depends on the task alone.

#include <utility>

#include "attention_strips.h"

namespace phx {
namespace {

// C[kRows, 16 kBlocks] (+)= A[kRows, depth] B[depth, 16 kBlocks]; A's element (i, k) is at a[i * row + k * col].
template <bool kAdd, int kBlocks>
PHX_INLINE void block(int64_t depth, const float *a, int64_t row, int64_t col, const float *b,
                      int64_t ldb, float *c, int64_t ldc) {
  constexpr int kWide = kBlocks * kVectors;
  Vec sum[kRows][kWide];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[i][j] = kAdd ? load(c + i * ldc + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = splat(a[i * row + k * col]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

// C[kSub, n] (+)= A[kSub, depth] B[depth, n], n a multiple of 16; kAtOnce blocks of 16 columns at a time, then what is
// left one by one.
template <bool kAdd>
PHX_INLINE void product(int64_t n, int64_t depth, const float *a, int64_t row, int64_t col,
                        const float *b, int64_t ldb, float *c, int64_t ldc) {
  int64_t j = 0;
  for (; kAtOnce > 1 && j + kAtOnce * kColumns <= n; j += kAtOnce * kColumns)
    for (int64_t i = 0; i < kSub; i += kRows)
      block<kAdd, kAtOnce>(depth, a + i * row, row, col, b + j, ldb, c + i * ldc + j, ldc);
  for (; j < n; j += kColumns)
    for (int64_t i = 0; i < kSub; i += kRows)
      block<kAdd, 1>(depth, a + i * row, row, col, b + j, ldb, c + i * ldc + j, ldc);
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
      ask_ahead(rows, task.bf16, task.piece.keys, key, task.piece.n_keys, task.d);
      read_row(rows, task.bf16, task.piece.keys[key], task.d, width, 1.0f, to);
    } else {
      std::memset(to, 0, width * sizeof(float));
    }
  }
}

// Numbers of two rows, those of the second counted on from the first's.
template <int... kFrom>
PHX_INLINE Vec picked(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Ints{kFrom...});  // GCC has the other from version 12 on
#endif
}

// Two rows whose blocks of `kStep` columns change places.
template <int kStep, int... kLane>
PHX_INLINE void exchange(Vec &a, Vec &b, std::integer_sequence<int, kLane...>) {
  const Vec low = picked<(kLane & kStep ? kLanes + kLane - kStep : kLane)...>(a, b);
  b = picked<(kLane & kStep ? kLanes + kLane : kLane + kStep)...>(a, b);
  a = low;
}

// [kLanes, kLanes] turned over: blocks of half the rows, then halves of those.
template <int kStep = kLanes / 2>
PHX_INLINE void turn(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
  if constexpr (kStep > 1) turn<kStep / 2>(rows);
}

// Tiles [kTile, width] turned over, each in its place: [width, kTile].
void turn_over(int64_t tiles, int64_t width, const float *from, float *to) {
  for (int64_t tile = 0; tile < tiles; ++tile, from += kTile * width, to += kTile * width)
    for (int64_t i = 0; i < width; i += kLanes)
      for (int64_t key = 0; key < kTile; key += kLanes) {
        Vec rows[kLanes];
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) rows[n] = load(from + (key + n) * width + i);
        turn(rows);
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) store(to + (i + n) * kTile + key, rows[n]);
      }
}

void forward_block(const Task &task, int64_t block, const Packed &packed, float *keys, float *values,
                   float *scratch) {
  const Piece &piece = task.piece;
  const int64_t query = piece.blocks[block], n = piece.blocks[block + 1] - query, width = packed.width;
  float *q = scratch, *out = q + kTile * width, *scores = out + kTile * width;
  float *most = scores + kSub * kTile, *sum = most + kTile;
  read_queries(task, task.q, query, n, width, task.scale, q);
  start_block(task, query, n, width, out, most, sum);
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
  finish_block(task, query, n, width, out, most, sum);
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
  float *rest = ds + kTile * kTile;
  const int64_t size = kTile * width;
  const Queries queries{rest, rest + size, rest + 2 * size, rest + 3 * size, rest + 3 * size + kTile};
  read_queries(task, task.q, query, n, width, task.scale, queries.q);
  read_queries(task, task.grad_out, query, n, width, 1.0f, queries.grad_out);
  std::memset(queries.grad_q, 0, size * sizeof(float));
  read_deltas(task, query, n, width, queries.lse, queries.delta, p);
  int64_t begin, end;
  key_tiles(piece, query, n, begin, end);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Strips strips(piece, query, n, tile);
    for (int64_t s = 0; s < kTile / kSub; ++s) {
      const int64_t low = strips.begin[s], high = strips.end[s], first = s * kSub;
      float *scores = p + first * kTile, *grads = ds + first * kTile;
      clear_outside(strips.none(s) ? kTile : low, high, scores);
      clear_outside(strips.none(s) ? kTile : low, high, grads);
      if (strips.none(s)) continue;
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
  finish_grad_q(task, query, n, width, queries.grad_q, p);
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

const Kernels PHX_SET(attention) = {forward, backward, PHX_SET(half_forward), PHX_SET(half_backward)};

}  // namespace phx
