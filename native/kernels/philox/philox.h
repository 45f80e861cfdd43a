// Philox4x32-10 random bits in the tiled layout of fqtstats/random.py.
//
// Block b is the four words that ten rounds make of the counter (b, b >> 32, c2, c3). With the round's key
// (k0 + r W0, k1 + r W1), r = 0..9, each round maps (x0, x1, x2, x3) to
//
//   (hi(M1 x2) ^ x1 ^ key0,  lo(M1 x2),  hi(M0 x0) ^ x3 ^ key1,  lo(M0 x0))
//
// A tile is 16 blocks. n > 16: element 64 t + 16 j + l is the top n bits of word j of block 16 t + l. n <= 16: element
// 128 t + 16 q + l is the top n bits of half q % 2 (0 = low) of word q / 2 of block 16 t + l.
//
// All variants give the same integers.
// Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cpu/isa.h"

namespace fqtstats::philox {

inline constexpr std::uint32_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;  // multipliers
inline constexpr std::uint32_t kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;  // key increments
inline constexpr int kRounds = 10;
inline constexpr int kTileBlocks = 16;

struct Stream {
  std::uint32_t k0, k1, c2, c3;
};

// What one kernel call makes: `count` elements of `n` bits from block `block` of the 2^32 with counter word c1.
struct Range {
  Stream key;
  std::uint32_t c1;
  std::uint32_t block;  // a multiple of kTileBlocks; the range ends at or before block 2^32
  std::int64_t count;
  int n;  // 1..32; 1..31 for int32 output
};

// The first two rounds where only the block varies: with p = M0 b they give x0 = (q >> 32) ^ x0_key for q = M1 x2 of
// x2 = (p >> 32) ^ first_key, then x1 = q, x2 = p ^ x2_key and x3.
struct Start {
  std::uint32_t first_key, x0_key, x2_key, x3;
};

static inline Start start(const Range& r) {
  const std::uint64_t p1 = std::uint64_t{kM1} * r.key.c2;
  const std::uint64_t p0 = std::uint64_t{kM0} * (static_cast<std::uint32_t>(p1 >> 32) ^ r.c1 ^ r.key.k0);
  return {r.key.c3 ^ r.key.k1, static_cast<std::uint32_t>(p1) ^ (r.key.k0 + kW0),
          static_cast<std::uint32_t>(p0 >> 32) ^ (r.key.k1 + kW1), static_cast<std::uint32_t>(p0)};
}

struct Kernel {
  const char* name;
  cpu::Isa isa;
  void (*fill32)(const Range& range, std::int32_t* out);
  void (*fill64)(const Range& range, std::int64_t* out);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

constexpr std::int64_t tile_elements(int n) { return n > 16 ? 4 * kTileBlocks : 8 * kTileBlocks; }

// out[i] = element i + first_tile * tile_elements(n) of the stream, 0 <= i < count; T is int32_t or int64_t. The result
// does not depend on `threads`.
template <typename T>
void bits(const Kernel& kernel, const Stream& key, int n, std::uint64_t first_tile, std::int64_t count, int threads,
          T* out);

// The four words of one block, by way of `kernel`; for known-answer tests.
std::array<std::uint32_t, 4> block(const Kernel& kernel, const std::array<std::uint32_t, 4>& counter, std::uint32_t k0,
                                   std::uint32_t k1);

}  // namespace fqtstats::philox
