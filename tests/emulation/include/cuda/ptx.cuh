// Shadows csrc/cuda/ptx.cuh, function by function.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "emulator_float.h"

namespace vlm::ptx {

template <class T>
VLM_EMU_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emu::mma_m16n8k16(std::is_same_v<T, __nv_bfloat16>, d, a, b);
}

VLM_EMU_INLINE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma_m16n8k8_tf32(d, a, b);
}

template <int N>
VLM_EMU_INLINE void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  emu::ldmatrix(N, false, r, row);
}

template <int N>
VLM_EMU_INLINE void ldmatrix_trans(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  emu::ldmatrix(N, true, r, row);
}

VLM_EMU_INLINE void cp_async_16(void* shared, const void* global, int bytes = 16) {
  emu::cp_async(shared, global, 16, bytes);
}
VLM_EMU_INLINE void cp_async_8(void* shared, const void* global, int bytes = 8) {
  emu::cp_async(shared, global, 8, bytes);
}
VLM_EMU_INLINE void cp_async_4(void* shared, const void* global, int bytes = 4) {
  emu::cp_async(shared, global, 4, bytes);
}
VLM_EMU_INLINE void cp_async_commit() { emu::cp_async_commit(); }

template <int N>
VLM_EMU_INLINE void cp_async_wait() {
  emu::cp_async_wait(N);
}

// Exact up to the last bit, where the device's has an error of 2^-22.
VLM_EMU_INLINE float exp2_approx(float x) {
  constexpr float kSmallest = 0x1p-126f;
  const float y = exp2f(fabsf(x) < kSmallest ? 0.f : x);
  return y < kSmallest ? 0.f : y;
}

template <class T>
VLM_EMU_INLINE uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return emu::float_to_bf16(low) | static_cast<uint32_t>(emu::float_to_bf16(high)) << 16;
  } else {
    return emu::float_to_half(low) | static_cast<uint32_t>(emu::float_to_half(high)) << 16;
  }
}

VLM_EMU_INLINE uint32_t round_tf32(float x) { return emu::float_to_tf32(x); }

}  // namespace vlm::ptx
