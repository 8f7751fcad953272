// What kernels are written in, on a GPU; host.h has the same for the host. Knows no kernel.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define PHX_KERNEL extern "C" __global__
#define PHX_DEVICE __device__ __forceinline__
#define PHX_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

// The value of the lane whose number differs from this one's by `mask`. All lanes of a warp call it.
PHX_DEVICE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

PHX_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
PHX_DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

// To nearest even; a NaN stays one.
PHX_DEVICE u16 rounded_to_bf16(float x) {
#if __CUDA_ARCH__ >= 800
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
