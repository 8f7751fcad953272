// Attention on the CPU by pieces of a pattern: which task computes what, on all threads, and how autograd
// sees it. Knows no pattern: pieces come from the caller, tiles are attention_tiles.cpp's.
//
// A task is one head of one sequence and a run of query blocks that the caller chose. Gradients of keys go
// to the task's own memory and are added up by key, in the order of pieces and tasks: no result depends on
// the number of threads.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "attention_tiles.h"
#include "guarded.h"
#include "product.h"
#include "threads.h"

extern "C" {

// A piece as the caller describes it; all arrays are copied.
struct PhxPiece {
  const int32_t *queries, *keys;
  int64_t n_queries, n_keys;
  const int32_t *first, *end;  // [n_rows, n_queries]: of each sequence, or one for all
  int64_t n_rows;
  const int32_t *blocks, *chunks;  // see phx::Piece; chunk c has the blocks chunks[c] .. chunks[c + 1]
  int64_t n_blocks, n_chunks;
};
}

namespace {

using at::Tensor;
using Numbers = std::vector<int32_t>;

struct Span {
  int64_t begin, end;  // keys of a chunk, in whole tiles
  int64_t offset;      // rows before it in the memory of its piece's tasks
};

struct OwnedPiece {
  Numbers queries, keys, first, end, blocks, chunks;
  int64_t n_rows;
  std::vector<Span> spans;  // [n_rows, chunks]
  int64_t span_rows = 0;    // of all spans of the sequence that has most

  explicit OwnedPiece(const PhxPiece &piece)
      : queries(piece.queries, piece.queries + piece.n_queries),
        keys(piece.keys, piece.keys + piece.n_keys),
        first(piece.first, piece.first + piece.n_rows * piece.n_queries),
        end(piece.end, piece.end + piece.n_rows * piece.n_queries),
        blocks(piece.blocks, piece.blocks + piece.n_blocks + 1),
        chunks(piece.chunks, piece.chunks + piece.n_chunks + 1),
        n_rows(piece.n_rows) {
    for (int64_t row = 0; row < n_rows; ++row) {
      int64_t rows = 0;
      for (int64_t chunk = 0; chunk < n_chunks(); ++chunk) {
        spans.push_back(span(row, chunk, rows));
        rows += spans.back().end - spans.back().begin;
      }
      span_rows = std::max(span_rows, rows);
    }
  }

  int64_t n_chunks() const { return static_cast<int64_t>(chunks.size()) - 1; }
  int64_t n_queries() const { return static_cast<int64_t>(queries.size()); }
  int64_t n_keys() const { return static_cast<int64_t>(keys.size()); }
  int64_t row(int64_t sequence) const { return n_rows == 1 ? 0 : sequence; }

  const Span &span_of(int64_t sequence, int64_t chunk) const {
    return spans[row(sequence) * n_chunks() + chunk];
  }

  Span span(int64_t row, int64_t chunk, int64_t offset) const {
    const int32_t *lows = first.data() + row * n_queries(), *highs = end.data() + row * n_queries();
    int64_t low = n_keys(), high = 0;
    for (int64_t i = blocks[chunks[chunk]]; i < blocks[chunks[chunk + 1]]; ++i) {
      if (lows[i] >= highs[i]) continue;
      low = std::min<int64_t>(low, lows[i]);
      high = std::max<int64_t>(high, highs[i]);
    }
    if (low >= high) return {0, 0, offset};
    const int64_t tile = phx::kTile;
    return {low / tile * tile, (high + tile - 1) / tile * tile, offset};
  }

  phx::Piece view(int64_t sequence) const {
    const int64_t at = row(sequence) * n_queries();
    return {queries.data(), keys.data(), n_keys(), first.data() + at, end.data() + at, blocks.data()};
  }
};

struct Plan : torch::CustomClassHolder {
  std::vector<OwnedPiece> pieces;
  bool half = false;  // products of bf16 tiles, not of fp32 ones
};

const phx::Kernels &kernels() {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return phx::attention_avx512;
  if (avx2) return phx::attention_avx2;
#endif
  return phx::attention_plain;
}

const c10::BFloat16 *bf16(const uint16_t *x) { return reinterpret_cast<const c10::BFloat16 *>(x); }

// oneDNN's bf16 products, packed as AMX and AVX512-BF16 want it, or as rows where libtorch emulates them.
template <bool kPacked>
struct Brgemm {
  static void product(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *packed,
                      float *c, int64_t ldc, bool add) {
    at::native::cpublas::brgemm(m, n, k, lda, n, ldc, add, bf16(a), bf16(packed), c, kPacked);
  }
  static void pack(int64_t k, int64_t n, const uint16_t *b, int64_t ldb, uint16_t *packed) {
    if (kPacked) {
      at::native::cpublas::pack(k, n, ldb, n, at::kBFloat16, at::kBFloat16, b, packed);
    } else {
      for (int64_t i = 0; i < k; ++i) std::copy_n(b + i * ldb, n, packed + i * n);
    }
  }
  static void release() { at::native::cpublas::brgemm_release(kPacked); }
  static constexpr phx::HalfProducts products = {product, pack, release};
};

const phx::HalfProducts *half_products() {
  static const bool packed = at::native::cpublas::could_pack(at::kBFloat16);
  return packed ? &Brgemm<true>::products : &Brgemm<false>::products;
}

// Whether bf16 tiles are multiplied faster than fp32 ones.
bool has_amx() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-bf16") && at::native::cpublas::could_pack(at::kBFloat16);
#else
  return false;
#endif
}

struct HalfRun {
  phx::Run forward, backward;
};

// What multiplies a task's bf16 tiles.
HalfRun half_run(const phx::Task &task) {
  if (phx::has_products() && phx::amx_attends(task.d)) return {phx::amx_forward, phx::amx_backward};
  return {kernels().half_forward, kernels().half_backward};
}

// [B, H, T, D] whose rows of D are contiguous, for kernels that take rows apart.
Tensor with_rows(const Tensor &x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// [B, H, T, D] in memory as [B, T, H, D]: what follows takes heads side by side.
Tensor heads_side_by_side(const Tensor &like, at::ScalarType kind) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options().dtype(kind))
      .transpose(1, 2);
}

phx::Rows rows_of(const Tensor &x, int64_t b, int64_t h) {
  const int64_t at = b * x.stride(0) + h * x.stride(1);
  return {static_cast<char *>(x.data_ptr()) + at * x.element_size(), x.stride(2)};
}

// One head's memory for the task that runs on this thread.
struct Scratch {
  std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t numel = 0;

  float *of(int64_t wanted) {
    if (wanted > numel) {
      const size_t bytes = (static_cast<size_t>(wanted) * sizeof(float) + 63) / 64 * 64;
      memory.reset(static_cast<float *>(std::aligned_alloc(64, bytes)));
      TORCH_CHECK(memory, "no memory for ", bytes, " bytes of attention's tiles");
      numel = wanted;
    }
    return memory.get();
  }
};

struct Inputs {
  Tensor q, k, v;
  double scale;
};

phx::Task task_of(const Inputs &inputs, const OwnedPiece &piece, int64_t b, int64_t h, int64_t chunk) {
  phx::Task task{};
  const Span &span = piece.span_of(b, chunk);
  task.piece = piece.view(b);
  task.block_begin = piece.chunks[chunk], task.block_end = piece.chunks[chunk + 1];
  task.key_begin = span.begin, task.key_end = span.end;
  task.d = inputs.q.size(3);
  task.scale = static_cast<float>(inputs.scale);
  task.bf16 = inputs.q.scalar_type() == at::kBFloat16;
  task.q = rows_of(inputs.q, b, h), task.k = rows_of(inputs.k, b, h), task.v = rows_of(inputs.v, b, h);
  return task;
}

// Output [B, H, T, D] as the inputs, and the scores' log-sum-exp [B, H, T] fp32.
std::pair<Tensor, Tensor> forward(const Inputs &inputs, const Plan &plan) {
  const Tensor &q = inputs.q;
  const int64_t heads = q.size(1), kind_pieces = static_cast<int64_t>(plan.pieces.size());
  const auto kind = kind_pieces == 1 ? q.scalar_type() : at::kFloat;
  const Tensor out = heads_side_by_side(q, kind);
  const Tensor lse = at::empty({q.size(0), heads, q.size(2)}, q.options().dtype(at::kFloat));
  for (const OwnedPiece &piece : plan.pieces) {
    const int64_t chunks = piece.n_chunks();
    phx::on_all_threads(q.size(0) * heads * chunks, [&](int64_t n) {
      static thread_local Scratch scratch;
      const int64_t b = n / chunks / heads, h = n / chunks % heads;
      phx::Task task = task_of(inputs, piece, b, h, n % chunks);
      task.begins = &piece == &plan.pieces.front();
      task.bf16_results = kind == at::kBFloat16;
      task.out = rows_of(out, b, h);
      task.lse = lse.mutable_data_ptr<float>() + (b * heads + h) * q.size(2);
      task.half = half_products();
      const phx::Run run = plan.half ? half_run(task).forward : kernels().forward;
      run(task, scratch.of(phx::scratch_numel(task, false)));
    });
  }
  return {out.to(q.scalar_type()), lse};
}

// Adds up what the tasks of a piece have for its keys, key by key.
void gather_key_gradients(const OwnedPiece &piece, bool begins, const Tensor &partial, const Tensor &grad_k,
                          const Tensor &grad_v) {
  const int64_t heads = grad_k.size(1), d = grad_k.size(3), width = phx::padded(d);
  const int64_t chunks = piece.n_chunks(), tiles = (piece.n_keys() + phx::kTile - 1) / phx::kTile;
  const bool bf16 = grad_k.scalar_type() == at::kBFloat16;
  phx::on_all_threads(grad_k.size(0) * heads * tiles, [&](int64_t n) {
    const int64_t b = n / tiles / heads, h = n / tiles % heads, tile = n % tiles * phx::kTile;
    std::vector<float> sum(width);
    for (int of_values = 0; of_values < 2; ++of_values) {
      const phx::Rows to = rows_of(of_values ? grad_v : grad_k, b, h);
      const float *from = partial.const_data_ptr<float>() +
                          ((b * heads + h) * 2 + of_values) * piece.span_rows * width;
      std::vector<const float *> parts;  // of the tile: spans are whole tiles
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Span &span = piece.span_of(b, chunk);
        if (tile >= span.begin && tile < span.end) parts.push_back(from + (span.offset + tile - span.begin) * width);
      }
      for (int64_t i = 0; i < std::min(phx::kTile, piece.n_keys() - tile); ++i) {
        const int64_t at = piece.keys[tile + i] * to.stride;
        float *row = bf16 ? sum.data() : static_cast<float *>(to.data) + at;
        if (begins) std::fill_n(row, d, 0.0f);
        for (const float *part : parts)
          for (int64_t j = 0; j < d; ++j) row[j] += part[i * width + j];
        auto *half = static_cast<c10::BFloat16 *>(to.data) + at;
        for (int64_t j = 0; bf16 && j < d; ++j) half[j] = row[j];
      }
    }
  });
}

// Gradients of the inputs, given those of the output; `out` and `lse` are those of all pieces together.
std::array<Tensor, 3> backward(const Inputs &inputs, const Plan &plan, const Tensor &out, const Tensor &lse,
                               const Tensor &grad_out) {
  const Tensor &q = inputs.q;
  const int64_t heads = q.size(1), width = phx::padded(q.size(3));
  const auto kind = plan.pieces.size() == 1 ? q.scalar_type() : at::kFloat;
  const Tensor grad_q = heads_side_by_side(q, kind), grad_k = heads_side_by_side(q, kind),
               grad_v = heads_side_by_side(q, kind);
  const Tensor delta = at::empty_like(lse);
  for (const OwnedPiece &piece : plan.pieces) {
    const int64_t chunks = piece.n_chunks();
    const bool begins = &piece == &plan.pieces.front();
    const Tensor partial =
        at::empty({q.size(0), heads, 2, piece.span_rows, width}, q.options().dtype(at::kFloat));
    phx::on_all_threads(q.size(0) * heads * chunks, [&](int64_t n) {
      static thread_local Scratch scratch;
      const int64_t b = n / chunks / heads, h = n / chunks % heads, chunk = n % chunks;
      phx::Task task = task_of(inputs, piece, b, h, chunk);
      task.begins = begins;
      task.bf16_results = kind == at::kBFloat16;
      task.out = rows_of(out, b, h), task.grad_out = rows_of(grad_out, b, h);
      task.grad_q = rows_of(grad_q, b, h);
      task.lse = lse.mutable_data_ptr<float>() + (b * heads + h) * q.size(2);
      task.delta = delta.mutable_data_ptr<float>() + (b * heads + h) * q.size(2);
      task.grad_k = partial.mutable_data_ptr<float>() +
                    ((b * heads + h) * 2 * piece.span_rows + piece.span_of(b, chunk).offset) * width;
      task.grad_v = task.grad_k + piece.span_rows * width;
      task.half = half_products();
      const phx::Run run = plan.half ? half_run(task).backward : kernels().backward;
      run(task, scratch.of(phx::scratch_numel(task, true)));
    });
    gather_key_gradients(piece, begins, partial, grad_k, grad_v);
  }
  const auto as_inputs = [&](const Tensor &x) { return x.to(q.scalar_type()); };
  return {as_inputs(grad_q), as_inputs(grad_k), as_inputs(grad_v)};
}

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &q, const Tensor &k,
                        const Tensor &v, const c10::intrusive_ptr<Plan> &plan) {
    const Inputs inputs{with_rows(q), with_rows(k), with_rows(v), 1.0 / std::sqrt(q.size(3))};
    const auto [out, lse] = ::forward(inputs, *plan);
    context->save_for_backward({inputs.q, inputs.k, inputs.v, out, lse});
    context->saved_data["plan"] = c10::IValue::make_capsule(plan);
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 const torch::autograd::variable_list &grads) {
    const auto saved = context->get_saved_variables();
    const auto plan = c10::static_intrusive_pointer_cast<Plan>(context->saved_data["plan"].toCapsule());
    const Inputs inputs{saved[0], saved[1], saved[2], 1.0 / std::sqrt(saved[0].size(3))};
    const auto [q, k, v] = ::backward(inputs, *plan, saved[3], saved[4], with_rows(grads[0]));
    return {q, k, v, Tensor()};
  }
};

c10::intrusive_ptr<Plan> plan_of(const PhxPiece *pieces, int64_t n, bool half) {
  auto plan = c10::make_intrusive<Plan>();
  plan->half = half;
  for (int64_t i = 0; i < n; ++i) plan->pieces.emplace_back(pieces[i]);
  return plan;
}

// A band over T positions as a plan of one piece and one chunk.
Plan band(int64_t t, int64_t window) {
  Numbers all(t), first(t), end(t), blocks;
  for (int64_t i = 0; i < t; ++i) {
    all[i] = i, first[i] = std::max<int64_t>(0, i + 1 - window), end[i] = i + 1;
    if (i % phx::kTile == 0) blocks.push_back(i);
  }
  const int32_t chunks[] = {0, static_cast<int32_t>(blocks.size())};
  const auto n_blocks = static_cast<int64_t>(blocks.size());
  blocks.push_back(t);
  Plan plan;
  plan.pieces.emplace_back(PhxPiece{all.data(), all.data(), t, t, first.data(), end.data(), 1,
                                    blocks.data(), chunks, n_blocks, 1});
  return plan;
}

Inputs inputs_of(const Tensor &q, const Tensor &k, const Tensor &v) {
  return {with_rows(q), with_rows(k), with_rows(v), 1.0 / std::sqrt(q.size(3))};
}

}  // namespace

namespace phx {

std::pair<Tensor, Tensor> band_forward(const Tensor &q, const Tensor &k, const Tensor &v, int64_t window) {
  return forward(inputs_of(q, k, v), band(q.size(2), window));
}

std::array<Tensor, 3> band_backward(const Tensor &q, const Tensor &k, const Tensor &v, int64_t window,
                                    const Tensor &out, const Tensor &lse, const Tensor &grad_out) {
  const Plan plan = band(q.size(2), window);
  return backward(inputs_of(q, k, v), plan, with_rows(out), lse, with_rows(grad_out));
}

}  // namespace phx

extern "C" {

// Attention of queries, keys and values [B, H, T, D], fp32 or bf16, over the pairs of the pieces, with its
// gradient. bf16 is multiplied as it is where the CPU has AMX, or where `half` asks for it, and widened to
// fp32 elsewhere. Null after a failure.
at::Tensor *phx_attention(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v,
                          const PhxPiece *pieces, int64_t n_pieces, int half) {
  at::Tensor *result = nullptr;
  guarded([&] {
    TORCH_CHECK(q->dim() == 4 && q->sizes() == k->sizes() && q->sizes() == v->sizes(),
                "attention takes three tensors [B, H, T, D], got ", q->sizes(), ", ", k->sizes(), " and ",
                v->sizes());
    TORCH_CHECK(q->scalar_type() == k->scalar_type() && q->scalar_type() == v->scalar_type() &&
                    (q->scalar_type() == at::kFloat || q->scalar_type() == at::kBFloat16),
                "attention's kernel takes fp32 or bf16, got ", q->scalar_type());
    TORCH_CHECK(q->size(3) <= 1024, "attention's kernel takes heads of at most 1024 numbers, got ", q->size(3));
    const bool is_half = q->scalar_type() == at::kBFloat16 && (half || has_amx());
    result = new Tensor(Attention::apply(*q, *k, *v, plan_of(pieces, n_pieces, is_half)));
  });
  return result;
}
}
