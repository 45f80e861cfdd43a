// What the variants share, compiled with the instruction set of the file that includes it: everything here is static.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/product1/product1.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fqtstats::product1 {

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Bytes [at, at + sizeof(T)) of a row of `bytes` bytes, 0 beyond its end.
template <typename T>
static inline T load(const std::uint8_t* row, std::int64_t bytes, std::int64_t at) {
  T value{};
  if (at + static_cast<std::int64_t>(sizeof(T)) <= bytes)
    std::memcpy(&value, row + at, sizeof(T));
  else if (at < bytes)
    std::memcpy(&value, row + at, static_cast<std::size_t>(bytes - at));
  return value;
}

namespace {

// Vectors of the widest kind that the file's instruction set has.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

}  // namespace

template <typename V, typename T>
static inline V vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Past the caches; p is a multiple of a vector.
template <typename V>
static inline void stream(void* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

// --- transposed operands ---------------------------------------------------------------------------------------------

// A block of 64 / kBits rows by 8 words of 64 / kBits codes each: rows and codes of a word change places, in halves,
// quarters, ... of the block.
template <int kBits>
static void transpose_codes(const Operand& x, std::int64_t begin, std::int64_t end, std::int64_t groups,
                            std::int64_t stride, std::uint8_t* out) {
  constexpr int kSide = 64 / kBits, kLanes = 8;
  const std::int64_t width = row_bytes(x);
  alignas(64) std::uint64_t w[kSide][kLanes];
  for (std::int64_t c = begin; c < end; c += kSide * kLanes) {
    const std::int64_t at = c * kBits / 8, loaded = least(sizeof w[0], width - at),
                       columns = least(kSide * kLanes, end - c);
    for (std::int64_t k = 0; k < groups * kGroup; k += kSide) {
      if (loaded < static_cast<std::int64_t>(sizeof w[0]) || k + kSide > x.rows) std::memset(w, 0, sizeof w);
      for (std::int64_t i = 0; i < least(kSide, x.rows - k); ++i)
        std::memcpy(w[i], x.data + (k + i) * width + at, static_cast<std::size_t>(loaded));
      for (int d = kSide / 2, shift = 32; d > 0; d /= 2, shift /= 2) {
        const std::uint64_t low = ~std::uint64_t{0} / ((std::uint64_t{1} << shift) + 1);
        for (int i = 0; i < kSide; i = (i + d + 1) & ~d)
          for (int lane = 0; lane < kLanes; lane += kVectorBytes / 8) {
            Longs a = vector<Longs>(&w[i][lane]), b = vector<Longs>(&w[i + d][lane]);
            const Longs differ = ((a >> shift) ^ b) & low;
            a ^= differ << shift;
            b ^= differ;
            std::memcpy(&w[i][lane], &a, sizeof a);
            std::memcpy(&w[i + d][lane], &b, sizeof b);
          }
      }
      std::uint8_t* to = out + c * stride + k / kSide * 8;
      for (std::int64_t i = 0; i < columns; ++i) std::memcpy(to + i * stride, &w[i % kSide][i / kSide], 8);
    }
  }
}

static void transpose(const Operand& x, std::int64_t begin, std::int64_t end, std::int64_t groups, std::int64_t stride,
                      std::uint8_t* out) {
  switch (x.bits) {
    case 1:
      return transpose_codes<1>(x, begin, end, groups, stride, out);
    case 2:
      return transpose_codes<2>(x, begin, end, groups, stride, out);
    default:
      return transpose_codes<4>(x, begin, end, groups, stride, out);
  }
}

// --- row sums --------------------------------------------------------------------------------------------------------

template <int kBits>
static void sum_rows(const Matrix& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  constexpr std::uint64_t kPlane = ~std::uint64_t{0} / ((1 << kBits) - 1);  // the lowest bit of every code
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint8_t* row = x.data + i * x.stride;
    std::int64_t total = 0, at = 0;
    const auto add = [&](std::uint64_t word) {
      for (int bit = 0; bit < kBits; ++bit)
        total += static_cast<std::int64_t>(__builtin_popcountll(word >> bit & kPlane)) << bit;
    };
    for (; at + 8 <= x.bytes; at += 8) {
      std::uint64_t word;
      std::memcpy(&word, row + at, 8);
      add(word);
    }
    add(load<std::uint64_t>(row, x.bytes, at));
    out[i] = static_cast<std::int32_t>(total);
  }
}

static void sums(const Matrix& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  switch (x.bits) {
    case 1:
      return sum_rows<1>(x, begin, end, out);
    case 2:
      return sum_rows<2>(x, begin, end, out);
    default:
      return sum_rows<4>(x, begin, end, out);
  }
}

// --- epilogue --------------------------------------------------------------------------------------------------------

// One element of the result from its sum of codes.
static inline void finish_element(const Epilogue& e, std::int64_t m, std::int64_t n, std::int32_t s) {
  const std::int64_t i = m * e.columns + n;
  if (e.integers != nullptr) {
    e.integers[i] = e.scale * s + (e.row != nullptr ? e.row[m] + e.column[n] : 0);
    return;
  }
  std::int64_t exact = s;
  if (e.zb != nullptr) exact -= e.zb[n] * e.ra[m];
  if (e.za != nullptr) exact -= std::int64_t{e.za[m]} * e.cb[n];
  float y = static_cast<float>(exact) * (e.sa[m] * e.sb[n]);
  if (e.ob != nullptr) y += e.u[m] * e.ob[n];
  if (e.oa != nullptr) y += e.oa[m] * e.v[n];
  if (e.bias != nullptr) y += e.bias[n];
  e.y[i] = y;
}

// Asks for the memory of elements n to n + count - 1 of row m, which finish() will write.
static inline void expect(const Epilogue& e, std::int64_t m, std::int64_t n, std::int64_t count) {
  if (e.stream) return;
  const std::int64_t first = m * e.columns + n;
  for (std::int64_t i = 0; i < count; i += 16)
    __builtin_prefetch(e.y != nullptr ? static_cast<const void*>(e.y + first + i) : e.integers + first + i, 1);
}

// finish_element for `count` <= kPanel elements of row m from column n on; s is readable for kPanel.
__attribute__((always_inline)) static inline void finish(const Epilogue& e, std::int64_t m, std::int64_t n,
                                                         std::int64_t count, const std::int32_t* s) {
  constexpr int kLanes = kVectorBytes / 4;
  if (e.y != nullptr && e.wide) {
    for (std::int64_t i = 0; i < count; ++i) finish_element(e, m, n + i, s[i]);
    return;
  }
  alignas(64) std::uint8_t buffer[kPanel * 4];
  std::uint8_t* const out = reinterpret_cast<std::uint8_t*>(e.y != nullptr ? static_cast<void*>(e.y + m * e.columns + n)
                                                                           : e.integers + m * e.columns + n);
  std::uint8_t* const to = count == kPanel ? out : buffer;
  const bool past = e.stream && count == kPanel;
  const auto put = [&](int j, auto value) __attribute__((always_inline)) {
    past ? stream(to + 4 * j, value) : static_cast<void>(std::memcpy(to + 4 * j, &value, sizeof value));
  };
  if (e.y == nullptr) {
    for (int j = 0; j < kPanel; j += kLanes) {
      Words value = vector<Words>(s + j);
      if (e.scale != 1) value *= static_cast<std::uint32_t>(e.scale);
      if (e.row != nullptr) value += vector<Words>(e.column + n + j) + static_cast<std::uint32_t>(e.row[m]);
      put(j, value);
    }
  } else {
    for (int j = 0; j < kPanel; j += kLanes) {
      Words exact = vector<Words>(s + j);  // modulo 2^32: the result fits
      if (e.zb != nullptr) exact -= vector<Words>(e.zb + n + j) * static_cast<std::uint32_t>(e.ra[m]);
      if (e.za != nullptr) exact -= vector<Words>(e.cb + n + j) * static_cast<std::uint32_t>(e.za[m]);
      Floats y = __builtin_convertvector((Ints)exact, Floats) * (vector<Floats>(e.sb + n + j) * e.sa[m]);
      if (e.ob != nullptr) y += vector<Floats>(e.ob + n + j) * e.u[m];
      if (e.oa != nullptr) y += vector<Floats>(e.v + n + j) * e.oa[m];
      if (e.bias != nullptr) y += vector<Floats>(e.bias + n + j);
      put(j, y);
    }
  }
  if (to == buffer) std::memcpy(out, buffer, static_cast<std::size_t>(count) * 4);
}

}  // namespace fqtstats::product1
