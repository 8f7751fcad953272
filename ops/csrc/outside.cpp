// What was computed outside of autograd, made known to it: its backward is a callback.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using at::Tensor;
using torch::autograd::variable_list;

// Given what arrives at the outputs, null where nothing does, it leaves new tensors for the inputs, null where
// there is no gradient; returns 0, or 1 and what went wrong by phx_say.
using Backward = int (*)(void *context, const Tensor *const *arrived, int64_t n_arrived, Tensor **grads,
                         int64_t n_grads, std::string *trouble);
using Drop = void (*)(void *context);
using Context = std::unique_ptr<void, Drop>;

struct Outside : torch::autograd::Node {
  Outside(Backward backward, Context context) : backward_(backward), context_(std::move(context)) {}

  variable_list apply(variable_list &&arrived) override {
    TORCH_CHECK(context_, "backward a second time through what it has let go of");
    std::vector<const Tensor *> outputs;
    for (const Tensor &grad : arrived) outputs.push_back(grad.defined() ? &grad : nullptr);
    std::vector<Tensor *> inputs(num_outputs(), nullptr);
    std::string trouble;
    const int code = backward_(context_.get(), outputs.data(), static_cast<int64_t>(outputs.size()),
                               inputs.data(), static_cast<int64_t>(inputs.size()), &trouble);
    variable_list grads(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::unique_ptr<Tensor> grad(inputs[i]);
      if (grad) grads[i] = *grad;
    }
    TORCH_CHECK(code == 0, trouble);
    return grads;
  }

  void release_variables() override { context_.reset(); }

 private:
  const Backward backward_;
  Context context_;
};

}  // namespace

extern "C" {

void phx_say(std::string *trouble, const char *text) { *trouble = text; }

// Makes `outputs`, new tensors without a graph, functions of `inputs`. `context` belongs to it from here on,
// and is dropped once nobody can ask for its backward any more: at once where nobody differentiates.
int phx_differentiable(const Tensor *const *inputs, int64_t n_inputs, const Tensor *const *outputs,
                       int64_t n_outputs, Backward backward, void *context, Drop drop) {
  Context owned(context, drop);
  return guarded([&] {
    torch::autograd::edge_list edges;
    bool wanted = false;
    for (int64_t i = 0; i < n_inputs; ++i) {
      wanted = wanted || inputs[i]->requires_grad();
      edges.push_back(torch::autograd::impl::gradient_edge(*inputs[i]));
    }
    if (!wanted || !at::GradMode::is_enabled()) return;
    const std::shared_ptr<Outside> node(new Outside(backward, std::move(owned)), torch::autograd::deleteNode);
    node->set_next_edges(std::move(edges));
    for (int64_t i = 0; i < n_outputs; ++i) torch::autograd::set_history(*outputs[i], node);
  });
}
}
