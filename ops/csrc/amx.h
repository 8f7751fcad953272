// What the files that use the CPU's matrix unit have in common: its set-up, and numbers moved within registers.
// For files that are compiled for AMX alone.
#pragma once

#include <immintrin.h>

#include "attention_strips.h"

namespace phx {
namespace {

constexpr int64_t kTileDeep = 32;  // numbers of a line in a tile

typedef __m512i Lines[16];

struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline __mmask32 first_32(int64_t n) { return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : (__mmask32{1} << n) - 1; }

inline __mmask16 first_16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// 16 x 16 numbers of 32 bits, turned over.
PHX_INLINE void turn(Lines r) {
  Lines t;
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Of the 16 columns from `first` on of two rows of 32 numbers, 16 pairs.
PHX_INLINE __m512i pairs(__m512i even, __m512i odd, int16_t first) {
  const __m512i within = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b,
                                          0x002a000a, 0x00290009, 0x00280008, 0x00270007, 0x00260006,
                                          0x00250005, 0x00240004, 0x00230003, 0x00220002, 0x00210001,
                                          0x00200000);
  return _mm512_permutex2var_epi16(even, _mm512_add_epi16(within, _mm512_set1_epi16(first)), odd);
}

PHX_INLINE __m512 wide(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PHX_INLINE __m256i rounded(__m512 full) { return (__m256i)_mm512_cvtneps_pbh(full); }

}  // namespace
}  // namespace phx
