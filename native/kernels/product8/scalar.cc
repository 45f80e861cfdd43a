// The reference: one element at a time.
#include <cstring>

#include "kernels/integers.h"
#include "kernels/product8/product8.h"

namespace fqtstats::product8 {
namespace {

std::uint8_t element(const Operand& op, std::int64_t i, std::int64_t k) {
  const std::int64_t bit = (op.inner ? k : i) * op.bits;
  const std::uint8_t byte = op.data[(op.inner ? i : k) * op.stride + bit / 8];
  const int code = (byte >> (bit % 8)) & ((1 << op.bits) - 1);
  return static_cast<std::uint8_t>((op.values != nullptr ? op.values[code] : code) ^ op.flip);
}

void pack_rows(const Operand& op, std::int64_t first, std::int64_t rows, std::int64_t k0, std::int64_t kc,
               std::uint8_t* out, std::int64_t ldo) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < (kc + 3) / 4 * 4; ++j)
      out[i * ldo + j] = j < kc ? element(op, first + i, k0 + j) : std::uint8_t{0};
}

void row_sums(const std::uint8_t* a, std::int64_t lda, std::int64_t rows, std::int64_t kc, std::int64_t* sums) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < kc; ++j) sums[i] += a[i * lda + j];
}

void pack_panel(const Operand& op, std::int64_t first, int columns, std::int64_t k0, std::int64_t kc, bool nibbles,
                std::uint8_t* out, std::int32_t* sums) {
  const std::int64_t group = nibbles ? 8 : 4, width = round_up(columns, kLanes);
  std::memset(out, 0, static_cast<std::size_t>(ceil_div(kc, group) * width * 4));
  for (std::int64_t j = 0; j < width; ++j) sums[j] = 0;
  for (std::int64_t k = 0; k < kc; ++k)
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::uint8_t code = element(op, first + j, k0 + k);
      out[(k / group * width + j) * 4 + k % 4] |= static_cast<std::uint8_t>(code << k % group / 4 * 4);
      sums[j] += static_cast<std::int8_t>(code);
    }
}

// One element of P: int32, modulo 2^32.
std::uint32_t dot(const Block& b, std::int64_t i, std::int64_t j) {
  const std::int64_t width = round_up(b.columns, kLanes);
  std::int32_t sum = 0;
  for (std::int64_t k = 0; k < 4 * b.groups; ++k) {
    const std::int64_t group = b.nibbles ? k / 8 : k / 4;
    const std::uint8_t byte = b.panel[(group * width + j) * 4 + k % 4];
    const auto value = static_cast<std::int8_t>(b.nibbles ? byte >> k % 8 / 4 * 4 & 15 : byte);
    sum += b.a[i * b.lda + k] * value;
  }
  return static_cast<std::uint32_t>(sum);
}

void multiply(const Block& b) {
  for (std::int64_t i = 0; i < b.rows; ++i)
    for (std::int64_t j = 0; j < b.columns; ++j) {
      char* c = static_cast<char*>(b.c) + 4 * (i * b.ldc + j);
      std::uint32_t p = 0;
      if (b.add) std::memcpy(&p, c, 4);
      p += dot(b, i, j);
      if (const Finish* f = b.finish) {
        const std::int64_t m = b.row + i, n = b.column + j, g = m * f->stride_a;
        const std::int32_t za = (f->zero_a ? f->zero_a[g] : 0) + f->shift_a;
        p -= static_cast<std::uint32_t>(za) * static_cast<std::uint32_t>(f->sum_b[n]);
        p -= static_cast<std::uint32_t>(f->zero_b[n]) * static_cast<std::uint32_t>(f->sum_a[m]);
        if (f->step_a) {
          const float sa = f->step_a[g];
          float y = static_cast<float>(static_cast<std::int32_t>(p)) * (sa * f->step_b[n]);
          if (f->offset_b) {
            const auto ra = static_cast<double>(f->sum_a[m] - f->k * za);
            y = y + static_cast<float>(static_cast<double>(sa) * ra) * f->offset_b[n];
          }
          if (f->offset_a) y = y + f->offset_a[g] * f->v[n];
          if (f->bias) y = y + f->bias[n];
          std::memcpy(c, &y, 4);
          continue;
        }
      }
      std::memcpy(c, &p, 4);
    }
}

}  // namespace

extern const Kernel scalar{"scalar", cpu::Isa::scalar, pack_rows, row_sums, pack_panel, multiply};

}  // namespace fqtstats::product8
