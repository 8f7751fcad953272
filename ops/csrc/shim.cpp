// What tch does not bind: a gradient set to a view, and backward from given output gradients.
//
// Every function returns 0, or 1 after an exception whose text phx_last_error then gives.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "guarded.h"

extern "C" {

const char *phx_last_error() { return phx_last_error_text.c_str(); }

// Makes `grad` the gradient of `tensor`: backward then accumulates into it in place.
int phx_set_grad(at::Tensor *tensor, const at::Tensor *grad) {
  return guarded([&] { tensor->mutable_grad() = *grad; });
}

// Backward through the graph of `output`, given the gradient of the loss with respect to it.
int phx_backward(const at::Tensor *output, const at::Tensor *grad_output) {
  return guarded([&] { torch::autograd::backward({*output}, {*grad_output}); });
}
}
