// Runs kernels on the host, with the arguments a launch would give a GPU: how they are tested without one.
// Nothing but tests refers to it.

#include "host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <utility>
#include <vector>

namespace norm {
#include "common.cuh"
#include "norm.cu"
}  // namespace norm
namespace gelu {
#include "common.cuh"
#include "gelu.cu"
}  // namespace gelu
namespace cross_entropy {
#include "common.cuh"
#include "cross_entropy.cu"
}  // namespace cross_entropy
namespace adamw {
#include "common.cuh"
#include "adamw.cu"
}  // namespace adamw
namespace dropout {
#include "common.cuh"
#include "dropout.cu"
}  // namespace dropout

namespace {

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

constexpr size_t kStack = 64 << 10;
constexpr u32 kMostThreads = 1024;

using Kernel = void (*)(void **);

// The block that is running.
struct Block {
  Kernel kernel;
  void **arguments;
  u32 threads;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers = std::vector<ucontext_t>(kMostThreads);
  std::vector<State> states = std::vector<State>(kMostThreads);
  float lanes[kMostThreads / 32][32];
  char *stacks = static_cast<char *>(mmap(nullptr, kStack *kMostThreads, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
};

Block &block() {
  static thread_local Block one;
  return one;
}

void wait(State at) {
  Block &b = block();
  const u32 me = threadIdx.x;
  b.states[me] = at;
  swapcontext(&b.fibers[me], &b.scheduler);
}

void run_fiber() {
  Block &b = block();
  b.kernel(b.arguments);
  wait(kDone);
}

// Lets those go on who have all come to their barrier; false where somebody will never come.
bool release(Block &b) {
  bool any = false, all_at_block_barrier = true;
  for (u32 warp = 0; warp < b.threads / 32; ++warp) {
    bool whole = true;
    for (u32 lane = 0; lane < 32; ++lane) {
      whole &= b.states[warp * 32 + lane] == kAtWarpBarrier;
      all_at_block_barrier &= b.states[warp * 32 + lane] == kAtBlockBarrier;
    }
    for (u32 lane = 0; whole && lane < 32; ++lane) b.states[warp * 32 + lane] = kReady;
    any |= whole;
  }
  if (!any && all_at_block_barrier) {
    for (u32 thread = 0; thread < b.threads; ++thread) b.states[thread] = kReady;
    any = true;
  }
  return any;
}

bool run_block(Block &b) {
  for (u32 thread = 0; thread < b.threads; ++thread) {
    b.states[thread] = kReady;
    getcontext(&b.fibers[thread]);
    b.fibers[thread].uc_stack.ss_sp = b.stacks + thread * kStack;
    b.fibers[thread].uc_stack.ss_size = kStack;
    b.fibers[thread].uc_link = nullptr;
    makecontext(&b.fibers[thread], run_fiber, 0);
  }
  for (;;) {
    bool alive = false;
    for (u32 thread = 0; thread < b.threads; ++thread) {
      if (b.states[thread] != kReady) continue;
      threadIdx = {thread, 0};
      swapcontext(&b.scheduler, &b.fibers[thread]);
    }
    for (u32 thread = 0; thread < b.threads; ++thread) alive |= b.states[thread] != kDone;
    if (!alive) return true;
    if (!release(b)) return false;
  }
}

// A kernel whose arguments lie behind pointers, as a launch has them.
template <auto Function>
struct Launched;

template <typename... Arguments, void (*Function)(Arguments...)>
struct Launched<Function> {
  static void call(void **arguments) { spread(arguments, std::index_sequence_for<Arguments...>()); }

  template <size_t... I>
  static void spread(void **arguments, std::index_sequence<I...>) {
    Function(*static_cast<Arguments *>(arguments[I])...);
  }
};

struct Entry {
  const char *name;
  Kernel kernel;
};

#define PHX_ENTRY(family, name) {#name, Launched<family::name>::call}
#define PHX_ENTRIES(family, name)                                                             \
  PHX_ENTRY(family, name##_f32x1), PHX_ENTRY(family, name##_f32x4), PHX_ENTRY(family, name##_bf16x1), \
      PHX_ENTRY(family, name##_bf16x8)

const Entry kEntries[] = {
    PHX_ENTRIES(norm, norm_forward),
    PHX_ENTRIES(norm, norm_backward),
    PHX_ENTRY(norm, norm_columns),
    PHX_ENTRIES(gelu, gelu_forward),
    PHX_ENTRIES(gelu, gelu_backward),
    PHX_ENTRY(gelu, gelu_columns),
    PHX_ENTRIES(cross_entropy, cross_entropy),
    PHX_ENTRY(adamw, adamw),
    PHX_ENTRY(adamw, chunk_squares),
    PHX_ENTRY(dropout, dropout_f32),
    PHX_ENTRY(dropout, dropout_bf16),
};

}  // namespace

void phx_wait_for_block() { wait(kAtBlockBarrier); }
void phx_wait_for_warp() { wait(kAtWarpBarrier); }
float *phx_lanes() { return block().lanes[threadIdx.x / 32]; }

// Runs a kernel by its name. 0: done; 1: there is no such kernel, or no such block; 2: a thread did not come
// to a barrier.
extern "C" int phx_run_on_host(const char *name, u32 grid_x, u32 grid_y, u32 threads, u32 shared_bytes,
                               void **arguments) {
  Block &b = block();
  b.kernel = nullptr;
  for (const Entry &entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0) b.kernel = entry.kernel;
  }
  if (b.kernel == nullptr || threads == 0 || threads % 32 != 0 || threads > kMostThreads) return 1;
  b.arguments = arguments;
  b.threads = threads;
  // Whoever reads what nobody has written finds a NaN.
  std::vector<u32> shared(shared_bytes / 4 + 1);
  blockDim = {threads, 1};
  gridDim = {grid_x, grid_y};
  for (u32 y = 0; y < grid_y; ++y) {
    for (u32 x = 0; x < grid_x; ++x) {
      blockIdx = {x, y};
      shared.assign(shared.size(), 0x7fc00000u);
      phx_dynamic_shared = shared.data();
      if (!run_block(b)) return 2;
    }
  }
  return 0;
}
