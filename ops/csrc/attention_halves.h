// What kernels of bf16 products have in common, whatever multiplies: rows copied from and to, and what happens to
// a tile of scores between two products.
#pragma once

#include "attention_strips.h"

namespace phx {
namespace {

typedef uint16_t Half;

// Takes numbers from scratch, one array after the other, each aligned to 64 bytes.
struct Arena {
  float *next;
  float *floats(int64_t n) {
    float *taken = next;
    next += (n + 15) / 16 * 16;
    return taken;
  }
  Half *halves(int64_t n) { return reinterpret_cast<Half *>(floats((n + 1) / 2)); }
};

inline void copy_row(const Rows &rows, int64_t position, int64_t d, int64_t width, Half *to) {
  std::memcpy(to, static_cast<const Half *>(rows.data) + position * rows.stride, d * sizeof(Half));
  std::memset(to + d, 0, (width - d) * sizeof(Half));
}

// The rows of a tile of keys, [kTile, width]; zeros past the piece's last.
inline void copy_keys(const Task &task, const Rows &rows, int64_t tile, int64_t width, Half *to) {
  for (int64_t i = 0; i < kTile; ++i) {
    if (tile + i < task.piece.n_keys) {
      ask_ahead(rows, true, task.piece.keys, tile + i, task.piece.n_keys, task.d);
      copy_row(rows, task.piece.keys[tile + i], task.d, width, to + i * width);
    } else {
      std::memset(to + i * width, 0, width * sizeof(Half));
    }
  }
}

// The rows of a block of queries, [kTile, width]; zeros past its last.
inline void copy_queries(const Task &task, const Rows &rows, int64_t query, int64_t n, int64_t width, Half *to) {
  const int32_t *positions = task.piece.queries + query;
  for (int64_t i = 0; i < n; ++i) {
    ask_ahead(rows, true, positions, i, n, task.d);
    copy_row(rows, positions[i], task.d, width, to + i * width);
  }
  std::memset(to + n * width, 0, (kTile - n) * width * sizeof(Half));
}

// A strip of a tile: what it sees times `scale`, the rest 0.
PHX_INLINE void scaled(int64_t low, int64_t high, float scale, float *scores) {
  for (int64_t i = 0; i < kSub; ++i) {
    float *row = scores + i * kTile;
    for (int64_t j = low; j < high; j += kLanes) store(row + j, load(row + j) * splat(scale));
  }
}

struct Block {
  int64_t query, n, begin, end;  // its queries, and the tiles of keys that they see

  Block(const Piece &piece, int64_t block)
      : query(piece.blocks[block]), n(piece.blocks[block + 1] - piece.blocks[block]) {
    key_tiles(piece, query, n, begin, end);
  }
};

// Of a tile of scores [kTile, kTile]: one step of the online softmax of a block's queries.
inline void soften_tile(const Task &task, const Block &block, int64_t tile, const Strips &strips, int64_t width,
                        float *scores, float *most, float *sum, float *out) {
  for (int64_t s = 0; s < kTile / kSub; ++s) {
    const int64_t first = s * kSub, low = strips.begin[s], high = strips.end[s];
    float *strip = scores + first * kTile;
    if (strips.none(s)) {
      clear_outside(kTile, kTile, strip);
      continue;
    }
    scaled(low, high, task.scale, strip);
    mask(task.piece, block.query + first, block.n - first, tile, low, high, -INFINITY, strip);
    soften(low, high, width, strip, most + first, sum + first, out + first * width);
    clear_outside(low, high, strip);
  }
}

// Of a tile of scores and of the gradients of its probabilities: probabilities, and the scores' gradients.
inline void harden_tile(const Task &task, const Block &block, int64_t tile, const Strips &strips,
                        const float *lse, const float *delta, float *scores, float *grads) {
  for (int64_t s = 0; s < kTile / kSub; ++s) {
    const int64_t first = s * kSub, none = strips.none(s);
    const int64_t low = none ? kTile : strips.begin[s], high = none ? kTile : strips.end[s];
    float *strip = scores + first * kTile, *grad = grads + first * kTile;
    scaled(low, high, task.scale, strip);
    mask(task.piece, block.query + first, block.n - first, tile, low, high, -INFINITY, strip);
    harden(low, high, lse + first, delta + first, strip, grad);
    clear_outside(low, high, strip);
    clear_outside(low, high, grad);
  }
}

}  // namespace
}  // namespace phx
