#include <immintrin.h>

#include "kernels/householder/reflect.h"

namespace fqtstats::householder {
namespace {

struct Avx512 {
  using Reg = __m512;
  static constexpr int kLanes = 16;

  struct All {};
  struct First {
    __mmask16 lanes;
  };
  FQTSTATS_INLINE First first(std::int64_t count) { return {static_cast<__mmask16>((1u << count) - 1)}; }

  FQTSTATS_INLINE Reg fill(float v) { return _mm512_set1_ps(v); }
  FQTSTATS_INLINE Reg load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
  FQTSTATS_INLINE Reg load(const float* p, First mask) { return _mm512_maskz_loadu_ps(mask.lanes, p); }
  FQTSTATS_INLINE void store(float* p, Reg v, All = {}) { _mm512_storeu_ps(p, v); }
  FQTSTATS_INLINE void store(float* p, Reg v, First mask) { _mm512_mask_storeu_ps(p, mask.lanes, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, All) { _mm512_stream_ps(p, v); }
  FQTSTATS_INLINE void stream(float* p, Reg v, First mask) { store(p, v, mask); }
  FQTSTATS_INLINE void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T1); }
  FQTSTATS_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  FQTSTATS_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  FQTSTATS_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  FQTSTATS_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }

  // vminps and vmaxps drop a NaN in their first operand; it is remembered apart.
  struct Extremes {
    Reg low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff());
    __mmask16 nan = 0;

    __attribute__((always_inline)) inline void add(Reg v, All) {
      low = _mm512_min_ps(v, low);
      high = _mm512_max_ps(v, high);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    __attribute__((always_inline)) inline void add(Reg v, First mask) {
      low = _mm512_mask_min_ps(low, mask.lanes, v, low);
      high = _mm512_mask_max_ps(high, mask.lanes, v, high);
      nan |= _mm512_mask_cmp_ps_mask(mask.lanes, v, v, _CMP_UNORD_Q);
    }
    __attribute__((always_inline)) inline void update(float& least, float& largest) const {
      const float a = nan ? __builtin_nanf("") : _mm512_reduce_min_ps(low);
      const float b = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(high);
      if (a < least || a != a) least = a;
      if (b > largest || b != b) largest = b;
    }
  };
};

}  // namespace

extern const Kernel avx512{"avx512", cpu::Isa::avx512, transform<Avx512, false>, transform<Avx512, true>};

}  // namespace fqtstats::householder
