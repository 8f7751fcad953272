// Linear layers and the head's loss on the CPU's matrix unit, as autograd and tch see them: what is multiplied
// on which thread. A weight whose gradient is fp32 already has the product added to it in place; no copy of
// a gradient is made and nothing of it is rounded.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <memory>
#include <optional>

#include "guarded.h"
#include "product.h"
#include "threads.h"

namespace {

using at::Tensor;

// The kernel lends a process the unit's registers when it is asked to, once.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

bool has_products() {
  static const bool has = phx::amx_was_built() && may_use_tiles();
  return has;
}

uint16_t *halves(const Tensor &x) { return static_cast<uint16_t *>(x.data_ptr()); }

uint16_t *scratch(int64_t numel) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  static thread_local int64_t size = 0;
  if (numel > size) {
    const size_t bytes = (static_cast<size_t>(numel) * 2 + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    TORCH_CHECK(memory, "no memory for ", bytes, " bytes of a product's panels");
    size = numel;
  }
  return static_cast<uint16_t *>(memory.get());
}

int64_t panels(int64_t n) { return (n + phx::kPanel - 1) / phx::kPanel; }

// Divides a product by columns where its left lines are read as they lie, each task a block of packed right
// lines; else by rows, so that each left line is packed once.
void multiply(const phx::Product &product, int64_t rows_of_task = 512) {
  const bool by_cols = product.left.along && product.deep <= 4 * product.cols;
  const int64_t all = by_cols ? product.cols : product.rows, threads = at::get_num_threads();
  const int64_t of_task = by_cols ? phx::product_block(product) : rows_of_task;
  int64_t tasks = (all + of_task - 1) / of_task;
  tasks = std::min(panels(all), (tasks + threads - 1) / threads * threads);
  const auto edge = [&](int64_t task) { return std::min(all, panels(all) * task / tasks * phx::kPanel); };
  phx::on_all_threads(tasks, [&](int64_t task) {
    const int64_t begin = edge(task), end = edge(task + 1);
    const phx::Part part = by_cols ? phx::Part{0, product.rows, begin, end}
                                   : phx::Part{begin, end, 0, product.cols};
    phx::product(product, part, scratch(phx::product_scratch(product)));
  });
}

void add_column_sums(const Tensor &x, float *sums) {
  const int64_t rows = x.size(0), cols = x.size(1), strips = (cols + 127) / 128;
  phx::on_all_threads(strips, [&](int64_t strip) {
    const int64_t at = strip * 128;
    phx::add_column_sums(halves(x) + at, cols, rows, std::min<int64_t>(128, cols - at), sums + at);
  });
}

// Where the gradient of a parameter is to be added in place, if that is so.
bool takes_sums(const Tensor &grad) {
  return grad.defined() && grad.scalar_type() == at::kFloat && grad.is_contiguous();
}

Tensor rows_of(const Tensor &x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

// y[M, N] = x[M, K] w[N, K]^T + b[N]
struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &x, const Tensor &w,
                        const std::optional<Tensor> &bias_or_none) {
    const Tensor b = bias_or_none.value_or(Tensor());
    const Tensor rows = rows_of(x);
    const int64_t m = rows.size(0), n = w.size(0), k = w.size(1);
    auto shape = x.sizes().vec();
    shape.back() = n;
    const Tensor y = at::empty(shape, x.options());
    const uint16_t *bias = b.defined() ? halves(b) : nullptr;
    multiply({{halves(rows), k, true}, {halves(w), k, true}, {halves(y), nullptr, n, bias, false}, m, n, k});
    context->save_for_backward({rows, w, b});
    context->saved_data["shape"] = x.sizes().vec();
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 const torch::autograd::variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &b = saved[2];
    const Tensor dy = rows_of(grads[0]);
    const int64_t m = x.size(0), n = w.size(0), k = w.size(1);
    Tensor dx, dw, db;
    if (context->needs_input_grad(0)) {
      dx = at::empty(context->saved_data["shape"].toIntVector(), x.options());
      multiply({{halves(dy), n, true}, {halves(w), k, false}, {halves(dx), nullptr, k, nullptr, false}, m, k, n});
    }
    if (context->needs_input_grad(1)) dw = parameter_grad(w, [&](float *sums) {
      multiply({{halves(dy), n, false}, {halves(x), k, false}, {nullptr, sums, k, nullptr, true}, n, k, m});
    });
    if (b.defined() && context->needs_input_grad(2))
      db = parameter_grad(b, [&](float *sums) { add_column_sums(dy, sums); });
    return {dx, dw, db};
  }

  // Adds to the parameter's own gradient, which leaves autograd nothing to do, or returns one.
  template <typename Add>
  static Tensor parameter_grad(const Tensor &parameter, Add add) {
    const Tensor &own = parameter.grad();
    if (takes_sums(own)) {
      add(own.data_ptr<float>());
      return Tensor();
    }
    const Tensor sums = at::zeros(parameter.sizes(), parameter.options().dtype(at::kFloat));
    add(sums.data_ptr<float>());
    return sums.to(parameter.scalar_type());
  }
};

// The sum of the cross-entropies of rows of logits [N, V padded], over which their gradients are written.
double cross_entropy(const Tensor &logits, const Tensor &targets, int64_t vocab, double scale) {
  const int64_t n = logits.size(0), padded = logits.size(1);
  const int64_t *const target = targets.data_ptr<int64_t>();
  uint16_t *const rows = halves(logits);
  const Tensor losses = at::empty({n}, targets.options().dtype(at::kDouble));
  double *const loss = losses.data_ptr<double>();
  double nats = 0;
  phx::on_all_threads(n, [&](int64_t i) {
    loss[i] = phx::cross_entropy_row(rows + i * padded, vocab, padded, target[i], static_cast<float>(scale));
  });
  for (int64_t i = 0; i < n; ++i) nats += loss[i];
  return nats;
}

}  // namespace

extern "C" {

// Whether bf16 is multiplied by the functions below.
int phx_has_products() { return has_products(); }

// x[..., K] w[N, K]^T + b[N], all bf16, the parameters contiguous; b may be null.
at::Tensor *phx_linear(const at::Tensor *x, const at::Tensor *w, const at::Tensor *b) {
  at::Tensor *result = nullptr;
  guarded([&] { result = new at::Tensor(Linear::apply(*x, *w, b ? std::make_optional(*b) : std::nullopt)); });
  return result;
}

// The loss alone: of logits [N, V padded] bf16 against targets [N] i64, as below.
int phx_cross_entropy(const at::Tensor *logits, const at::Tensor *targets, int64_t vocab, double scale, double *nats) {
  return guarded([&] { *nats += cross_entropy(*logits, *targets, vocab, scale); });
}

// Hidden states [N, C] bf16 against the first `vocab` rows of a head [V padded, C] bf16: adds the sum of the
// cross-entropies against targets [N] i64 to `nats`, the head's gradient of it times `scale` to head_grad
// [V padded, C] fp32, and writes that of the hidden states. `logits` is scratch, [N, V padded] bf16.
int phx_head_loss(const at::Tensor *hidden, const at::Tensor *head, const at::Tensor *targets, int64_t vocab,
                  double scale, const at::Tensor *logits, const at::Tensor *head_grad,
                  const at::Tensor *hidden_grad, double *nats) {
  return guarded([&] {
    const int64_t n = hidden->size(0), c = hidden->size(1), padded = head->size(0);
    uint16_t *const rows = halves(*logits);
    multiply({{halves(*hidden), c, true}, {halves(*head), c, true}, {rows, nullptr, padded, nullptr, false}, n,
              padded, c});
    *nats += cross_entropy(*logits, *targets, vocab, scale);
    const Tensor grad = at::empty({n, c}, hidden->options().dtype(at::kFloat));
    const int64_t threads = at::get_num_threads();
    multiply({{rows, padded, true}, {halves(*head), c, false}, {nullptr, grad.data_ptr<float>(), c, nullptr, false},
              n, c, padded}, (n + threads - 1) / threads);
    hidden_grad->copy_(grad);
    multiply({{rows, padded, false}, {halves(*hidden), c, false},
              {nullptr, head_grad->data_ptr<float>(), c, nullptr, true}, padded, c, n}, 2048);
  });
}
}
