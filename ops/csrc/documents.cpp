// Attention that keeps to documents, for GPUs: a pattern as sequences of any lengths that libtorch's flash
// attention computes together with a window, merged by their log-sum-exp. On the CPU the band of our own kernel
// computes them one by one, by which the merging is tested. No matrix of T x T is made.
//
// A piece has sequences of rows, picked from [B T]; each query sees a window of its sequence's keys that ends
// with the key of its own number. The pieces of a pattern have no pair in common (Dao et al. 2022 for merging).

#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "guarded.h"

namespace {

using at::Tensor;
using torch::autograd::variable_list;

struct Sequences {
  Tensor queries, keys;  // rows, i64; undefined: all, in their order
  Tensor ends;           // 0 and where each sequence ends, i32
  int64_t longest, window;

  Tensor picked(const Tensor &rows, const Tensor &which) const {
    return which.defined() ? rows.index_select(0, which) : rows;
  }

  std::optional<int64_t> left() const {
    return window == 0 ? std::nullopt : std::optional<int64_t>(window - 1);
  }

  // Calls `body` with where each sequence begins and how long it is.
  template <typename Body>
  void each(Body body) const {
    const int32_t *at = ends.const_data_ptr<int32_t>();
    for (int64_t i = 0; i + 1 < ends.numel(); ++i) body(at[i], at[i + 1] - at[i]);
  }
};

double scale_of(const Tensor &q) { return 1.0 / std::sqrt(static_cast<double>(q.size(-1))); }

// Rows [S, H, D] of one sequence as the CPU's kernel has them, [1, H, S, D], and back.
Tensor to_heads(const Tensor &x) { return x.transpose(0, 1).unsqueeze(0); }
Tensor from_heads(const Tensor &x) { return x.squeeze(0).transpose(0, 1); }

// [N, H, D] each; the output, and the log-sum-exp as [N, H, 1].
std::pair<Tensor, Tensor> forward_of(const Tensor &q, const Tensor &k, const Tensor &v, const Sequences &of) {
  if (!q.is_cpu()) {
    const auto [out, lse, state, unused, mask] = at::_flash_attention_forward(
        q, k, v, of.ends, of.ends, of.longest, of.longest, /*dropout_p=*/0.0, /*is_causal=*/true,
        /*return_debug_mask=*/false, scale_of(q), of.left(), 0);
    TORCH_CHECK(lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == q.size(0),
                "flash attention's log-sum-exp of sequences is [H, N], not ", lse.sizes());
    return {out, lse.transpose(0, 1).unsqueeze(2)};
  }
  Tensor out = at::empty_like(q);
  Tensor lse = at::empty({q.size(0), q.size(1), 1}, q.options().dtype(at::kFloat));
  of.each([&](int64_t begin, int64_t n) {
    const auto part = [&](const Tensor &x) { return to_heads(x.narrow(0, begin, n)); };
    const int64_t window = of.window == 0 ? n : of.window;
    const auto [of_part, lse_of_part] = phx::band_forward(part(q), part(k), part(v), window);
    out.narrow(0, begin, n).copy_(from_heads(of_part));
    lse.narrow(0, begin, n).copy_(from_heads(lse_of_part.unsqueeze(3)));
  });
  return {out, lse};
}

std::array<Tensor, 3> backward_of(const Tensor &q, const Tensor &k, const Tensor &v, const Sequences &of,
                                  const Tensor &out, const Tensor &lse, const Tensor &grad_out) {
  if (!q.is_cpu()) {
    // Without dropout the kernel reads no random state.
    const Tensor state = at::zeros({2}, q.options().dtype(at::kUInt64));
    const Tensor rows = lse.squeeze(2).transpose(0, 1).contiguous();
    const auto [grad_q, grad_k, grad_v] = at::_flash_attention_backward(
        grad_out, q, k, v, out, rows, of.ends, of.ends, of.longest, of.longest, /*dropout_p=*/0.0,
        /*is_causal=*/true, state, at::empty({}, state.options()), scale_of(q), of.left(), 0);
    return {grad_q, grad_k, grad_v};
  }
  std::array<Tensor, 3> grads = {at::empty_like(q), at::empty_like(k), at::empty_like(v)};
  of.each([&](int64_t begin, int64_t n) {
    const auto part = [&](const Tensor &x) { return to_heads(x.narrow(0, begin, n)); };
    const int64_t window = of.window == 0 ? n : of.window;
    const Tensor of_part = part(lse).squeeze(3).contiguous();
    const auto parts = phx::band_backward(part(q), part(k), part(v), window, part(out), of_part, part(grad_out));
    for (int i = 0; i < 3; ++i) grads[i].narrow(0, begin, n).copy_(from_heads(parts[i]));
  });
  return grads;
}

// Three tensors and two numbers of each piece: how they are kept for backward. Autograd sees one argument that is
// no tensor.
struct Pieces {
  std::vector<Tensor> tensors;
  std::vector<int64_t> numbers;

  std::vector<Sequences> all() const {
    std::vector<Sequences> pieces;
    for (size_t i = 0; 2 * i < numbers.size(); ++i) {
      pieces.push_back(
          {tensors[3 * i], tensors[3 * i + 1], tensors[3 * i + 2], numbers[2 * i], numbers[2 * i + 1]});
    }
    return pieces;
  }
};

struct Within : torch::autograd::Function<Within> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &q, const Tensor &k,
                        const Tensor &v, const std::shared_ptr<const Pieces> &pieces) {
    const auto rows = [](const Tensor &x) { return x.transpose(1, 2).flatten(0, 1).contiguous(); };
    const Tensor qs = rows(q), ks = rows(k), vs = rows(v);  // [B T, H, D]
    Tensor out, lse;
    for (const Sequences &piece : pieces->all()) {
      auto [of_piece, lse_of_piece] = forward_of(piece.picked(qs, piece.queries), piece.picked(ks, piece.keys),
                                                 piece.picked(vs, piece.keys), piece);
      of_piece = of_piece.to(at::kFloat);
      if (!out.defined()) {
        out = of_piece, lse = lse_of_piece;
        continue;
      }
      // The other rows stay as they are.
      const Tensor before = lse.index_select(0, piece.queries), both = at::logaddexp(before, lse_of_piece);
      const Tensor merged = out.index_select(0, piece.queries) * (before - both).exp() +
                            of_piece * (lse_of_piece - both).exp();
      out = out.index_copy(0, piece.queries, merged);
      lse = lse.index_copy(0, piece.queries, both);
    }
    out = out.to(q.scalar_type());
    context->save_for_backward({qs, ks, vs, out, lse});
    context->saved_data["tensors"] = pieces->tensors;
    context->saved_data["numbers"] = pieces->numbers;
    context->saved_data["sequences"] = q.size(0);
    return out.unflatten(0, {q.size(0), -1}).transpose(1, 2);
  }

  static variable_list backward(torch::autograd::AutogradContext *context, const variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const Tensor grad_out = grads[0].transpose(1, 2).flatten(0, 1).contiguous();
    const Pieces pieces{context->saved_data["tensors"].toTensorVector(),
                        context->saved_data["numbers"].toIntVector()};
    std::array<Tensor, 3> sums;
    for (Tensor &sum : sums) sum = at::zeros(q.sizes(), q.options().dtype(at::kFloat));
    for (const Sequences &piece : pieces.all()) {
      const auto of_queries = [&](const Tensor &x) { return piece.picked(x, piece.queries); };
      const auto parts =
          backward_of(of_queries(q), piece.picked(k, piece.keys), piece.picked(v, piece.keys), piece,
                      of_queries(out), of_queries(lse), of_queries(grad_out));
      for (int i = 0; i < 3; ++i) {
        const Tensor part = parts[i].to(at::kFloat), &which = i == 0 ? piece.queries : piece.keys;
        if (which.defined()) {
          // A key may be in several sequences; sorted by libtorch, they are added in one order.
          sums[i].index_put_({which}, part, /*accumulate=*/true);
        } else {
          sums[i].add_(part);
        }
      }
    }
    const int64_t b = context->saved_data["sequences"].toInt();
    const auto finished = [&](const Tensor &sum) {
      return sum.to(q.scalar_type()).unflatten(0, {b, -1}).transpose(1, 2);
    };
    return {finished(sums[0]), finished(sums[1]), finished(sums[2]), Tensor()};
  }
};

}  // namespace

extern "C" {

// Attention of queries, keys and values [B, H, T, D] over pieces of three tensors, of which the first two may
// be null, and two numbers each: `Sequences`. The first piece has every row. Null after a failure.
at::Tensor *phx_document_attention(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v,
                                   const at::Tensor *const *tensors, const int64_t *numbers, int64_t n_pieces) {
  at::Tensor *result = nullptr;
  guarded([&] {
    auto pieces = std::make_shared<Pieces>();
    for (int64_t i = 0; i < 3 * n_pieces; ++i) {
      pieces->tensors.push_back(tensors[i] != nullptr ? *tensors[i] : Tensor());
    }
    pieces->numbers.assign(numbers, numbers + 2 * n_pieces);
    result = new Tensor(Within::apply(*q, *k, *v, std::shared_ptr<const Pieces>(pieces)));
  });
  return result;
}
}
