// The loops of the AVX-512 variants: twelve independent chains, more than latency times throughput needs.
#pragma once

#include <immintrin.h>

#include "kernels/peak/peak.h"

namespace fqtstats::peak {
namespace {

constexpr int kChains = 12;

// Runs step(accumulator) on every chain. The empty statements make each round's values unknown to the compiler, which
// could otherwise take the loop apart.
template <typename Vector, typename Step>
Vector chains(std::int64_t iterations, Vector zero, const Step& step) {
  Vector c0 = zero, c1 = zero, c2 = zero, c3 = zero, c4 = zero, c5 = zero;
  Vector c6 = zero, c7 = zero, c8 = zero, c9 = zero, c10 = zero, c11 = zero;
  for (std::int64_t i = 0; i < iterations; ++i) {
    c0 = step(c0), c1 = step(c1), c2 = step(c2), c3 = step(c3), c4 = step(c4), c5 = step(c5);
    c6 = step(c6), c7 = step(c7), c8 = step(c8), c9 = step(c9), c10 = step(c10), c11 = step(c11);
    asm volatile("" : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5));
    asm volatile("" : "+v"(c6), "+v"(c7), "+v"(c8), "+v"(c9), "+v"(c10), "+v"(c11));
  }
  asm volatile("" ::"v"(c0), "v"(c1), "v"(c2), "v"(c3), "v"(c4), "v"(c5));
  asm volatile("" ::"v"(c6), "v"(c7), "v"(c8), "v"(c9), "v"(c10), "v"(c11));
  return c0;
}

// An operand that the compiler knows nothing of.
__m512i opaque(int value) {
  __m512i v = _mm512_set1_epi8(static_cast<char>(value));
  asm volatile("" : "+v"(v));
  return v;
}

std::int64_t sink(__m512i v) { return _mm_cvtsi128_si64(_mm512_castsi512_si128(v)); }

double operations(std::int64_t iterations, int each) { return static_cast<double>(iterations) * kChains * each; }

Count fp32(std::int64_t iterations) {
  const __m512 a = _mm512_castsi512_ps(opaque(1)), b = _mm512_castsi512_ps(opaque(2));
  const __m512 sum = chains(iterations, _mm512_setzero_ps(), [&](__m512 c) { return _mm512_fmadd_ps(a, b, c); });
  return {operations(iterations, 2 * 16), sink(_mm512_castps_si512(sum))};
}

Count int8(std::int64_t iterations) {
  const __m512i a = opaque(1), b = opaque(2);
  const __m512i sum =
      chains(iterations, _mm512_setzero_si512(), [&](__m512i c) { return _mm512_dpbusd_epi32(c, a, b); });
  return {operations(iterations, 2 * 64), sink(sum)};
}

}  // namespace
}  // namespace fqtstats::peak
