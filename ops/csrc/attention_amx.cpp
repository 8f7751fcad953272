// Attention in tiles by the CPU's matrix unit: the steps of attention_half.cpp with the unit's own products, whose
// right factors come as pairs of rows side by side. The gradients of keys and values are summed turned over, so
// that no tile of probabilities has to be.

#include "attention_tiles.h"

#if defined(__AMX_BF16__)

#include "amx.h"
#include "attention_halves.h"

namespace phx {
namespace {

// C[m, n] (+)= A[m, k] B[k, n]: `b` is [k / 2, n, 2]. All are multiples of 32.
template <bool kAdd>
PHX_INLINE void product(int64_t m, int64_t n, int64_t k, const Half *a, const Half *b, float *c) {
  for (int64_t i = 0; i < m; i += 32) {
    for (int64_t j = 0; j < n; j += 32) {
      float *const to = c + i * n + j;
      if (kAdd) {
        _tile_loadd(0, to, 4 * n);
        _tile_loadd(1, to + 16, 4 * n);
        _tile_loadd(2, to + 16 * n, 4 * n);
        _tile_loadd(3, to + 16 * n + 16, 4 * n);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t d = 0; d < k; d += kTileDeep) {
        const Half *left = a + i * k + d, *right = b + d * n + 2 * j;
        _tile_loadd(4, left, 2 * k);
        _tile_loadd(6, right, 4 * n);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 32, 4 * n);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * k, 2 * k);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, 4 * n);
      _tile_stored(1, to + 16, 4 * n);
      _tile_stored(2, to + 16 * n, 4 * n);
      _tile_stored(3, to + 16 * n + 16, 4 * n);
    }
  }
}

// [rows, columns] of 32 bits turned over; multiples of 16.
void turn(int64_t rows, int64_t columns, const void *from, void *to) {
  const auto *in = static_cast<const int32_t *>(from);
  auto *out = static_cast<int32_t *>(to);
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; j += 16) {
      Lines lines;
      for (int64_t k = 0; k < 16; ++k) lines[k] = _mm512_loadu_si512(in + (i + k) * columns + j);
      turn(lines);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(out + (j + k) * rows + i, lines[k]);
    }
  }
}

// A tile's rows [kTile, width] as a right factor over its rows: [kTile / 2, width, 2].
void pair_rows(int64_t width, const Half *from, Half *to) {
  for (int64_t i = 0; i < kTile; i += 2) {
    for (int64_t j = 0; j < width; j += 32) {
      const __m512i even = _mm512_loadu_si512(from + i * width + j);
      const __m512i odd = _mm512_loadu_si512(from + (i + 1) * width + j);
      _mm512_storeu_si512(to + i * width + 2 * j, pairs(even, odd, 0));
      _mm512_storeu_si512(to + i * width + 2 * j + 32, pairs(even, odd, 16));
    }
  }
}

// The same rows as a right factor over the width: [width / 2, kTile, 2].
void pair_turned(int64_t width, const Half *from, Half *to) { turn(kTile, width / 2, from, to); }

// The same rows turned over, as a left factor: [width, kTile].
void turn_rows(int64_t width, const Half *from, Half *to, Half *between) {
  pair_rows(width, from, between);
  turn(kTile / 2, width, between, to);
}

// [kTile, kTile] rounded to bf16: as rows, as pairs of rows, or both.
void rounded(const float *from, Half *rows, Half *in_pairs) {
  for (int64_t i = 0; i < kTile; i += 2) {
    for (int64_t j = 0; j < kTile; j += 32) {
      __m512i two[2];
      for (int64_t k = 0; k < 2; ++k) {
        const float *at = from + (i + k) * kTile + j;
        two[k] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(at + 16), _mm512_loadu_ps(at));
        if (rows) _mm512_storeu_si512(rows + (i + k) * kTile + j, two[k]);
      }
      if (!in_pairs) continue;
      _mm512_storeu_si512(in_pairs + i * kTile + 2 * j, pairs(two[0], two[1], 0));
      _mm512_storeu_si512(in_pairs + i * kTile + 2 * j + 32, pairs(two[0], two[1], 16));
    }
  }
}

// Calls body(rows, where it is among all) for each tile of keys or values.
template <typename Body>
void each_tile(const Task &task, const Rows &rows, int64_t width, Arena arena, Body body) {
  Half *tile = arena.halves(kTile * width);
  for (int64_t key = task.key_begin; key < task.key_end; key += kTile) {
    copy_keys(task, rows, key, width, tile);
    body(tile, (key - task.key_begin) * width);
  }
}

void forward_block(const Task &task, const Block &block, int64_t width, const Half *keys, const Half *values,
                   Arena arena) {
  Half *q = arena.halves(kTile * width), *p = arena.halves(kTile * kTile);
  float *out = arena.floats(kTile * width), *scores = arena.floats(kTile * kTile);
  float *most = arena.floats(kTile), *sum = arena.floats(kTile);
  copy_queries(task, task.q, block.query, block.n, width, q);
  start_block(task, block.query, block.n, width, out, most, sum);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const Strips strips(task.piece, block.query, block.n, tile);
    if (strips.none()) continue;
    const int64_t at = (tile - task.key_begin) * width;
    product<false>(kTile, kTile, width, q, keys + at, scores);
    soften_tile(task, block, tile, strips, width, scores, most, sum, out);
    rounded(scores, p, nullptr);
    product<true>(kTile, width, kTile, p, values + at, out);
  }
  finish_block(task, block.query, block.n, width, out, most, sum);
}

struct Span {
  Half *keys, *turned_keys, *turned_values;  // of all tiles, as right factors
};

void backward_block(const Task &task, const Block &block, int64_t width, const Span &span, Arena arena) {
  Half *q = arena.halves(kTile * width), *turned_q = arena.halves(kTile * width);
  Half *grad_out = arena.halves(kTile * width), *turned_grad = arena.halves(kTile * width);
  Half *ds = arena.halves(kTile * kTile), *ds_pairs = arena.halves(kTile * kTile);
  Half *p_pairs = arena.halves(kTile * kTile);
  float *scores = arena.floats(kTile * kTile), *grads = arena.floats(kTile * kTile);
  float *grad_q = arena.floats(kTile * width), *lse = arena.floats(kTile), *delta = arena.floats(kTile);
  Half *const between = reinterpret_cast<Half *>(grad_q);
  copy_queries(task, task.q, block.query, block.n, width, q);
  copy_queries(task, task.grad_out, block.query, block.n, width, grad_out);
  turn_rows(width, q, turned_q, between);
  turn_rows(width, grad_out, turned_grad, between);
  std::memset(grad_q, 0, kTile * width * sizeof(float));
  read_deltas(task, block.query, block.n, width, lse, delta, scores);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const Strips strips(task.piece, block.query, block.n, tile);
    if (strips.none()) continue;
    const int64_t at = (tile - task.key_begin) * width;
    product<false>(kTile, kTile, width, q, span.turned_keys + at, scores);
    product<false>(kTile, kTile, width, grad_out, span.turned_values + at, grads);
    harden_tile(task, block, tile, strips, lse, delta, scores, grads);
    rounded(scores, nullptr, p_pairs);
    rounded(grads, ds, ds_pairs);
    product<true>(kTile, width, kTile, ds, span.keys + at, grad_q);
    product<true>(width, kTile, kTile, turned_grad, p_pairs, task.grad_v + at);
    product<true>(width, kTile, kTile, turned_q, ds_pairs, task.grad_k + at);
  }
  finish_grad_q(task, block.query, block.n, width, grad_q, scores);
}

// Turns each tile of sums [width, kTile] to [kTile, width], times `scale`.
void turn_back(const Task &task, int64_t width, float scale, float *sums, float *between) {
  for (int64_t i = 0; i < task.key_end - task.key_begin; i += kTile) {
    float *const tile = sums + i * width;
    turn(width, kTile, tile, between);
    for (int64_t j = 0; j < kTile * width; j += kLanes) store(tile + j, load(between + j) * splat(scale));
  }
}

}  // namespace

bool amx_attends(int64_t d) { return padded(d) % 32 == 0; }

void amx_forward(const Task &task, float *scratch) {
  const Shape shape;
  _tile_loadconfig(&shape);
  const int64_t width = padded(task.d), numel = (task.key_end - task.key_begin) * width;
  Arena arena{scratch};
  Half *keys = arena.halves(numel), *values = arena.halves(numel);
  each_tile(task, task.k, width, arena, [&](const Half *tile, int64_t at) { pair_turned(width, tile, keys + at); });
  each_tile(task, task.v, width, arena, [&](const Half *tile, int64_t at) { pair_rows(width, tile, values + at); });
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    forward_block(task, Block(task.piece, block), width, keys, values, arena);
  _tile_release();
}

void amx_backward(const Task &task, float *scratch) {
  const Shape shape;
  _tile_loadconfig(&shape);
  const int64_t width = padded(task.d), numel = (task.key_end - task.key_begin) * width;
  Arena arena{scratch};
  const Span span{arena.halves(numel), arena.halves(numel), arena.halves(numel)};
  each_tile(task, task.k, width, arena, [&](const Half *tile, int64_t at) {
    pair_rows(width, tile, span.keys + at);
    pair_turned(width, tile, span.turned_keys + at);
  });
  each_tile(task, task.v, width, arena, [&](const Half *tile, int64_t at) {
    pair_turned(width, tile, span.turned_values + at);
  });
  std::memset(task.grad_k, 0, numel * sizeof(float));
  std::memset(task.grad_v, 0, numel * sizeof(float));
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    backward_block(task, Block(task.piece, block), width, span, arena);
  turn_back(task, width, task.scale, task.grad_k, arena.next);
  turn_back(task, width, 1.0f, task.grad_v, arena.next);
  _tile_release();
}

}  // namespace phx

#else

namespace phx {

bool amx_attends(int64_t) { return false; }
void amx_forward(const Task &, float *) { __builtin_trap(); }
void amx_backward(const Task &, float *) { __builtin_trap(); }

}  // namespace phx

#endif
