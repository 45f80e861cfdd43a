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

// m and u, of the rows at z; m may take the place of the first of them.
void reflect_leader(const Block& b, const float* z, float* sums, float* mean, float* u) {
  add_rows(z, b.n, b, sums);
  for (std::int64_t c = 0; c < b.columns; ++c) {
    const float m = sums[c] * b.root;
    u[c] = (m - z[c]) * b.spread;
    mean[c] = m;
  }
}

void reflect(const Block& b, float* z) {
  float* u = z + b.n * b.width;
  reflect_leader(b, z, u + b.width, z, u);
  for (std::int64_t i = 1; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c) z[i * b.width + c] -= u[c];
}

void scale_rows(const Block& b) {
  for (std::int64_t i = 0; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c)
      b.memory[i * b.width + c] = b.in[b.order[i] * b.stride + c] * b.scale[i];
}

void update(float y, float& low, float& high) {
  if (y < low || y != y) low = y;
  if (y > high || y != y) high = y;
}

void forward(const Block& b) {
  scale_rows(b);
  if (b.n > 1) reflect(b, b.memory);
  for (std::int64_t i = 0; i < b.n; ++i)
    for (std::int64_t c = 0; c < b.columns; ++c) {
      const float y = b.memory[i * b.width + c];
      b.out[(b.first + i) * b.stride + c] = y;
      update(y, b.low[i], b.high[i]);
    }
}

void means(const Block& b, float* mean, float* u) {
  scale_rows(b);
  reflect_leader(b, b.memory, b.memory + b.n * b.width, mean, u);
}

void row(const float* x, std::int64_t count, float scale, const float* u, float* y, float& low, float& high) {
  for (std::int64_t c = 0; c < count; ++c) {
    const float z = x[c] * scale;
    y[c] = u == nullptr ? z : z - u[c];
    update(y[c], low, high);
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

extern const Kernel scalar{"scalar", cpu::Isa::scalar, forward, inverse, means, row, fractions, refined, variances};

}  // namespace fqtstats::householder
