// AVX2: eight blocks, half a tile, at a time. vpmuludq multiplies the even 32-bit lanes only, so the even and odd
// blocks are two states of four 64-bit slots each, whose upper halves are ignored until the end.
#include <immintrin.h>

#include <cstring>

#include "kernels/philox/philox.h"

namespace fqtstats::philox {
namespace {

constexpr int kLanes = 8;

struct State {
  __m256i x0, x1, x2, x3;
};

}  // namespace

__attribute__((always_inline)) static inline void advance(State& s, __m256i m0, __m256i m1, __m256i key0,
                                                          __m256i key1) {
  const __m256i p0 = _mm256_mul_epu32(s.x0, m0), p1 = _mm256_mul_epu32(s.x2, m1);
  // x ^ key first: it does not wait for the product.
  s.x0 = _mm256_xor_si256(_mm256_xor_si256(s.x1, key0), _mm256_srli_epi64(p1, 32));
  s.x1 = p1;
  s.x2 = _mm256_xor_si256(_mm256_xor_si256(s.x3, key1), _mm256_srli_epi64(p0, 32));
  s.x3 = p0;
}

// Two rounds of the blocks whose products with M0 are `p`.
__attribute__((always_inline)) static inline State begin(__m256i p, __m256i m1, __m256i first_key, __m256i x0_key,
                                                         __m256i x2_key, __m256i x3) {
  const __m256i q = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(p, 32), first_key), m1);
  return {_mm256_xor_si256(_mm256_srli_epi64(q, 32), x0_key), q, _mm256_xor_si256(p, x2_key), x3};
}

// Words of even and odd blocks back to one word per 32-bit lane.
static inline __m256i interleave(__m256i even, __m256i odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

static inline void store(std::int32_t* out, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }

static inline void store(std::int64_t* out, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvtepu32_epi64(_mm256_castsi256_si128(v)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4), _mm256_cvtepu32_epi64(_mm256_extracti128_si256(v, 1)));
}

// One word of 8 blocks: 8 elements, or twice 8 where each takes half a word. `shift` is 32 - n.
template <bool kHalf, typename T>
static inline void emit(T* out, int j, __m256i word, __m128i shift) {
  if constexpr (kHalf) {
    store(out + 32 * j, _mm256_srl_epi32(_mm256_slli_epi32(word, 16), shift));
    store(out + 32 * j + 16, _mm256_srl_epi32(word, shift));
  } else {
    store(out + 16 * j, _mm256_srl_epi32(word, shift));
  }
}

template <bool kHalf, typename T>
static void fill_layout(const Range& r, T* out) {
  constexpr int kTile = kTileBlocks * (kHalf ? 8 : 4);
  __m256i keys[2 * kRounds];
  for (std::uint32_t i = 0; i < kRounds; ++i) {
    keys[2 * i] = _mm256_set1_epi64x(r.key.k0 + i * kW0);
    keys[2 * i + 1] = _mm256_set1_epi64x(r.key.k1 + i * kW1);
  }
  const __m256i m0 = _mm256_set1_epi64x(kM0), m1 = _mm256_set1_epi64x(kM1);
  const Start first = start(r);
  const __m256i first_key = _mm256_set1_epi64x(first.first_key), x0_key = _mm256_set1_epi64x(first.x0_key);
  const __m256i x2_key = _mm256_set1_epi64x(first.x2_key), x3 = _mm256_set1_epi64x(first.x3);
  const __m128i shift = _mm_cvtsi32_si128(32 - r.n);
  // Products with M0 of even blocks; those of the odd ones lie M0 further.
  const __m256i lanes = _mm256_mul_epu32(_mm256_set_epi64x(6, 4, 2, 0), m0);
  const __m256i step = _mm256_set1_epi64x(std::int64_t{kM0} * kLanes);
  __m256i even = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(std::uint64_t{kM0} * r.block)), lanes);
  T rest[kTile];
  for (std::int64_t i = 0; i < r.count; i += kTile) {
    T* to = r.count - i < kTile ? rest : out + i;
    for (int lane = 0; lane < kTileBlocks; lane += kLanes) {
      State a = begin(even, m1, first_key, x0_key, x2_key, x3);
      State b = begin(_mm256_add_epi64(even, m0), m1, first_key, x0_key, x2_key, x3);
      even = _mm256_add_epi64(even, step);
#pragma GCC unroll 8
      for (int k = 2; k < kRounds; ++k) {
        advance(a, m0, m1, keys[2 * k], keys[2 * k + 1]);
        advance(b, m0, m1, keys[2 * k], keys[2 * k + 1]);
      }
      emit<kHalf>(to + lane, 0, interleave(a.x0, b.x0), shift);
      emit<kHalf>(to + lane, 1, interleave(a.x1, b.x1), shift);
      emit<kHalf>(to + lane, 2, interleave(a.x2, b.x2), shift);
      emit<kHalf>(to + lane, 3, interleave(a.x3, b.x3), shift);
    }
    if (to == rest) std::memcpy(out + i, rest, static_cast<std::size_t>(r.count - i) * sizeof(T));
  }
}

template <typename T>
static void fill(const Range& r, T* out) {
  r.n > 16 ? fill_layout<false>(r, out) : fill_layout<true>(r, out);
}

extern const Kernel avx2{"avx2", cpu::Isa::avx2, fill<std::int32_t>, fill<std::int64_t>};

}  // namespace fqtstats::philox
