// The CPU's kernel as a piece that others merge: bands, with the log-sum-exp that merging needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <utility>

namespace phx {

// Each query of [B, H, T, D] sees the last `window` keys, itself included. The output like the inputs, and
// the scores' log-sum-exp [B, H, T] fp32.
std::pair<at::Tensor, at::Tensor> band_forward(const at::Tensor &q, const at::Tensor &k,
                                               const at::Tensor &v, int64_t window);

// The part of the gradients of q, k and v that goes through the band, where `out` and `lse` are those of
// all that its queries see.
std::array<at::Tensor, 3> band_backward(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v,
                                        int64_t window, const at::Tensor &out, const at::Tensor &lse,
                                        const at::Tensor &grad_out);

}  // namespace phx
