// AVX-512: one tile is one register of 16 lanes per word. vpmuludq multiplies the even 32-bit lanes only, so a tile's
// even and odd blocks are two states of eight 64-bit slots each, whose upper halves are ignored until the end. Two
// tiles at a time hide the multiplier's latency.
#include <immintrin.h>

#include <cstring>

#include "kernels/philox/philox.h"

namespace fqtstats::philox {
namespace {

constexpr int kTiles = 2;

struct State {
  __m512i x0, x1, x2, x3;
};

}  // namespace

__attribute__((always_inline)) static inline void advance(State& s, __m512i m0, __m512i m1, __m512i key0,
                                                          __m512i key1) {
  constexpr int kXor3 = 0x96;
  const __m512i p0 = _mm512_mul_epu32(s.x0, m0), p1 = _mm512_mul_epu32(s.x2, m1);
  s.x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), s.x1, key0, kXor3);
  s.x1 = p1;
  s.x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), s.x3, key1, kXor3);
  s.x3 = p0;
}

// Two rounds of the blocks whose products with M0 are `p`.
__attribute__((always_inline)) static inline State begin(__m512i p, __m512i m1, __m512i first_key, __m512i x0_key,
                                                         __m512i x2_key, __m512i x3) {
  const __m512i q = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64(p, 32), first_key), m1);
  return {_mm512_xor_si512(_mm512_srli_epi64(q, 32), x0_key), q, _mm512_xor_si512(p, x2_key), x3};
}

// Words of even and odd blocks back to one word per 32-bit lane.
static inline __m512i interleave(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}

static inline void store(std::int32_t* out, __m512i v) { _mm512_storeu_si512(out, v); }

static inline void store(std::int64_t* out, __m512i v) {
  _mm512_storeu_si512(out, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(v)));
  _mm512_storeu_si512(out + 8, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(v, 1)));
}

// One word of 16 blocks: 16 elements, or 32 where each takes half a word. `shift` is 32 - n.
template <bool kHalf, typename T>
static inline void emit(T* out, int j, __m512i word, __m128i shift) {
  if constexpr (kHalf) {
    store(out + 32 * j, _mm512_srl_epi32(_mm512_slli_epi32(word, 16), shift));
    store(out + 32 * j + 16, _mm512_srl_epi32(word, shift));
  } else {
    store(out + 16 * j, _mm512_srl_epi32(word, shift));
  }
}

template <bool kHalf, typename T>
static void fill_layout(const Range& r, T* out) {
  constexpr int kStep = kTiles * kTileBlocks * (kHalf ? 8 : 4);
  __m512i keys[2 * kRounds];
  for (std::uint32_t i = 0; i < kRounds; ++i) {
    keys[2 * i] = _mm512_set1_epi64(r.key.k0 + i * kW0);
    keys[2 * i + 1] = _mm512_set1_epi64(r.key.k1 + i * kW1);
  }
  const __m512i m0 = _mm512_set1_epi64(kM0), m1 = _mm512_set1_epi64(kM1);
  const Start first = start(r);
  const __m512i first_key = _mm512_set1_epi64(first.first_key), x0_key = _mm512_set1_epi64(first.x0_key);
  const __m512i x2_key = _mm512_set1_epi64(first.x2_key), x3 = _mm512_set1_epi64(first.x3);
  const __m128i shift = _mm_cvtsi32_si128(32 - r.n);
  // Products with M0 of even blocks; those of other blocks lie a multiple of M0 further.
  const __m512i lanes = _mm512_mul_epu32(_mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), m0);
  const __m512i tile = _mm512_set1_epi64(std::int64_t{kM0} * kTileBlocks);
  __m512i even = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(std::uint64_t{kM0} * r.block)), lanes);
  T rest[kStep];
  for (std::int64_t i = 0; i < r.count; i += kStep) {
    const __m512i next = _mm512_add_epi64(even, tile);
    State a = begin(even, m1, first_key, x0_key, x2_key, x3);
    State b = begin(_mm512_add_epi64(even, m0), m1, first_key, x0_key, x2_key, x3);
    State c = begin(next, m1, first_key, x0_key, x2_key, x3);
    State d = begin(_mm512_add_epi64(next, m0), m1, first_key, x0_key, x2_key, x3);
    even = _mm512_add_epi64(next, tile);
#pragma GCC unroll 8
    for (int k = 2; k < kRounds; ++k) {
      advance(a, m0, m1, keys[2 * k], keys[2 * k + 1]);
      advance(b, m0, m1, keys[2 * k], keys[2 * k + 1]);
      advance(c, m0, m1, keys[2 * k], keys[2 * k + 1]);
      advance(d, m0, m1, keys[2 * k], keys[2 * k + 1]);
    }
    T* to = r.count - i < kStep ? rest : out + i;
    emit<kHalf>(to, 0, interleave(a.x0, b.x0), shift);
    emit<kHalf>(to, 1, interleave(a.x1, b.x1), shift);
    emit<kHalf>(to, 2, interleave(a.x2, b.x2), shift);
    emit<kHalf>(to, 3, interleave(a.x3, b.x3), shift);
    emit<kHalf>(to + kStep / kTiles, 0, interleave(c.x0, d.x0), shift);
    emit<kHalf>(to + kStep / kTiles, 1, interleave(c.x1, d.x1), shift);
    emit<kHalf>(to + kStep / kTiles, 2, interleave(c.x2, d.x2), shift);
    emit<kHalf>(to + kStep / kTiles, 3, interleave(c.x3, d.x3), shift);
    if (to == rest) std::memcpy(out + i, rest, static_cast<std::size_t>(r.count - i) * sizeof(T));
  }
}

template <typename T>
static void fill(const Range& r, T* out) {
  r.n > 16 ? fill_layout<false>(r, out) : fill_layout<true>(r, out);
}

extern const Kernel avx512{"avx512", cpu::Isa::avx512, fill<std::int32_t>, fill<std::int64_t>};

}  // namespace fqtstats::philox
