// A loop with more accumulators than registers: what spills.py must report.
#include <immintrin.h>

void spilling(const float* x, long n, float* out) {
  constexpr int kAccumulators = 40;
  __m512 sums[kAccumulators];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (long i = 0; i < n; ++i) {
    const __m512 a = _mm512_loadu_ps(x + 16 * i);
#pragma GCC unroll 40
    for (int j = 0; j < kAccumulators; ++j) sums[j] = _mm512_add_ps(_mm512_mul_ps(sums[j], a), a);
  }
  for (int j = 0; j < kAccumulators; ++j) _mm512_storeu_ps(out + 16 * j, sums[j]);
}
