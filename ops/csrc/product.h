// Products of bf16 matrices with fp32 sums, by tiles of the CPU's matrix unit. What is multiplied where, and
// on which threads, is linear.cpp's; product_amx.cpp computes a part of it on one thread.
#pragma once

#include <cstdint>

namespace phx {

// A factor: lines of numbers that are summed over. `along`: the numbers of a line lie next to each other and
// lines are `stride` apart; else the lines lie next to each other and their numbers are `stride` apart.
struct Factor {
  const uint16_t *data;
  int64_t stride;
  bool along;
};

// GELU by its tanh, or as it is defined (Hendrycks & Gimpel 2016).
enum class Gelu { kTanh, kExact };

// What happens to a bf16 product's elements on their way, beside a bias. Both arrays lie as the output does.
struct Curve {
  Gelu kind;
  uint16_t *after;         // the GELU goes here, of the output
  const uint16_t *before;  // or of these numbers, where there are any, and the output is multiplied by its slope there
};

// Where a product goes: rounded to bf16, with a bias for each column if there is one, along a curve if there
// is one; or to fp32, added to what is there if `add`.
struct Output {
  uint16_t *half;
  float *full;
  int64_t stride;
  const uint16_t *bias;
  bool add;
  const Curve *curve = nullptr;
};

// out[rows, cols] of the lines of `left` and those of `right`, over `deep` numbers of each. An element is
// the same sum in the same order however the product is divided.
struct Product {
  Factor left, right;
  Output out;
  int64_t rows, cols, deep;
};

// A part of a product.
struct Part {
  int64_t row_begin, row_end, col_begin, col_end;  // begins are multiples of kPanel
};

constexpr int64_t kPanel = 32;

// Whether this build has the matrix unit's instructions; whether the CPU has them is another question.
bool amx_was_built();

// Whether they may be used here: the CPU has them, and the system lends them.
bool has_products();

// Columns whose right lines are used together.
int64_t product_block(const Product &product);

// bf16 numbers of scratch that a part needs, aligned to 64 bytes; `packed`: where the right lines are packed
// already.
int64_t product_scratch(const Product &product, bool packed);

// bf16 numbers of all right lines packed, aligned to 64 bytes.
int64_t packed_numel(const Product &product);

// Packs one panel of right lines, the `panel`th, into its places among them all.
void pack_panel(const Product &product, int64_t panel, uint16_t *packed);

// Computes a part on this thread, with all right lines packed, or with null: then it packs those it needs.
void product(const Product &product, const Part &part, const uint16_t *packed, uint16_t *scratch);

// Of a row of `n` logits its cross-entropy against `target` in nats; over them its gradient times `scale`,
// and zeros up to `padded`.
double cross_entropy_row(uint16_t *logits, int64_t n, int64_t padded, int64_t target, float scale);

// sums[cols] += the columns' sums of x[rows, cols], whose rows are `stride` apart.
void add_column_sums(const uint16_t *x, int64_t stride, int64_t rows, int64_t cols, float *sums);

}  // namespace phx
