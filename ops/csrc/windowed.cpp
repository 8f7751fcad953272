// Attention merged from pieces that a kernel with a window can compute, for GPUs: libtorch's flash
// attention there, and on the CPU the band of our own kernel, by which the merging is tested.
//
// A piece arranges positions anew so that each query sees a window of consecutive keys that ends with its
// own. The pieces of a pattern have no pair in common, so outputs merge by their log-sum-exp, and each
// piece's backward is given the output and the log-sum-exp of the whole (Dao et al. 2022).

#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "attention.h"
#include "guarded.h"

namespace {

using at::Tensor;

// What is arranged how; each with `size` positions to a block.
enum Kind : int64_t {
  kWhole = 0,    // as it is; a window of `size` keys, or of all for 0
  kBlocks = 1,   // blocks by themselves, each causal
  kStrides = 2,  // positions `size` apart stand together; each sees all before it but itself
  kColumn = 3,   // the same queries see the key at `column` of every block before theirs
};

struct Windowed {
  int64_t kind, size, column;

  int64_t window() const { return kind == kWhole ? size : 0; }

  // x [B, T, H, D] as rows for queries, [N, S, H, D]; what fills up the last block is `fill`.
  Tensor queries(const Tensor &x, double fill) const {
    if (kind == kWhole) return x;
    const Tensor blocks = in_blocks(x, fill);  // [B, n, size, H, D]
    if (kind == kBlocks) return blocks.flatten(0, 1);
    const Tensor later = blocks.narrow(1, 1, blocks.size(1) - 1);
    return later.transpose(1, 2).flatten(0, 1).contiguous();
  }

  // The same for keys.
  Tensor keys(const Tensor &x) const {
    if (kind == kWhole || kind == kBlocks) return queries(x, 0);
    const Tensor blocks = in_blocks(x, 0);
    const Tensor earlier = blocks.narrow(1, 0, blocks.size(1) - 1);
    if (kind == kStrides) return earlier.transpose(1, 2).flatten(0, 1).contiguous();
    const Tensor column_keys = earlier.select(2, column).unsqueeze(1);  // [B, 1, n - 1, H, D]
    return column_keys.expand({-1, size, -1, -1, -1}).flatten(0, 1).contiguous();
  }

  // Rows of queries [N, S, H, D] back in their places, [B, T, H, D]; those that have none get `fill`.
  Tensor from_queries(const Tensor &y, int64_t b, int64_t t, double fill) const {
    if (kind == kWhole) return y;
    if (kind == kBlocks) return y.unflatten(0, {b, -1}).flatten(1, 2).narrow(1, 0, t);
    const Tensor blocks = y.unflatten(0, {b, size}).transpose(1, 2);  // [B, n - 1, size, H, D]
    return at::constant_pad_nd(blocks, {0, 0, 0, 0, 0, 0, 1, 0}, fill).flatten(1, 2).narrow(1, 0, t);
  }

  // Gradients of rows of keys back in their places, zeros elsewhere.
  Tensor from_keys(const Tensor &y, int64_t b, int64_t t) const {
    if (kind == kWhole || kind == kBlocks) return from_queries(y, b, t, 0);
    const Tensor blocks = y.unflatten(0, {b, size}).transpose(1, 2);
    Tensor all = at::constant_pad_nd(blocks, {0, 0, 0, 0, 0, 0, 0, 1}, 0);  // [B, n, size, H, D]
    if (kind == kColumn) {
      const Tensor sum = all.sum(2);
      all = at::zeros_like(all);
      all.select(2, column).copy_(sum);
    }
    return all.flatten(1, 2).narrow(1, 0, t);
  }

 private:
  Tensor in_blocks(const Tensor &x, double fill) const {
    const int64_t t = x.size(1), blocks = (t + size - 1) / size;
    const Tensor filled = at::constant_pad_nd(x, {0, 0, 0, 0, 0, blocks * size - t}, fill);
    return filled.unflatten(1, {blocks, size});
  }
};

// A log-sum-exp that leaves a row of padding no probability at all.
constexpr double kNobody = 1e4;

double scale_of(const Tensor &q) { return 1.0 / std::sqrt(static_cast<double>(q.size(-1))); }

int64_t band_of(int64_t window, const Tensor &q) { return window == 0 ? q.size(1) : window; }

std::optional<int64_t> left_of(int64_t window) {
  return window == 0 ? std::nullopt : std::optional<int64_t>(window - 1);
}

// [N, S, H, D] each; the output, and the log-sum-exp as [N, S, H, 1].
std::pair<Tensor, Tensor> window_forward(const Tensor &q, const Tensor &k, const Tensor &v, int64_t window) {
  if (q.is_cpu()) {
    const auto heads_first = [](const Tensor &x) { return x.transpose(1, 2); };
    const auto [out, lse] =
        phx::band_forward(heads_first(q), heads_first(k), heads_first(v), band_of(window, q));
    return {heads_first(out), heads_first(lse.unsqueeze(3))};
  }
  const auto [out, lse, state, unused, mask] = at::_flash_attention_forward(
      q, k, v, {}, {}, q.size(1), k.size(1), /*dropout_p=*/0.0, /*is_causal=*/true,
      /*return_debug_mask=*/false, scale_of(q), left_of(window), 0);
  return {out, lse.transpose(1, 2).unsqueeze(3)};
}

std::array<Tensor, 3> window_backward(const Tensor &q, const Tensor &k, const Tensor &v, int64_t window,
                                      const Tensor &out, const Tensor &lse, const Tensor &grad_out) {
  const Tensor rows = lse.squeeze(3).transpose(1, 2).contiguous();  // [N, H, S]
  if (q.is_cpu()) {
    const auto heads_first = [](const Tensor &x) { return x.transpose(1, 2); };
    auto grads = phx::band_backward(heads_first(q), heads_first(k), heads_first(v), band_of(window, q),
                                    heads_first(out), rows, heads_first(grad_out));
    for (Tensor &grad : grads) grad = grad.transpose(1, 2);
    return grads;
  }
  // Without dropout the kernel reads no random state.
  const Tensor state = at::zeros({2}, q.options().dtype(at::kUInt64)), none;
  const auto [grad_q, grad_k, grad_v] = at::_flash_attention_backward(
      grad_out, q, k, v, out, rows, none, none, q.size(1), k.size(1), /*dropout_p=*/0.0,
      /*is_causal=*/true, state, at::empty({}, state.options()), scale_of(q), left_of(window), 0);
  return {grad_q, grad_k, grad_v};
}

struct Merged : torch::autograd::Function<Merged> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &q, const Tensor &k,
                        const Tensor &v, const std::vector<int64_t> &numbers) {
    // Heads side by side, as the kernels of GPUs have them.
    const Tensor qs = q.transpose(1, 2), ks = k.transpose(1, 2), vs = v.transpose(1, 2);
    const int64_t b = qs.size(0), t = qs.size(1);
    Tensor out, lse;
    for (const Windowed &piece : pieces_of(numbers)) {
      auto [of_piece, lse_of_piece] =
          window_forward(piece.queries(qs, 0), piece.keys(ks), piece.keys(vs), piece.window());
      of_piece = piece.from_queries(of_piece, b, t, 0).to(at::kFloat);
      lse_of_piece = piece.from_queries(lse_of_piece, b, t, -INFINITY);
      if (!out.defined()) {
        out = of_piece, lse = lse_of_piece;
        continue;
      }
      const Tensor both = at::logaddexp(lse, lse_of_piece);
      out = out * (lse - both).exp() + of_piece * (lse_of_piece - both).exp();
      lse = both;
    }
    out = out.to(q.scalar_type());
    context->save_for_backward({qs, ks, vs, out, lse});
    context->saved_data["pieces"] = numbers;
    return out.transpose(1, 2);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 const torch::autograd::variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const Tensor grad_out = grads[0].transpose(1, 2);
    const int64_t b = q.size(0), t = q.size(1);
    std::array<Tensor, 3> sums;
    for (const Windowed &piece : pieces_of(context->saved_data["pieces"].toIntVector())) {
      auto parts = window_backward(piece.queries(q, 0), piece.keys(k), piece.keys(v), piece.window(),
                                   piece.queries(out, 0), piece.queries(lse, kNobody),
                                   piece.queries(grad_out, 0));
      parts[0] = piece.from_queries(parts[0], b, t, 0);
      parts[1] = piece.from_keys(parts[1], b, t);
      parts[2] = piece.from_keys(parts[2], b, t);
      for (int i = 0; i < 3; ++i) {
        const Tensor part = parts[i].to(at::kFloat);
        sums[i] = sums[i].defined() ? sums[i] + part : part;
      }
    }
    const auto finished = [&](const Tensor &sum) { return sum.to(q.scalar_type()).transpose(1, 2); };
    return {finished(sums[0]), finished(sums[1]), finished(sums[2]), Tensor()};
  }

  static std::vector<Windowed> pieces_of(const std::vector<int64_t> &numbers) {
    std::vector<Windowed> pieces;
    for (size_t i = 0; i + 2 < numbers.size(); i += 3)
      pieces.push_back({numbers[i], numbers[i + 1], numbers[i + 2]});
    return pieces;
  }
};

}  // namespace

extern "C" {

// Attention of queries, keys and values [B, H, T, D] over pieces of three numbers each, `Windowed`; the
// first has every query. Null after a failure.
at::Tensor *phx_windowed_attention(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v,
                                   const int64_t *pieces, int64_t n_pieces) {
  at::Tensor *result = nullptr;
  guarded([&] {
    const std::vector<int64_t> numbers(pieces, pieces + 3 * n_pieces);
    result = new Tensor(Merged::apply(*q, *k, *v, numbers));
  });
  return result;
}
}
