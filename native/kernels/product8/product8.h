// Integer matrix products of codes of 8 bits and fewer, for every orientation of the operands.
//
//   P[m, n] = sum_k ua[m, k] sb[n, k],   ua = a ^ flip_a, unsigned;   sb = b ^ flip_b, signed
//
// in int32. u8 codes of b are flipped by 0x80, which subtracts 128; s8 values of a likewise, which adds 128; codes of 4
// bits and fewer are both signed and unsigned as they are, but for logarithmic ones, which become bytes where they are
// packed (kernels/log_codes.h). With za and zb in these shifted units,
//
//   I[m, n] = sum_k (ua - za)(sb - zb) = P - za[m] Cb[n] - zb[n] Sa[m],   Sa = sum_k ua,   Cb = sum_k (sb - zb)
//
// modulo 2^32, hence exactly where I itself fits int32. Where it may not, spans of K with |P| < 2^31 are added up in
// int64. From I, ops/products.py defines the float32 result operation by operation; all variants give the same bits.
//
// Row operand: u8, contiguous along k, read a word of four k at a time. Column operand: panels of up to 64 columns,
// [k / 4][columns][4] bytes; 4-bit codes that are contiguous along k stay packed, [k / 8][columns][4] bytes with k..k+3
// in the low and k+4..k+7 in the high halves.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa.h"

namespace fqtstats::product8 {

inline constexpr int kTileRows = 6, kTileColumns = 64, kLanes = 16;

// Codes in memory: rows of `stride` bytes, packed from the low bits up.
struct Operand {
  const std::uint8_t* data;
  std::int64_t stride;
  int bits;           // 1, 2, 4 or 8
  bool inner;         // the contracted index runs along a row in memory: element (i, k) is code k of row i, else i of k
  bool words;         // whole words of four codes may be read from every row, whatever K; for 8 bits
  std::uint8_t flip;  // exclusive or on every byte, for 8 bits and `values`
  const std::uint8_t* values = nullptr;  // [16] bytes that 4-bit codes are multiplied as; nullptr: as themselves

  // The same operand from k = first on; `first` is a multiple of 8.
  Operand from(std::int64_t first) const {
    Operand rest = *this;
    rest.data += inner ? first * bits / 8 : first * stride;
    return rest;
  }
};

// From P to the result, and what it takes. Rows: [M]; columns: [N] and readable up to a multiple of 16.
struct Finish {
  std::int64_t k;
  // Rows: Sa; zero point or nullptr, plus shift_a; step and offset or nullptr; one entry per row (stride 1) or one.
  const std::int64_t* sum_a;
  const std::int32_t* zero_a;
  std::int32_t shift_a;
  const float* step_a;  // nullptr: the result is I, int32
  const float* offset_a;
  std::int64_t stride_a;
  // Columns: Cb modulo 2^32, zb; step; offset, v and bias or nullptr.
  const std::int32_t* sum_b;
  const std::int32_t* zero_b;
  const float* step_b;
  const float* offset_b;
  const float* v;
  const float* bias;
  bool uniform;  // one step, zero point and offset of a, one zero point of b and no offset of b
};

// One panel times some rows.
struct Block {
  const std::uint8_t* a;
  std::int64_t lda, rows;
  const std::uint8_t* panel;
  bool nibbles;
  std::int64_t groups;  // of four k
  int columns;          // 1..64
  void* c;              // int32 sums, and in the end the result
  std::int64_t ldc;
  bool add;                  // to the sums in c
  bool stream;               // past the caches: c and ldc are multiples of a cache line, and nothing is added
  const Finish* finish;      // nullptr: c stays a sum
  std::int64_t row, column;  // of c's first element, for `finish`
};

struct Kernel {
  const char* name;
  cpu::Isa isa;
  // out[i * ldo + j] = element (first + i, k0 + j) for j < kc, then 0 up to a multiple of 4. first, k0: multiples of 8.
  void (*pack_rows)(const Operand& op, std::int64_t first, std::int64_t rows, std::int64_t k0, std::int64_t kc,
                    std::uint8_t* out, std::int64_t ldo);
  // sums[i] += sum_j a[i * lda + j], j < kc
  void (*row_sums)(const std::uint8_t* a, std::int64_t lda, std::int64_t rows, std::int64_t kc, std::int64_t* sums);
  // A panel of elements (first + j, k0 + k), j < columns (rounded up to 16 in the panel), k < kc, 0 beyond; `nibbles`
  // is for 4 bits, inner. sums[j] = sum_k of the panel, signed. first, k0: multiples of 8.
  void (*pack_panel)(const Operand& op, std::int64_t first, int columns, std::int64_t k0, std::int64_t kc, bool nibbles,
                     std::uint8_t* out, std::int32_t* sums);
  void (*multiply)(const Block& block);
};

// Every variant that was built, fastest first.
std::span<const Kernel> kernels();

// What the codes of one operand mean: (code - zero) * step + offset, per row of the operand (groups > 1) or for all.
struct Affine {
  const float* step;         // nullptr: the product is of the codes (or s8 values) themselves
  const std::int32_t* zero;  // or nullptr
  const float* offset;       // or nullptr
  bool grouped;
};

struct Problem {
  Operand a, b;
  std::int64_t m, n, k;
  Affine scale_a, scale_b;
  const float* bias;  // [n] or nullptr
};

// out[m, n], float32, as ops/products.py defines it. Any k; exact while |I| < 2^63.
void affine(const Kernel& kernel, const Problem& p, int threads, float* out);

// out[m, n] = I modulo 2^32 for steps of 1.
void integer(const Kernel& kernel, const Problem& p, int threads, std::int32_t* out);

}  // namespace fqtstats::product8
