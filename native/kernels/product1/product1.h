// Matrix products of packed codes, one operand of 1 bit, the other of 1, 2 or 4:
//
//   S[m, n] = sum_k a[m, k] b[n, k],   0 <= m < M, 0 <= n < N, 0 <= k < K
//
// on the codes as they are (1 bit: 0 or 1), exact in int32 for K <= kMaxTerms. From S follow the product of the signs
// 2 a - 1 and 2 b - 1 of two 1-bit operands,
//
//   sum (2 a - 1)(2 b - 1) = 4 S - 2 sum a - 2 sum b + K,
//
// and the float32 product of what the codes stand for, operation by operation as in fqtstats/ops/products.py.
//
// Either axis of an operand's memory may be the contracted one. Preconditions: the layout of fqtstats/ops/codes.py (any
// alignment); the bits of a row beyond its last code are 0.
//
// Two 1-bit operands: population counts of a & b, or table look-ups. Otherwise, and without a vector popcount always:
// four bits of the 1-bit operand index a table of the 16 sums of a subset of four codes of the other one.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"
#include "kernels/codes.h"

namespace fqtstats::product1 {

inline constexpr std::int64_t kMaxTerms = 1 << 27;  // 15 * 2^27 < 2^31
inline constexpr std::int64_t kMaxZero = 1 << 15;   // |zero| up to this keeps every sum below 2^63
inline constexpr int kGroup = 64;                   // terms per step of every variant
inline constexpr int kPanel = 32;                   // rows of the 1-bit operand per panel

// An operand as it is stored: `rows` rows of `channels` codes each.
struct Operand {
  const std::uint8_t* data;
  std::int64_t rows, channels;
  int bits;
  bool contract_rows;  // k runs along the rows, not along the channels
};

static inline std::int64_t row_bytes(const Operand& x) { return fqtstats::row_bytes(x.channels, x.bits); }
static inline std::int64_t terms(const Operand& x) { return x.contract_rows ? x.rows : x.channels; }   // K
static inline std::int64_t extent(const Operand& x) { return x.contract_rows ? x.channels : x.rows; }  // M or N

// What codes mean: (code - zero) * step + offset, with one entry per index of the axis that is kept, or one for all.
struct Affine {
  const float* step;
  const std::int32_t* zero;  // or nullptr: 0 everywhere
  const float* offset;       // or nullptr: 0 everywhere
  bool grouped;
};

// Codes with the contracted axis contiguous in memory.
struct Matrix {
  const std::uint8_t* data;
  std::int64_t rows;
  std::int64_t stride;  // bytes from row to row
  std::int64_t bytes;   // of a row; what is beyond them counts as 0
  int bits;
};

// What becomes of S. Arrays over n are readable for kPanel entries beyond the end; nullptr where a term is left out.
struct Epilogue {
  std::int64_t columns;  // N
  bool stream;           // write past the caches: whole cache lines

  // Integers: scale * S + row[m] + column[n].
  std::int32_t* integers;
  std::int32_t scale;
  const std::int32_t *row, *column;

  // Or float32: I = S - zb[n] ra[m] - za[m] cb[n], then the terms of the product.
  float* y;
  const float *sa, *oa, *u;
  const std::int32_t* za;
  const std::int64_t* ra;  // sum (a - za)
  const float *sb, *ob, *v, *bias;
  const std::int32_t* zb;
  const std::int32_t* cb;  // sum b
  bool wide;               // |I| may exceed int32
};

// One product: `table` (1, 2 or 4 bits) with `index` (1 bit).
struct Job {
  Matrix table, index;
  const std::uint8_t* panels;  // of `index`, packed
  std::int64_t groups;         // of kGroup terms
  bool swapped;                // `index` is a and `table` is b
  const Epilogue* epilogue;
};

// How a variant multiplies, for one width of `table`.
struct Path {
  std::int64_t group_bytes;  // packed bytes of one group of one panel
  void (*pack)(const Matrix& index, std::int64_t groups, std::int64_t panel, std::uint8_t* out);
  void (*multiply)(const Job& job, std::int64_t begin, std::int64_t end);  // rows [begin, end) of `table`
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  Path one, two, four;
  // Columns of `x` [begin, end), from a multiple of 64 on, to rows of `out` [channels][stride], each of `groups`
  // groups.
  void (*transpose)(const Operand& x, std::int64_t begin, std::int64_t end, std::int64_t groups, std::int64_t stride,
                    std::uint8_t* out);
  void (*sums)(const Matrix& x, std::int64_t begin, std::int64_t end, std::int32_t* out);  // of each row's codes
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

// y [M, N] = a b^T + bias; bias [N] or nullptr. K <= kMaxTerms, |zero| <= kMaxZero. The result does not depend on
// `threads`.
void multiply(const Kernel& kernel, const Operand& a, const Affine& of_a, const Operand& b, const Affine& of_b,
              const float* bias, int threads, float* y);

// out [M, N] = S, or the product of the signs (both operands of 1 bit).
void multiply_integers(const Kernel& kernel, const Operand& a, const Operand& b, bool signs, int threads,
                       std::int32_t* out);

}  // namespace fqtstats::product1
