// How the CPU's kernels use all threads: by tasks, each taken as soon as a thread is free.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace phx {

// Runs tasks 0 .. n on all threads, each as soon as a thread is free.
template <typename Body>
void on_all_threads(int64_t n, Body body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < n; task = next++) body(task);
  });
}

// Runs body(begin, end) over 0 .. n in ranges of `grain`, each as soon as a thread is free: cores that are
// shared with others are seldom equally fast.
template <typename Body>
void in_ranges(int64_t n, int64_t grain, Body body) {
  on_all_threads((n + grain - 1) / grain, [&](int64_t range) {
    body(range * grain, std::min(n, (range + 1) * grain));
  });
}

}  // namespace phx
