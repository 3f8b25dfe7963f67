// Sixteen-lane vectors for the CPU kernels, written once: one zmm, two ymm or four xmm registers.
// Instructions that the compiler does not find are named here. Only for files compiled per ISA
// (namespace cpu::VLM_ISA); keep STL and torch headers out of those, since an inline function
// compiled for AVX may win at link time.
#pragma once

#include <cstdint>
#include <cstring>

namespace vlm::cpu::VLM_ISA {

constexpr int kLanes = 16;

#define VLM_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kPartBytes = 64;
#elif defined(__AVX__)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
constexpr int kParts = 64 / kPartBytes;
constexpr int kPartLanes = kLanes / kParts;

template <class Lane>
struct PartOf {
  typedef Lane type __attribute__((vector_size(kPartBytes)));
};
template <class Lane>
using Part = typename PartOf<Lane>::type;  // what one register holds

#ifdef __AVX512F__
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
#else
// The compiler's own vectors, where they are wider than a register, are compared and selected lane
// by lane and moved through memory: ten to thirty times as slow as by registers.
template <class Lane>
struct Vector {
  mutable Part<Lane> part[kParts];  // GCC keeps a local that is const all through in memory

  template <class To>
  __attribute__((always_inline)) explicit operator Vector<To>() const;  // the same bits
  Lane operator[](int64_t i) const { return part[i / kPartLanes][i % kPartLanes]; }

#define VLM_OPERATOR(op)                                                                   \
  friend inline __attribute__((always_inline)) Vector operator op(Vector a, Vector b) {    \
    return by_parts<Vector>([](auto p, auto q) { return p op q; }, a, b);                  \
  }                                                                                        \
  friend inline __attribute__((always_inline)) Vector operator op(Vector a, Lane b) {      \
    return by_parts<Vector>([](auto p, auto q) { return p op q; }, a, b);                  \
  }                                                                                        \
  friend inline __attribute__((always_inline)) Vector operator op(Lane a, Vector b) {      \
    return by_parts<Vector>([](auto p, auto q) { return p op q; }, a, b);                  \
  }                                                                                        \
  template <class X>                                                                       \
  friend inline __attribute__((always_inline)) Vector& operator op## = (Vector & a, X b) { \
    return a = a op b;                                                                     \
  }
  VLM_OPERATOR(+)
  VLM_OPERATOR(-)
  VLM_OPERATOR(*)
  VLM_OPERATOR(/)
  VLM_OPERATOR(&)
  VLM_OPERATOR(|)
  VLM_OPERATOR(^)
  VLM_OPERATOR(<<)
  VLM_OPERATOR(>>)
#undef VLM_OPERATOR
  friend inline __attribute__((always_inline)) Vector operator-(Vector a) {
    return by_parts<Vector>([](auto p) { return -p; }, a);
  }
  friend inline __attribute__((always_inline)) Vector operator~(Vector a) {
    return by_parts<Vector>([](auto p) { return ~p; }, a);
  }
};

typedef Vector<float> vf;
typedef Vector<int32_t> vi;
typedef Vector<uint32_t> vu;
#endif
typedef uint16_t vh __attribute__((vector_size(32)));

template <class Lane>
Lane lane_of(Lane);

// The i-th part of a vector, also of one with narrower lanes; a scalar as it is.
template <int i, class X>
VLM_INLINE auto part(const X& x) {
  if constexpr (requires { x.part[0]; }) {
    return x.part[i];
  } else if constexpr (requires { x[0]; }) {
    typedef decltype(lane_of(x[0])) Lane;
    typedef Lane Piece __attribute__((vector_size(sizeof(X) / kParts)));
    Piece p;
    std::memcpy(&p, reinterpret_cast<const char*>(&x) + i * sizeof(p), sizeof(p));
    return p;
  } else {
    return x;
  }
}

template <class Out, class... Pieces>
VLM_INLINE Out join(Pieces... pieces) {
  if constexpr (requires(Out x) { x.part[0]; }) {
    return {{pieces...}};
  } else {
    Out out;
    char* to = reinterpret_cast<char*>(&out);
    ((std::memcpy(to, &pieces, sizeof(pieces)), to += sizeof(pieces)), ...);
    return out;
  }
}

// f(x...), part by part.
template <class Out, class F, class... X>
VLM_INLINE Out by_parts(F f, const X&... x) {
  if constexpr (kParts == 1) {
    return f(x...);
  } else if constexpr (kParts == 2) {
    return join<Out>(f(part<0>(x)...), f(part<1>(x)...));
  } else {
    return join<Out>(f(part<0>(x)...), f(part<1>(x)...), f(part<2>(x)...), f(part<3>(x)...));
  }
}

#ifndef __AVX512F__
template <class Lane>
template <class To>
inline Vector<Lane>::operator Vector<To>() const {
  return by_parts<Vector<To>>([](auto p) { return (Part<To>)p; }, *this);
}
#endif

// The lanes of a vector, of any width, as those of another type.
template <class Out, class X>
VLM_INLINE Out convert(X x) {
  return by_parts<Out>(
      [](auto p) {
        typedef decltype(lane_of(Out{}[0])) Lane;
        typedef Lane Piece __attribute__((vector_size(sizeof(Lane) * kPartLanes)));
        return __builtin_convertvector(p, Piece);
      },
      x);
}

// Piece by piece: a whole vector would be copied through narrower registers.
template <class Out>
VLM_INLINE Out load_as(const void* p) {
  typedef decltype(lane_of(Out{}[0])) Lane;
  typedef Lane Piece __attribute__((vector_size(sizeof(Out) / kParts)));
  typedef Piece Memory __attribute__((aligned(1), may_alias));
  const Memory* from = static_cast<const Memory*>(p);
  if constexpr (kParts == 1) {
    return from[0];
  } else if constexpr (kParts == 2) {
    return join<Out>(Piece(from[0]), Piece(from[1]));
  } else {
    return join<Out>(Piece(from[0]), Piece(from[1]), Piece(from[2]), Piece(from[3]));
  }
}
template <int i = 0, class X>
VLM_INLINE void store_parts(void* p, const X& x) {
  const auto piece = part<i>(x);
  std::memcpy(static_cast<char*>(p) + i * sizeof(piece), &piece, sizeof(piece));
  if constexpr (i + 1 < kParts) store_parts<i + 1>(p, x);
}
VLM_INLINE vf load(const float* p) { return load_as<vf>(p); }
VLM_INLINE vi load(const int32_t* p) { return load_as<vi>(p); }
VLM_INLINE vu load(const uint32_t* p) { return load_as<vu>(p); }
VLM_INLINE vh load(const uint16_t* p) { return load_as<vh>(p); }
VLM_INLINE void store(float* p, vf x) { store_parts(p, x); }
VLM_INLINE void store(uint32_t* p, vu x) { store_parts(p, x); }
VLM_INLINE void store(uint16_t* p, vh x) { store_parts(p, x); }

VLM_INLINE vf broadcast(float x) { return x - vf{}; }
VLM_INLINE vi broadcast(int32_t x) { return x - vi{}; }
VLM_INLINE vi iota(int32_t first) {
  constexpr int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return first + load(lanes);
}

// Comparisons, of vectors of one type or of one with a scalar: all bits of a lane set, or none.
template <class X, class Y>
VLM_INLINE vi less(X a, Y b) {
  return by_parts<vi>([](auto p, auto q) { return p < q; }, a, b);
}
template <class X, class Y>
VLM_INLINE vi equal(X a, Y b) {
  return by_parts<vi>([](auto p, auto q) { return p == q; }, a, b);
}
VLM_INLINE vi is_nan(vf x) {
  return by_parts<vi>([](auto p) { return p != p; }, x);
}

// By lanes: a where the mask is set, else b.
template <class X>
VLM_INLINE X select(vi mask, X a, X b) {
  return by_parts<X>([](auto m, auto p, auto q) { return m ? p : q; }, mask, a, b);
}

// A NaN in x is dropped: sums, not maxima, carry NaN to the result.
VLM_INLINE vf max(vf accumulator, vf x) {
  return by_parts<vf>([](auto p, auto q) { return q > p ? q : p; }, accumulator, x);
}

typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

// Halves combined, then quarters.
template <class F>
VLM_INLINE vf4 fold(vf x, F f) {
  vf4 a[4];
  std::memcpy(a, &x, sizeof(a));
#ifdef __AVX__
  vf8 b[2];
  std::memcpy(b, &x, sizeof(b));
  b[0] = f(b[0], b[1]);
  std::memcpy(a, b, sizeof(b[0]));
  return f(a[0], a[1]);
#else
  return f(f(a[0], a[2]), f(a[1], a[3]));
#endif
}

VLM_INLINE float hsum(vf x) {
  const vf4 c = fold(x, [](auto p, auto q) { return p + q; });
  return (c[0] + c[2]) + (c[1] + c[3]);
}

VLM_INLINE float hmax(vf x) {
  const vf4 c = fold(x, [](auto p, auto q) { return p > q ? p : q; });
  const float e = c[0] > c[2] ? c[0] : c[2], f = c[1] > c[3] ? c[1] : c[3];
  return e > f ? e : f;
}

VLM_INLINE vf sqrt(vf x) {
  return by_parts<vf>(
      [](auto p) {
#if defined(__AVX__)
        asm("vsqrtps %1, %0" : "=v"(p) : "v"(p));
#elif defined(__SSE__)
        p = __builtin_ia32_sqrtps(p);
#else
        for (int i = 0; i < kPartLanes; ++i) p[i] = __builtin_sqrtf(p[i]);
#endif
        return p;
      },
      x);
}

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e+38f;

// 2^f, f in [-1/2, 1/2]. Chebyshev fit of degree 6: the rounding of fp32 is what is left.
VLM_INLINE vf exp2_fraction(vf f) {
  vf p = f * 1.54697320e-4f + 1.34004322e-3f;
  p = p * f + 9.6180256e-3f;
  p = p * f + 5.55032721e-2f;
  p = p * f + 2.40226512e-1f;
  p = p * f + 6.93147207e-1f;
  return p * f + 1.f;
}

// x, or `low` if that is larger; NaN stays NaN.
VLM_INLINE vf at_least(vf x, float low) {
#ifdef __AVX512F__
  asm("vmaxps %1, %2, %0" : "=v"(x) : "v"(x), "v"(broadcast(low)));
  return x;
#else
  return by_parts<vf>([](auto p, auto q) { return q > p ? q : p; }, x, broadcast(low));
#endif
}

// round(x) and, for |x| <= 126, p 2^round(x); NaN stays NaN.
struct Rounded {
  vf value;
#ifndef __AVX512F__
  vf shifted;
#endif

  VLM_INLINE Rounded of(vf x) {
#ifdef __AVX512F__
    asm("vrndscaleps $8, %1, %0" : "=v"(x) : "v"(x));  // to nearest, no exceptions
    return {x};
#else
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    const vf shifted = x + kMagic;
    return {shifted - kMagic, shifted};
#endif
  }
  VLM_INLINE vf scale(const Rounded& n, vf p) {
#ifdef __AVX512F__
    asm("vscalefps %2, %1, %0" : "=v"(p) : "v"(p), "v"(n.value));
    return p;
#else
    return p * (vf)(((vu)n.shifted + 127u) << 23);
#endif
  }
};

// x - floor(x), and p 2^floor(x): the two ends of 2^x. For -inf the latter is 0; NaN stays NaN.
// Without AVX-512 p 2^floor(x) is 0 below -126, junk above 127, and `fraction` may be 1.
struct Floored {
  vf fraction;
#ifdef __AVX512F__
  vf x;
#else
  Rounded floor;
#endif

  VLM_INLINE Floored of(vf x) {
#ifdef __AVX512F__
    vf fraction;
    asm("vreduceps $9, %1, %0" : "=v"(fraction) : "v"(x));  // floor, no exceptions
    return {fraction, x};
#else
    const vf y = at_least(x, -126.75f);  // its floor, -127, makes the factor 0
    const Rounded floor = Rounded::of(y - 0.5f);
    return {y - floor.value, floor};
#endif
  }
  VLM_INLINE vf scale(const Floored& n, vf p) {
#ifdef __AVX512F__
    asm("vscalefps %2, %1, %0" : "=v"(p) : "v"(p), "v"(n.x));
    return p;
#else
    return Rounded::scale(n.floor, p);
#endif
  }
};

// 2^x for x <= 127 (junk above); about 1e-38 below -126 and for -inf; NaN stays NaN.
VLM_INLINE vf exp2(vf x) {
  const vf y = at_least(x, -126.f);
  const Rounded n = Rounded::of(y);
  return Rounded::scale(n, exp2_fraction(y - n.value));
}

// e^x likewise, for x <= 0: log2(e) in two parts, so that the error does not grow with |x|.
VLM_INLINE vf exp(vf x) {
  const vf y = at_least(x, -87.f);
  const Rounded n = Rounded::of(y * kLog2e);
  const vf f = y * kLog2e - n.value;
  return Rounded::scale(n, exp2_fraction(y * 1.925963033500e-8f + f));
}

// 1 / x for x in [1, 2], within an ulp.
VLM_INLINE vf reciprocal(vf x) {
#ifdef __AVX512F__
  vf r;
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(x));
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}

// log(1 + e) for e in [0, 1]: relative error 1e-7 however small e is (Chebyshev fit of
// log1p(e) / e, degree 9).
VLM_INLINE vf log1p_unit(vf e) {
  vf p = e * -0.00325637848f + 0.019907161f;
  p = p * e - 0.0570642008f;
  p = p * e + 0.106142647f;
  p = p * e - 0.153118631f;
  p = p * e + 0.196781173f;
  p = p * e - 0.249545589f;
  p = p * e + 0.33330004f;
  p = p * e - 0.49999904f;
  p = p * e + 0.999999995f;
  return p * e;
}

// Bits of x rounded to bf16 (nearest even) in the upper half of each word; the lower half is junk.
VLM_INLINE vu bf16_bits(vf x) {
  const vu bits = (vu)x;
  const vu rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  return select(is_nan(x), bits | 0x00400000u, rounded);
}

// log(1 + q) for q in [0, 2^100]: relative error 1e-7 however small q is; NaN stays NaN.
VLM_INLINE vf log1p(vf q) {
  const vf u = q + 1.f;
  const vi exponent = ((vi)u >> 23) - 127;
  const vf mantissa = (vf)((vi)u - (exponent << 23));
  const vf lost = q - (u - 1.f);  // by the rounding of u, where 1 is the larger
  const vf small = lost / u;
  const vf r = convert<vf>(exponent) * 6.93147181e-1f + log1p_unit(mantissa - 1.f);
  return select(is_nan(q), q, r + select(less(q, 1.f), small, vf{}));
}

VLM_INLINE vf from_bf16(vh x) { return (vf)(convert<vu>(x) << 16); }
VLM_INLINE vh to_bf16(vf x) { return convert<vh>(bf16_bits(x) >> 16); }

// The same by the instruction of CPUs with avx512_bf16: only where the products run in bf16.
VLM_INLINE vh to_bf16_native(vf x) {
#ifdef __AVX512F__
  vh y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return to_bf16(x);
#endif
}

// sum + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] of pairs of bf16, where the products run in bf16.
VLM_INLINE vf8 dot_pairs(vf8 sum, vf8 a, vf8 b) {
#ifdef __AVX512F__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  (void)a, (void)b;
#endif
  return sum;
}

#ifdef __F16C__
VLM_INLINE vf from_f16(vh x) {
  return by_parts<vf>(
      [](auto h) {
        Part<float> y;
        asm("vcvtph2ps %1, %0" : "=v"(y) : "v"(h));
        return y;
      },
      x);
}

VLM_INLINE vh to_f16(vf x) {
  return by_parts<vh>(
      [](auto p) {
        typedef uint16_t Half __attribute__((vector_size(kPartBytes / 2)));
        Half h;
        asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(p));  // to nearest even
        return h;
      },
      x);
}
#else
// IEEE half to float: shift the exponent by a multiplication, which also handles subnormals.
VLM_INLINE vf from_f16(vh x) {
  const vu w = convert<vu>(x);
  const vu magnitude = (w & 0x7fffu) << 13;
  const vu sign = (w & 0x8000u) << 16;
  const vf scaled = (vf)magnitude * 0x1p112f;
  const vu finite = (vu)scaled;
  const vu special = magnitude + (224u << 23);  // exponent 31 -> 255
  return (vf)(select(less((vi)magnitude, 31 << 23), finite, special) | sign);
}

VLM_INLINE vh to_f16(vf x) {
  vh out;
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = static_cast<_Float16>(x[i]);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    out[i] = bits;
  }
  return out;
}
#endif

// Transposes a square of words: swaps the off-diagonal blocks of size kStep, then smaller ones.
template <int kStep = kPartLanes / 2>
VLM_INLINE void transpose_part(Part<uint32_t> (&v)[kPartLanes]) {
  Part<int32_t> low, high;
  for (int k = 0; k < kPartLanes; ++k) {
    low[k] = k & kStep ? kPartLanes + k - kStep : k;
    high[k] = k & kStep ? kPartLanes + k : k + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPartLanes; ++i) {
    if (i & kStep) continue;
    const Part<uint32_t> a = v[i], b = v[i + kStep];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kStep] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kStep > 1) transpose_part<kStep / 2>(v);
}

// Transposes a 16 x 16 block of words held in 16 vectors.
VLM_INLINE void transpose16(vu (&v)[16]) {
#ifdef __AVX512F__
  transpose_part(v);
#else
  vu from[16];
  std::memcpy(from, v, sizeof(from));
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      Part<uint32_t> square[kPartLanes];
#pragma GCC unroll 8
      for (int k = 0; k < kPartLanes; ++k) square[k] = from[i * kPartLanes + k].part[j];
      transpose_part(square);
#pragma GCC unroll 8
      for (int k = 0; k < kPartLanes; ++k) v[j * kPartLanes + k].part[i] = square[k];
    }
  }
#endif
}

VLM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
VLM_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
VLM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VLM_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace vlm::cpu::VLM_ISA
