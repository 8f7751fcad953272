// What tch does not bind: a gradient set to a view, backward from given output gradients, and memory
// that goes back to the system when its tensor does.
//
// Every function returns 0, or 1 after an exception whose text phx_last_error then gives.

#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <torch/csrc/autograd/autograd.h>

#include "guarded.h"

extern "C" {

const char *phx_last_error() { return phx_last_error_text.c_str(); }

// Makes `grad` the gradient of `tensor`: backward then accumulates into it in place.
int phx_set_grad(at::Tensor *tensor, const at::Tensor *grad) {
  return guarded([&] { tensor->mutable_grad() = *grad; });
}

// A flat tensor of zeros in pages of its own. The allocator keeps what is freed for the next of its
// kind; these pages are returned at once.
at::Tensor *phx_mapped_zeros(int64_t numel, int bf16) {
  at::Tensor *result = nullptr;
  guarded([&] {
    const auto kind = bf16 ? at::kBFloat16 : at::kFloat;
    const size_t bytes = static_cast<size_t>(numel) * c10::elementSize(kind);
    TORCH_CHECK(numel > 0, "a mapped tensor has elements, not ", numel);
    void *pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(pages != MAP_FAILED, "no memory for a buffer of ", bytes, " bytes");
    madvise(pages, bytes, MADV_HUGEPAGE);  // advice: fewer page faults where the system takes it
    result = new at::Tensor(at::from_blob(
        pages, {numel}, [bytes](void *p) { munmap(p, bytes); }, at::TensorOptions().dtype(kind)));
  });
  return result;
}

// Backward through the graph of `output`, given the gradient of the loss with respect to it.
int phx_backward(const at::Tensor *output, const at::Tensor *grad_output) {
  return guarded([&] { torch::autograd::backward({*output}, {*grad_output}); });
}
}
