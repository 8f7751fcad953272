// What kernels are written in, on the host, where they are tried: gpu.cuh's words, with a fiber for each
// CUDA thread. A barrier or a shuffle hands over to the next fiber, so blocks run one after the other, and
// always in the same order. A thread that does not come to a barrier is an error, as it is on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef long long i64;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef uint16_t u16;

struct Index {
  u32 x, y;
};

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// Memory of a block that its launch asks for.
inline thread_local void *phx_dynamic_shared;

// Return when all threads of the block, or of the warp, have come.
void phx_wait_for_block();
void phx_wait_for_warp();

// A place for a value of each lane of this thread's warp.
float *phx_lanes();

#define PHX_KERNEL static
#define PHX_DEVICE static inline
#define PHX_DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(phx_dynamic_shared)
#define __shared__ static thread_local
#define __syncthreads phx_wait_for_block

PHX_DEVICE float from_lane_xor(float x, int mask) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  phx_lanes()[lane] = x;
  phx_wait_for_warp();
  const float other = phx_lanes()[lane ^ mask];
  phx_wait_for_warp();
  return other;
}

PHX_DEVICE u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

PHX_DEVICE float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

PHX_DEVICE u16 rounded_to_bf16(float x) {
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
