// Linear layers and the head's loss on the CPU's matrix unit, as autograd and tch see them: what is multiplied
// on which thread. A weight whose gradient is fp32 already has the product added to it in place; no copy of
// a gradient is made and nothing of it is rounded.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
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

uint16_t *halves(const Tensor &x) { return static_cast<uint16_t *>(x.data_ptr()); }

// Memory for packed lines that the thread keeps, aligned to 64 bytes.
struct Panels {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t size = 0;

  uint16_t *of(int64_t numel) {
    if (numel > size) {
      const size_t bytes = (static_cast<size_t>(numel) * 2 + 63) / 64 * 64;
      memory.reset(std::aligned_alloc(64, bytes));
      TORCH_CHECK(memory, "no memory for ", bytes, " bytes of a product's panels");
      size = numel;
    }
    return static_cast<uint16_t *>(memory.get());
  }
};

uint16_t *scratch(int64_t numel) {
  static thread_local Panels panels;
  return panels.of(numel);
}

int64_t panels(int64_t n) { return (n + phx::kPanel - 1) / phx::kPanel; }

constexpr int64_t kMostPacked = 16 << 20;  // numbers; more right lines are packed by each task for itself
constexpr int64_t kTasksOfThread = 4;      // cores that are shared with others are seldom equally fast
constexpr int64_t kLeastCols = 128, kRows = 256;

// Calls body(begin, end) for `all` lines in tasks of about `of_task`, cut between panels.
template <typename Body>
void by_panels(int64_t all, int64_t of_task, Body body) {
  const int64_t tasks = std::min(panels(all), (all + of_task - 1) / of_task);
  const auto edge = [&](int64_t task) { return std::min(all, panels(all) * task / tasks * phx::kPanel); };
  phx::on_all_threads(tasks, [&](int64_t task) { body(edge(task), edge(task + 1)); });
}

// Divides a product by columns where its left lines are read as they lie, each task packing its own right
// lines; else by rows, after the right lines have been packed for all of them if they are not too many.
void multiply(const phx::Product &product) {
  const int64_t rows = product.rows, cols = product.cols, threads = at::get_num_threads();
  if (product.left.along && product.deep <= 4 * cols) {
    const int64_t even = cols / (threads * kTasksOfThread), block = phx::product_block(product);
    by_panels(cols, std::min(block, std::max(kLeastCols, even)), [&](int64_t begin, int64_t end) {
      phx::product(product, {0, rows, begin, end}, nullptr, scratch(phx::product_scratch(product, false)));
    });
    return;
  }
  if (phx::packed_numel(product) > kMostPacked) {
    by_panels(rows, (rows + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      phx::product(product, {begin, end, 0, cols}, nullptr, scratch(phx::product_scratch(product, false)));
    });
    return;
  }
  static thread_local Panels packed;
  uint16_t *const right = packed.of(phx::packed_numel(product));
  phx::on_all_threads(panels(cols), [&](int64_t panel) { phx::pack_panel(product, panel, right); });
  by_panels(rows, kRows, [&](int64_t begin, int64_t end) {
    phx::product(product, {begin, end, 0, cols}, right, scratch(phx::product_scratch(product, true)));
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

// Adds to a parameter's own gradient, which leaves autograd nothing to do, or returns one.
template <typename Add>
Tensor parameter_grad(const Tensor &parameter, Add add) {
  const Tensor &own = parameter.grad();
  if (takes_sums(own)) {
    add(own.data_ptr<float>());
    return Tensor();
  }
  const Tensor sums = at::zeros(parameter.sizes(), parameter.options().dtype(at::kFloat));
  add(sums.data_ptr<float>());
  return sums.to(parameter.scalar_type());
}

// y[M, N] = x[M, K] w[N, K]^T + b[N], along a curve if there is one.
void forward(const Tensor &x, const Tensor &w, const Tensor &b, const Tensor &y, const phx::Curve *curve) {
  const int64_t m = x.size(0), n = w.size(0), k = w.size(1);
  const uint16_t *bias = b.defined() ? halves(b) : nullptr;
  multiply({{halves(x), k, true}, {halves(w), k, true}, {halves(y), nullptr, n, bias, false, curve}, m, n, k});
}

// dx[M, K] = dy[M, N] w[N, K], along a curve if there is one.
void input_grad(const Tensor &dy, const Tensor &w, const Tensor &dx, const phx::Curve *curve) {
  const int64_t m = dy.size(0), n = w.size(0), k = w.size(1);
  multiply({{halves(dy), n, true}, {halves(w), k, false}, {halves(dx), nullptr, k, nullptr, false, curve}, m, k, n});
}

// Of dw[N, K] = dy[M, N]^T x[M, K] and db[N] those that are wanted and do not go where they belong.
std::array<Tensor, 2> parameter_grads(const Tensor &dy, const Tensor &x, const Tensor &w, const Tensor &b,
                                      bool of_w, bool of_b) {
  const int64_t m = x.size(0), n = w.size(0), k = w.size(1);
  std::array<Tensor, 2> grads;
  if (of_w) grads[0] = parameter_grad(w, [&](float *sums) {
    multiply({{halves(dy), n, false}, {halves(x), k, false}, {nullptr, sums, k, nullptr, true}, n, k, m});
  });
  if (of_b) grads[1] = parameter_grad(b, [&](float *sums) { add_column_sums(dy, sums); });
  return grads;
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &x, const Tensor &w,
                        const std::optional<Tensor> &bias) {
    const Tensor b = bias.value_or(Tensor()), rows = rows_of(x);
    auto shape = x.sizes().vec();
    shape.back() = w.size(0);
    const Tensor y = at::empty(shape, x.options());
    ::forward(rows, w, b, y, nullptr);
    context->save_for_backward({rows, w, b});
    context->saved_data["shape"] = x.sizes().vec();
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 const torch::autograd::variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &b = saved[2];
    const Tensor dy = rows_of(grads[0]);
    Tensor dx;
    if (context->needs_input_grad(0)) {
      dx = at::empty(context->saved_data["shape"].toIntVector(), x.options());
      input_grad(dy, w, dx, nullptr);
    }
    const bool of_b = b.defined() && context->needs_input_grad(2);  // what is not there is not counted
    const auto [dw, db] = parameter_grads(dy, x, w, b, context->needs_input_grad(1), of_b);
    return {dx, dw, db};
  }
};

// y = GELU(x w1^T + b1) w2^T + b2, with the GELU and its slope taken while sums are written. What comes of the
// GELU is not kept: where backward takes the slope it has the value too.
struct Mlp : torch::autograd::Function<Mlp> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &x, const Tensor &w1,
                        const Tensor &b1, const Tensor &w2, const Tensor &b2, int64_t kind) {
    const Tensor rows = rows_of(x), hidden = at::empty({rows.size(0), w1.size(0)}, x.options());
    const Tensor after = at::empty_like(hidden);
    const phx::Curve curve{static_cast<phx::Gelu>(kind), halves(after), nullptr};
    ::forward(rows, w1, b1, hidden, &curve);
    auto shape = x.sizes().vec();
    shape.back() = w2.size(0);
    const Tensor y = at::empty(shape, x.options());
    ::forward(after, w2, b2, y, nullptr);
    context->save_for_backward({rows, w1, b1, hidden, w2, b2});
    context->saved_data["shape"] = x.sizes().vec();
    context->saved_data["kind"] = kind;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 const torch::autograd::variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &w1 = saved[1], &b1 = saved[2], &hidden = saved[3], &w2 = saved[4], &b2 = saved[5];
    const auto wanted = [&](int64_t i) { return context->needs_input_grad(i); };
    const Tensor dy = rows_of(grads[0]), dhidden = at::empty_like(hidden), after = at::empty_like(hidden);
    const auto kind = static_cast<phx::Gelu>(context->saved_data["kind"].toInt());
    const phx::Curve slope{kind, halves(after), halves(hidden)};
    input_grad(dy, w2, dhidden, &slope);
    const auto [dw2, db2] = parameter_grads(dy, after, w2, b2, wanted(3), wanted(4));
    Tensor dx;
    if (wanted(0)) {
      dx = at::empty(context->saved_data["shape"].toIntVector(), x.options());
      input_grad(dhidden, w1, dx, nullptr);
    }
    const auto [dw1, db1] = parameter_grads(dhidden, x, w1, b1, wanted(1), wanted(2));
    return {dx, dw1, db1, dw2, db2, Tensor()};
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

namespace phx {

bool has_products() {
  static const bool has = amx_was_built() && may_use_tiles();
  return has;
}

}  // namespace phx

extern "C" {

// Whether bf16 is multiplied by the functions below.
int phx_has_products() { return phx::has_products(); }

// x[..., K] w[N, K]^T + b[N], all bf16, the parameters contiguous; b may be null.
at::Tensor *phx_linear(const at::Tensor *x, const at::Tensor *w, const at::Tensor *b) {
  at::Tensor *result = nullptr;
  guarded([&] { result = new at::Tensor(Linear::apply(*x, *w, b ? std::make_optional(*b) : std::nullopt)); });
  return result;
}

// x[..., K] through w1[H, K], b1[H], a GELU (0 by its tanh, 1 as it is defined), w2[N, H] and b2[N], all bf16,
// the parameters contiguous.
at::Tensor *phx_mlp(const at::Tensor *x, const at::Tensor *w1, const at::Tensor *b1, const at::Tensor *w2,
                    const at::Tensor *b2, int kind) {
  at::Tensor *result = nullptr;
  guarded([&] { result = new at::Tensor(Mlp::apply(*x, *w1, *b1, *w2, *b2, static_cast<int64_t>(kind))); });
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
    multiply({{rows, padded, true}, {halves(*head), c, false}, {nullptr, grad.data_ptr<float>(), c, nullptr, false},
              n, c, padded});
    hidden_grad->copy_(grad);
    multiply({{rows, padded, false}, {halves(*hidden), c, false},
              {nullptr, head_grad->data_ptr<float>(), c, nullptr, true}, padded, c, n});
  });
}
}
