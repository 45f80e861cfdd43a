#include <immintrin.h>

#include "kernels/householder/reflect.h"

namespace fqtstats::householder {
namespace {

struct Avx2 {
  using Reg = __m256;
  static constexpr int kLanes = 8;

  struct All {};
  struct First {
    __m256i lanes;  // all bits of those that are used
  };
  FQTSTATS_INLINE First first(std::int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane)};
  }

  FQTSTATS_INLINE Reg fill(float v) { return _mm256_set1_ps(v); }
  FQTSTATS_INLINE Reg load(const float* p, All = {}) { return _mm256_loadu_ps(p); }
  FQTSTATS_INLINE Reg load(const float* p, First mask) { return _mm256_maskload_ps(p, mask.lanes); }
  FQTSTATS_INLINE void store(float* p, Reg v, All = {}) { _mm256_storeu_ps(p, v); }
  FQTSTATS_INLINE void store(float* p, Reg v, First mask) { _mm256_maskstore_ps(p, mask.lanes, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, All) { _mm256_stream_ps(p, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, First mask) { store(p, v, mask); }
  FQTSTATS_INLINE void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T1); }
  FQTSTATS_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  FQTSTATS_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  FQTSTATS_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  FQTSTATS_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }

  // vminps and vmaxps drop a NaN in their first operand; it is remembered apart.
  struct Extremes {
    Reg low = _mm256_set1_ps(__builtin_inff()), high = _mm256_set1_ps(-__builtin_inff());
    Reg nan = _mm256_setzero_ps();

    __attribute__((always_inline)) inline void add(Reg v, All) {
      low = _mm256_min_ps(v, low);
      high = _mm256_max_ps(v, high);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    __attribute__((always_inline)) inline void add(Reg v, First mask) {
      const Reg used = _mm256_castsi256_ps(mask.lanes);
      low = _mm256_blendv_ps(low, _mm256_min_ps(v, low), used);
      high = _mm256_blendv_ps(high, _mm256_max_ps(v, high), used);
      nan = _mm256_or_ps(nan, _mm256_and_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q), used));
    }
    __attribute__((always_inline)) inline void update(float& least, float& largest) const {
      __m128 l = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
      __m128 h = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
      l = _mm_min_ps(l, _mm_movehl_ps(l, l));
      h = _mm_max_ps(h, _mm_movehl_ps(h, h));
      const bool invalid = _mm256_movemask_ps(nan) != 0;
      const float a = invalid ? __builtin_nanf("") : _mm_cvtss_f32(_mm_min_ss(l, _mm_movehdup_ps(l)));
      const float b = invalid ? __builtin_nanf("") : _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
      if (a < least || a != a) least = a;
      if (b > largest || b != b) largest = b;
    }
  };
};

}  // namespace

extern const Kernel avx2{"avx2", cpu::Isa::avx2, transform<Avx2, false>, transform<Avx2, true>};

}  // namespace fqtstats::householder
