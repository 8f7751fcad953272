// What the tiles of attention are given: one head's rows, and the piece of a pattern that they compute.
// attention_tiles.cpp is compiled once for each instruction set; attention.cpp picks one.
#pragma once

#include <cstdint>

namespace phx {

constexpr int64_t kTile = 64;  // queries, and keys, of a tile

// Rows of D numbers, `stride` numbers apart, by position in the sequence.
struct Rows {
  void *data;
  int64_t stride;
};

// Queries in some order, each of which sees consecutive keys of another order.
struct Piece {
  const int32_t *queries;  // positions, in the piece's order
  const int32_t *keys;     // positions, in the piece's order
  int64_t n_keys;
  const int32_t *first;   // query n sees keys first[n] ..
  const int32_t *end;     // .. up to, not including, end[n]
  const int32_t *blocks;  // block b: queries blocks[b] .. blocks[b + 1], at most kTile
};

// Products of bf16 tiles into fp32 by whatever hardware there is for them. The right factor is packed first,
// at most kTile columns of it at a time.
struct HalfProducts {
  // C[m, n] (+)= A[m, k] B[k, n]
  void (*product)(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *packed,
                  float *c, int64_t ldc, bool add);
  void (*pack)(int64_t k, int64_t n, const uint16_t *b, int64_t ldb, uint16_t *packed);
  void (*release)();  // of what the hardware keeps for this thread
};

// One head, some blocks of one piece.
struct Task {
  Piece piece;
  int64_t block_begin, block_end;
  int64_t key_begin, key_end;  // multiples of kTile that hold all keys seen, in the piece's order
  int64_t d;
  float scale;
  bool bf16;          // what q, k, v are, and in backward out and grad_out; or fp32
  bool bf16_results;  // what out is in forward, and grad_q; fp32 where there are several pieces
  bool begins;        // whether this is the first piece; each later one goes on from those before
  const HalfProducts *half;  // for kernels of bf16 products
  Rows q, k, v, out;
  float *lse;  // log-sum-exp of the scores, by position
  // Backward only: out and lse are those of all pieces.
  Rows grad_out, grad_q;
  float *delta;  // output times its gradient, by position: the first piece computes it, later ones read it
  float *grad_k, *grad_v;  // [key_end - key_begin, padded d] of this task alone
};

// D rounded up to whole vectors.
inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// fp32 numbers of scratch that a task needs.
inline int64_t scratch_numel(const Task &task, bool backward) {
  const int64_t span = (task.key_end - task.key_begin) * padded(task.d);
  return (backward ? 3 : 2) * span + 8 * kTile * padded(task.d) + 6 * kTile * kTile + 4 * kTile + 64;
}

// Both need `scratch_numel` numbers, aligned to 64 bytes.
using Run = void (*)(const Task &task, float *scratch);

// `half` takes bf16 alone and multiplies it as it is, which pays where the hardware does; the others
// multiply in fp32.
struct Kernels {
  Run forward, backward;
  Run half_forward, half_backward;
};

extern const Kernels attention_plain, attention_avx2, attention_avx512;

// One instruction set's bf16 kernels, which its table of kernels takes over.
#if defined(PHX_AVX512)
#define PHX_SET(name) name##_avx512
#elif defined(PHX_AVX2)
#define PHX_SET(name) name##_avx2
#else
#define PHX_SET(name) name##_plain
#endif
void PHX_SET(half_forward)(const Task &task, float *scratch);
void PHX_SET(half_backward)(const Task &task, float *scratch);

// The same by the matrix unit, for heads of so many numbers; product.h says whether this CPU has it.
bool amx_attends(int64_t d);
void amx_forward(const Task &task, float *scratch);
void amx_backward(const Task &task, float *scratch);

}  // namespace phx
