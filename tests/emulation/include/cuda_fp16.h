// Shadows CUDA's header of the same name: the part that the kernels use.
#pragma once

#include <cuda_runtime.h>

#include "emulator_float.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(vlm::emu::float_to_half(x)) {}
  __half(double x) : __half(static_cast<float>(x)) {}
  __half(int x) : __half(static_cast<float>(x)) {}
  operator float() const { return vlm::emu::half_to_float(bits); }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

#define VLM_EMU_OPERATOR(op)                               \
  inline __half operator op(__half a, __half b) {          \
    return static_cast<float>(a) op static_cast<float>(b); \
  }
VLM_EMU_OPERATOR(+)
VLM_EMU_OPERATOR(-)
VLM_EMU_OPERATOR(*)
VLM_EMU_OPERATOR(/)
#undef VLM_EMU_OPERATOR

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
