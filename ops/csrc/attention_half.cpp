// Attention in tiles whose products are bf16 as they are, for hardware that multiplies it (AMX): the same
// steps as attention_tiles.cpp, with whole tiles to a product. Sums, scores and the softmax are fp32;
// probabilities and the gradients of scores are rounded to bf16 before they are multiplied.

#include "attention_halves.h"

namespace phx {
namespace {

// Calls `body(first column, columns)` for the panels that a factor of `width` columns is packed in.
template <typename Body>
void panels(int64_t width, Body body) {
  for (int64_t at = 0; at < width; at += kTile) body(at, width - at < kTile ? width - at : kTile);
}

// Packs [kTile, width], a right factor with `kTile` to sum over.
void pack(const HalfProducts &half, int64_t width, const Half *rows, Half *packed) {
  panels(width, [&](int64_t at, int64_t n) { half.pack(kTile, n, rows + at, width, packed + at * kTile); });
}

// C[kTile, width] += A[kTile, kTile] B[kTile, width], B packed.
void add_product(const HalfProducts &half, int64_t width, const Half *a, const Half *packed, float *c) {
  panels(width, [&](int64_t at, int64_t n) {
    half.product(kTile, n, kTile, a, kTile, packed + at * kTile, c + at, width, true);
  });
}

// [rows, columns] turned over.
void turn(int64_t rows, int64_t columns, const Half *from, Half *to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// Packs a task's tiles of keys or values: as rows, turned over, or both.
void pack_span(const Task &task, const Rows &rows, int64_t width, Half *as_rows, Half *turned, Arena arena) {
  Half *tile = arena.halves(kTile * width), *over = arena.halves(kTile * width);
  for (int64_t key = task.key_begin; key < task.key_end; key += kTile) {
    copy_keys(task, rows, key, width, tile);
    const int64_t at = (key - task.key_begin) * width;
    if (as_rows) pack(*task.half, width, tile, as_rows + at);
    if (turned) {
      turn(kTile, width, tile, over);
      task.half->pack(width, kTile, over, kTile, turned + at);
    }
  }
}

// [kTile, kTile] rounded to bf16; and turned over, where it is wanted.
PHX_INLINE void rounded(const float *from, Half *to, Half *turned) {
  for (int64_t i = 0; i < kTile * kTile; ++i) to[i] = narrowed(from[i]);
  if (turned) turn(kTile, kTile, to, turned);
}

void forward_block(const Task &task, const Block &block, int64_t width, const Half *keys,
                   const Half *values, Arena arena) {
  Half *q = arena.halves(kTile * width), *p = arena.halves(kTile * kTile);
  float *out = arena.floats(kTile * width), *scores = arena.floats(kTile * kTile);
  float *most = arena.floats(kTile), *sum = arena.floats(kTile);
  copy_queries(task, task.q, block.query, block.n, width, q);
  start_block(task, block.query, block.n, width, out, most, sum);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const Strips strips(task.piece, block.query, block.n, tile);
    if (strips.none()) continue;
    const int64_t at = (tile - task.key_begin) * width;
    task.half->product(kTile, kTile, width, q, width, keys + at, scores, kTile, false);
    soften_tile(task, block, tile, strips, width, scores, most, sum, out);
    rounded(scores, p, nullptr);
    add_product(*task.half, width, p, values + at, out);
  }
  finish_block(task, block.query, block.n, width, out, most, sum);
}

struct Backward {
  int64_t width;
  Half *keys, *turned_keys, *turned_values;  // packed
};

void backward_block(const Task &task, const Block &block, const Backward &span, Arena arena) {
  const int64_t width = span.width;
  const HalfProducts &half = *task.half;
  Half *q = arena.halves(kTile * width), *packed_q = arena.halves(kTile * width);
  Half *grad_out = arena.halves(kTile * width), *packed_grad = arena.halves(kTile * width);
  Half *p = arena.halves(kTile * kTile), *turned_p = arena.halves(kTile * kTile);
  Half *ds = arena.halves(kTile * kTile), *turned_ds = arena.halves(kTile * kTile);
  float *scores = arena.floats(kTile * kTile), *grads = arena.floats(kTile * kTile);
  float *grad_q = arena.floats(kTile * width), *lse = arena.floats(kTile), *delta = arena.floats(kTile);
  copy_queries(task, task.q, block.query, block.n, width, q);
  copy_queries(task, task.grad_out, block.query, block.n, width, grad_out);
  pack(half, width, q, packed_q);
  pack(half, width, grad_out, packed_grad);
  std::memset(grad_q, 0, kTile * width * sizeof(float));
  read_deltas(task, block.query, block.n, width, lse, delta, scores);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const Strips strips(task.piece, block.query, block.n, tile);
    if (strips.none()) continue;
    const int64_t at = (tile - task.key_begin) * width;
    half.product(kTile, kTile, width, q, width, span.turned_keys + at, scores, kTile, false);
    half.product(kTile, kTile, width, grad_out, width, span.turned_values + at, grads, kTile, false);
    harden_tile(task, block, tile, strips, lse, delta, scores, grads);
    rounded(scores, p, turned_p);
    rounded(grads, ds, turned_ds);
    add_product(half, width, ds, span.keys + at, grad_q);
    add_product(half, width, turned_p, packed_grad, task.grad_v + at);
    add_product(half, width, turned_ds, packed_q, task.grad_k + at);
  }
  finish_grad_q(task, block.query, block.n, width, grad_q, scores);
}

}  // namespace

void PHX_SET(half_forward)(const Task &task, float *scratch) {
  const int64_t width = padded(task.d), numel = (task.key_end - task.key_begin) * width;
  Arena arena{scratch};
  Half *keys = arena.halves(numel), *values = arena.halves(numel);
  pack_span(task, task.k, width, nullptr, keys, arena);
  pack_span(task, task.v, width, values, nullptr, arena);
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    forward_block(task, Block(task.piece, block), width, keys, values, arena);
  task.half->release();
}

void PHX_SET(half_backward)(const Task &task, float *scratch) {
  const int64_t width = padded(task.d), numel = (task.key_end - task.key_begin) * width;
  Arena arena{scratch};
  const Backward span{width, arena.halves(numel), arena.halves(numel), arena.halves(numel)};
  pack_span(task, task.k, width, span.keys, span.turned_keys, arena);
  pack_span(task, task.v, width, nullptr, span.turned_values, arena);
  std::memset(task.grad_k, 0, numel * sizeof(float));
  std::memset(task.grad_v, 0, numel * sizeof(float));
  for (int64_t block = task.block_begin; block < task.block_end; ++block)
    backward_block(task, Block(task.piece, block), span, arena);
  for (int64_t i = 0; i < numel; ++i) task.grad_k[i] *= task.scale;
  task.half->release();
}

}  // namespace phx
