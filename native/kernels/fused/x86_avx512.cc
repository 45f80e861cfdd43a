// AVX-512: 16 channels; tails are masked.
#include <immintrin.h>

#include <cstring>

#include "kernels/fused/generic.h"

namespace fqtstats::fused {
namespace {

struct V {
  static constexpr std::int64_t kLanes = 16;
  using F = __m512;
  using M = __mmask16;
  using T = __mmask16;
  struct D {
    __m512d lower, upper;

    FQTSTATS_OPERATOR D operator+(D x, D y) { return {x.lower + y.lower, x.upper + y.upper}; }
    FQTSTATS_OPERATOR D operator-(D x, D y) { return {x.lower - y.lower, x.upper - y.upper}; }
    FQTSTATS_OPERATOR D operator*(D x, D y) { return {x.lower * y.lower, x.upper * y.upper}; }
  };

  FQTSTATS_INLINE T first(std::int64_t n) { return static_cast<T>((1u << n) - 1); }

  template <bool kTail>
  FQTSTATS_INLINE F load(const float* p, T tail) {
    return kTail ? _mm512_maskz_loadu_ps(tail, p) : _mm512_loadu_ps(p);
  }
  template <bool kTail>
  FQTSTATS_INLINE void store(float* p, F x, T tail) {
    kTail ? _mm512_mask_storeu_ps(p, tail, x) : _mm512_storeu_ps(p, x);
  }
  FQTSTATS_INLINE F set(float x) { return _mm512_set1_ps(x); }
  FQTSTATS_INLINE F flip(F x, F sign) { return _mm512_xor_ps(x, sign); }
  FQTSTATS_INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
  FQTSTATS_INLINE F min(F x, F y) { return _mm512_min_ps(x, y); }

  FQTSTATS_INLINE M greater(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
  FQTSTATS_INLINE M unordered(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  FQTSTATS_INLINE M either(M m, M n) { return static_cast<M>(m | n); }
  FQTSTATS_INLINE M without(M m, M n) { return static_cast<M>(m & ~n); }
  FQTSTATS_INLINE F pick(M m, F x, F y) { return _mm512_mask_blend_ps(m, y, x); }
  FQTSTATS_INLINE F keep(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
  FQTSTATS_INLINE F drop(M m, F x) { return _mm512_maskz_mov_ps(static_cast<M>(~m), x); }

  FQTSTATS_INLINE D wide(F x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
  }
  template <bool kTail>
  FQTSTATS_INLINE D load_wide(const double* p, T tail) {
    if constexpr (!kTail) return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)};
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(tail), p),
            _mm512_maskz_loadu_pd(static_cast<__mmask8>(tail >> 8), p + 8)};
  }
  template <bool kTail>
  FQTSTATS_INLINE void store_wide(double* p, D x, T tail) {
    if constexpr (kTail) {
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>(tail), x.lower);
      _mm512_mask_storeu_pd(p + 8, static_cast<__mmask8>(tail >> 8), x.upper);
    } else {
      _mm512_storeu_pd(p, x.lower);
      _mm512_storeu_pd(p + 8, x.upper);
    }
  }

  template <bool kTail>
  FQTSTATS_INLINE void encode(std::uint8_t* out, F x, std::int32_t zero, std::int32_t levels, std::int64_t channels,
                              std::int64_t row) {
    __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero));
    code = _mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), _mm512_set1_epi32(levels));
    if constexpr (kTail)
      _mm_mask_storeu_epi8(out, first(row < kLanes ? row : kLanes), _mm512_maskz_cvtepi32_epi8(first(channels), code));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(code));
  }
  template <bool kTail>
  FQTSTATS_INLINE void bits(std::uint8_t* out, M m, std::int64_t channels) {
    const auto word = static_cast<std::uint16_t>(~m & (kTail ? first(channels) : 0xffff));
    std::memcpy(out, &word, kTail && channels <= 8 ? 1 : 2);
  }
};

}  // namespace

extern const Kernel avx512{"avx512", cpu::Isa::avx512, moments<V>,       window_extremes<V>, encode<V>,
                           bits<V>,  apply<V>,         gradient_sums<V>, gradient<V>,        signs};

}  // namespace fqtstats::fused
