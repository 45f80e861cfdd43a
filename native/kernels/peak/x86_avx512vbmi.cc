#include "kernels/peak/x86_avx512.h"

namespace fqtstats::peak {
namespace {

Count bit(std::int64_t iterations) {
  const __m512i a = opaque(0x55);
  // The running sum takes part in the operand: a constant one would be computed once.
  const __m512i sum = chains(iterations, _mm512_setzero_si512(), [&](__m512i c) {
    __m512i b = a;
    asm volatile("" : "+v"(b));
    return _mm512_add_epi64(c, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
  });
  return {operations(iterations, 2 * 512), sink(sum)};
}

Count bit_table(std::int64_t iterations) {
  const __m512i table = opaque(3), one = opaque(1);
  const auto look_up = [&] {
    __m512i index = table;
    asm volatile("" : "+v"(index));
    return _mm512_permutexvar_epi8(index, table);
  };
  const __m512i sum = chains(iterations, _mm512_setzero_si512(), [&](__m512i c) {
    const __m512i low = _mm512_add_epi8(look_up(), look_up()), high = _mm512_add_epi8(look_up(), look_up());
    return _mm512_dpbusd_epi32(c, one, _mm512_add_epi8(low, high));
  });
  return {operations(iterations, 2 * 16 * 64), sink(sum)};
}

}  // namespace

extern const Kernel avx512vbmi{"avx512vbmi", cpu::Isa::avx512vbmi, fp32, int8, bit, bit_table};

}  // namespace fqtstats::peak
