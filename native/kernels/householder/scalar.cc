// The reference: row by row.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/householder/householder.h"
#include "kernels/householder/variance.h"

namespace fqtstats::householder {
namespace {

// sums[0] = sum of the n rows at z; the rows below sums[0] are overwritten.
void add_rows(const float* z, std::int64_t n, const Block& b, float* sums) {
  if (n == 1) {
    std::memcpy(sums, z, static_cast<std::size_t>(b.columns) * sizeof(float));
    return;
  }
  const auto half = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(n - 1)));
  float* rest = sums + b.width;
  add_rows(z, half, b, sums);
  add_rows(z + half * b.width, n - half, b, rest);
  for (std::int64_t c = 0; c < b.columns; ++c) sums[c] += rest[c];
}

void reflect(const Block& b, float* z) {
  float* u = z + b.n * b.width;
  float* sums = u + b.width;
  add_rows(z, b.n, b, sums);
  for (std::int64_t c = 0; c < b.columns; ++c) {
    const float mean = sums[c] * b.root;
    u[c] = (mean - z[c]) * b.spread;
    z[c] = mean;
  }
  for (std::int64_t i = 1; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c) z[i * b.width + c] -= u[c];
}

void forward(const Block& b) {
  for (std::int64_t i = 0; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c)
      b.memory[i * b.width + c] = b.in[b.order[i] * b.stride + c] * b.scale[i];
  if (b.n > 1) reflect(b, b.memory);
  for (std::int64_t i = 0; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c) {
      const float y = b.memory[i * b.width + c];
      b.out[(b.first + i) * b.stride + c] = y;
      if (y < b.low[i] || y != y) b.low[i] = y;
      if (y > b.high[i] || y != y) b.high[i] = y;
    }
}

void inverse(const Block& b) {
  for (std::int64_t i = 0; i < b.n; ++i)
    std::memcpy(b.memory + i * b.width, b.in + (b.first + i) * b.stride,
                static_cast<std::size_t>(b.columns) * sizeof(float));
  if (b.n > 1) reflect(b, b.memory);
  for (std::int64_t i = 0; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c)
      b.out[b.order[i] * b.stride + c] = b.memory[i * b.width + c] / b.scale[i];
}

double fractions(const float* x, std::int64_t count, float offset, float scale, float most) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float y = std::min((x[i] - offset) * scale, most), f = y - std::floor(y);
    sum += f * (1 - f);
  }
  return sum;
}

}  // namespace

extern const Kernel scalar{"scalar", cpu::Isa::scalar, forward, inverse, fractions, refined, variances};

}  // namespace fqtstats::householder
