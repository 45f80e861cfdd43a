// AVX2: even and odd bytes widened to 16 bits, and vpmaddwd, which is exact, unlike the saturating vpmaddubsw. A tile
// is 3 rows times 16 columns. Packing goes by blocks of 64 x 64 codes, one byte each.
#include <immintrin.h>

#include <cstring>

#include "kernels/product8/product8.h"

namespace fqtstats::product8 {
namespace {

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline

constexpr int kBlock = 64, kRows = 3, kHalf = kLanes / 2;

// A block of codes, one byte each, in memory order: `rows` rows of `count` codes.
struct Bytes {
  const std::uint8_t* data;
  std::int64_t stride;
};

template <int kBits>
static void unpack(const std::uint8_t* from, std::int64_t count, std::uint8_t* to) {
  constexpr int kPerByte = 8 / kBits, kMask = (1 << kBits) - 1;
  for (std::int64_t i = 0; i < count / kPerByte; ++i)
    for (int j = 0; j < kPerByte; ++j) to[i * kPerByte + j] = static_cast<std::uint8_t>(from[i] >> (j * kBits) & kMask);
  for (std::int64_t i = count / kPerByte * kPerByte; i < count; ++i)
    to[i] = static_cast<std::uint8_t>(from[i / kPerByte] >> (i % kPerByte * kBits) & kMask);
}

// What 4-bit codes stand for.
void unpack(const std::uint8_t* from, std::int64_t count, const std::uint8_t* values, std::uint8_t* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = values[from[i / 2] >> (i % 2 * 4) & 15];
}

Bytes bytes(const Operand& op, std::int64_t row, std::int64_t rows, std::int64_t first, std::int64_t count,
            std::uint8_t* tile) {
  const std::uint8_t* from = op.data + row * op.stride + first * op.bits / 8;
  if (op.bits == 8) return {from, op.stride};
  for (std::int64_t i = 0; i < rows; ++i, from += op.stride, tile += kBlock) {
    if (op.bits == 4 && op.values != nullptr)
      unpack(from, count, op.values, tile);
    else if (op.bits == 4)
      unpack<4>(from, count, tile);
    else if (op.bits == 2)
      unpack<2>(from, count, tile);
    else
      unpack<1>(from, count, tile);
  }
  return {tile - rows * kBlock, kBlock};
}

// out[i * ldo + j] = block[j][i] ^ flip: rows of the result from columns of the block.
void transpose(Bytes block, std::int64_t rows, std::int64_t count, std::uint8_t flip, std::uint8_t* out,
               std::int64_t ldo) {
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t j = 0; j < rows; ++j)
      out[i * ldo + j] = static_cast<std::uint8_t>(block.data[j * block.stride + i] ^ flip);
}

void pack_rows(const Operand& op, std::int64_t first, std::int64_t rows, std::int64_t k0, std::int64_t kc,
               std::uint8_t* out, std::int64_t ldo) {
  std::uint8_t tile[kBlock * kBlock];
  for (std::int64_t i = 0; i < rows; i += kBlock)
    for (std::int64_t k = 0; k < kc; k += kBlock) {
      const std::int64_t height = rows - i < kBlock ? rows - i : kBlock, depth = kc - k < kBlock ? kc - k : kBlock;
      std::uint8_t* to = out + i * ldo + k;
      if (!op.inner) {
        transpose(bytes(op, k0 + k, depth, first + i, height, tile), depth, height, op.flip, to, ldo);
      } else {
        const Bytes block = bytes(op, first + i, height, k0 + k, depth, tile);
        for (std::int64_t r = 0; r < height; ++r)
          for (std::int64_t j = 0; j < depth; ++j)
            to[r * ldo + j] = static_cast<std::uint8_t>(block.data[r * block.stride + j] ^ op.flip);
      }
    }
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t k = kc; k % 4 != 0; ++k) out[i * ldo + k] = 0;
}

void row_sums(const std::uint8_t* a, std::int64_t lda, std::int64_t rows, std::int64_t kc, std::int64_t* sums) {
  for (std::int64_t i = 0; i < rows; ++i) {
    __m256i sum = _mm256_setzero_si256();
    std::int64_t k = 0;
    for (; k + 32 <= kc; k += 32) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * lda + k));
      sum = _mm256_add_epi64(sum, _mm256_sad_epu8(x, _mm256_setzero_si256()));
    }
    std::int64_t parts[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), sum);
    sums[i] += parts[0] + parts[1] + parts[2] + parts[3];
    for (; k < kc; ++k) sums[i] += a[i * lda + k];
  }
}

void pack_panel(const Operand& op, std::int64_t first, int columns, std::int64_t k0, std::int64_t kc, bool nibbles,
                std::uint8_t* out, std::int32_t* sums) {
  const std::int64_t group = nibbles ? 8 : 4, width = (columns + kLanes - 1) / kLanes * kLanes;
  alignas(32) std::uint8_t tile[kBlock * kBlock], line[kBlock][kBlock];
  for (std::int64_t j = 0; j < width; ++j) sums[j] = 0;
  for (std::int64_t k = 0; k < kc; k += kBlock) {
    const std::int64_t depth = kc - k < kBlock ? kc - k : kBlock;
    // line[k][column], 0 beyond
    std::memset(line, 0, sizeof line);
    if (op.inner) {
      transpose(bytes(op, first, columns, k0 + k, depth, tile), columns, depth, op.flip, line[0], kBlock);
    } else {
      const Bytes block = bytes(op, k0 + k, depth, first, columns, tile);
      for (std::int64_t i = 0; i < depth; ++i)
        for (std::int64_t j = 0; j < columns; ++j)
          line[i][j] = static_cast<std::uint8_t>(block.data[i * block.stride + j] ^ op.flip);
    }
    for (std::int64_t i = 0; i < depth; ++i)
      for (std::int64_t j = 0; j < width; ++j) sums[j] += static_cast<std::int8_t>(line[i][j]);
    for (std::int64_t i = 0; i < depth; i += group) {
      std::uint8_t* to = out + (k + i) / group * width * 4;
      for (std::int64_t j = 0; j < width; ++j)
        for (std::int64_t q = 0; q < 4; ++q)
          to[4 * j + q] =
              static_cast<std::uint8_t>(nibbles ? line[i + q][j] | line[i + q + 4][j] << 4 : line[i + q][j]);
    }
  }
}

struct Wide {
  __m256i even, odd;
};

FQTSTATS_INLINE Wide widen_signed(__m256i x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}

FQTSTATS_INLINE Wide widen_unsigned(const std::uint8_t* from) {
  std::int32_t word;
  std::memcpy(&word, from, 4);
  const __m256i x = _mm256_set1_epi32(word);
  return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}

FQTSTATS_INLINE __m256i add_products(__m256i sum, const Wide& a, const Wide& b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a.even, b.even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a.odd, b.odd));
}

// kCount rows times 16 columns into sums[row][column].
template <int kCount, bool kNibbles>
static void tile(const std::uint8_t* a, std::int64_t lda, const std::uint8_t* panel, std::int64_t step,
                 std::int64_t groups, std::int32_t (*out)[kLanes]) {
  __m256i sums[kCount][2];
#pragma GCC unroll 3
  for (int i = 0; i < kCount; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  for (std::int64_t g = 0; g < groups; ++g) {
    Wide b[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + (kNibbles ? g / 2 : g) * step + 32 * j));
      if constexpr (kNibbles)
        x = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(g % 2 * 4)), _mm256_set1_epi8(15));
      b[j] = widen_signed(x);
    }
#pragma GCC unroll 3
    for (int i = 0; i < kCount; ++i) {
      const Wide word = widen_unsigned(a + i * lda + 4 * g);
      sums[i][0] = add_products(sums[i][0], word, b[0]);
      sums[i][1] = add_products(sums[i][1], word, b[1]);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kCount; ++i)
    for (int j = 0; j < 2; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[i] + kHalf * j), sums[i][j]);
}

// One row of 16 results; n_valid of them exist.
void finish_row(const Finish& f, std::int64_t m, std::int64_t n0, int valid, std::int32_t* sums) {
  const std::int64_t g = m * f.stride_a;
  const std::int32_t za = (f.zero_a ? f.zero_a[g] : 0) + f.shift_a;
  const auto uza = static_cast<std::uint32_t>(za), usa = static_cast<std::uint32_t>(f.sum_a[m]);
  for (int j = 0; j < kLanes; ++j) {
    auto p = static_cast<std::uint32_t>(sums[j]);
    p -= uza * static_cast<std::uint32_t>(f.sum_b[n0 + j]) + static_cast<std::uint32_t>(f.zero_b[n0 + j]) * usa;
    sums[j] = static_cast<std::int32_t>(p);
  }
  if (!f.step_a) return;
  const float sa = f.step_a[g];
  const auto ra = static_cast<double>(f.sum_a[m] - f.k * za);
  const float u = static_cast<float>(static_cast<double>(sa) * ra);
  float y[kLanes];
  for (int j = 0; j < kLanes; ++j) y[j] = static_cast<float>(sums[j]) * (sa * f.step_b[n0 + j]);
  if (f.offset_b)
    for (int j = 0; j < kLanes; ++j) y[j] = y[j] + u * f.offset_b[n0 + j];
  if (f.offset_a)
    for (int j = 0; j < kLanes; ++j) y[j] = y[j] + f.offset_a[g] * f.v[n0 + j];
  if (f.bias)
    for (int j = 0; j < valid; ++j) y[j] = y[j] + f.bias[n0 + j];
  std::memcpy(sums, y, sizeof y);
}

template <bool kNibbles>
static void multiply_panel(const Block& b) {
  const std::int64_t step = (b.columns + kLanes - 1) / kLanes * kLanes * 4;
  for (std::int64_t i = 0; i < b.rows; i += kRows) {
    const int rows = static_cast<int>(b.rows - i < kRows ? b.rows - i : kRows);
    for (int j = 0; j < b.columns; j += kLanes) {
      const int columns = b.columns - j < kLanes ? b.columns - j : kLanes;
      std::int32_t sums[kRows][kLanes];
      const std::uint8_t *a = b.a + i * b.lda, *panel = b.panel + 4 * j;
      if (rows == 3)
        tile<3, kNibbles>(a, b.lda, panel, step, b.groups, sums);
      else if (rows == 2)
        tile<2, kNibbles>(a, b.lda, panel, step, b.groups, sums);
      else
        tile<1, kNibbles>(a, b.lda, panel, step, b.groups, sums);
      for (int r = 0; r < rows; ++r) {
        std::int32_t* c = static_cast<std::int32_t*>(b.c) + (i + r) * b.ldc + j;
        if (b.add)
          for (int q = 0; q < columns; ++q)
            sums[r][q] =
                static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[r][q]) + static_cast<std::uint32_t>(c[q]));
        if (b.finish) finish_row(*b.finish, b.row + i + r, b.column + j, columns, sums[r]);
        std::memcpy(c, sums[r], 4 * static_cast<std::size_t>(columns));
      }
    }
  }
}

void multiply(const Block& b) { b.nibbles ? multiply_panel<true>(b) : multiply_panel<false>(b); }

}  // namespace

extern const Kernel avx2{"avx2", cpu::Isa::avx2, pack_rows, row_sums, pack_panel, multiply};

}  // namespace fqtstats::product8
