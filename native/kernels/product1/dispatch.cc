#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"
#include "kernels/integers.h"
#include "kernels/product1/product1.h"

namespace fqtstats::product1 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/product1/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/product1/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

// Tags of scratch buffers.
struct OfA;
struct OfB;
struct Panels;
template <int kArray>
struct Numbers;

constexpr std::int64_t kGrain = 1 << 17;  // bytes to move, or sums of 64 terms: some 10 us, several times a wake-up

// How many items of `cost` each make a grain.
std::int64_t grain(std::int64_t cost) { return ceil_div(kGrain, std::max<std::int64_t>(cost, 1)); }

// The operand with its contracted axis contiguous in memory: itself, or transposed into scratch memory.
template <typename Tag>
Matrix contiguous(const Kernel& kernel, const Operand& x, int threads) {
  if (!x.contract_rows) return {x.data, x.rows, row_bytes(x), row_bytes(x), x.bits};
  const std::int64_t groups = ceil_div(terms(x), kGroup), bytes = groups * kGroup * x.bits / 8;
  const std::int64_t stride = (ceil_div(bytes, 64) | 1) * 64;  // odd in lines: no cache conflicts
  std::uint8_t* const out = cpu::scratch<Tag, std::uint8_t>(x.channels * stride);
  constexpr std::int64_t kStrip = 64 * 8;  // columns
  cpu::split(ceil_div(x.channels, kStrip), grain(kStrip * bytes), threads, [&](std::int64_t begin, std::int64_t end) {
    kernel.transpose(x, begin * kStrip, std::min(end * kStrip, x.channels), groups, stride, out);
  });
  return {out, x.channels, stride, bytes, x.bits};
}

template <typename Tag>
std::int32_t* sum_rows(const Kernel& kernel, const Matrix& x, int threads) {
  std::int32_t* const out = cpu::scratch<Tag, std::int32_t>(x.rows + kPanel);
  cpu::split(x.rows, grain(x.bytes), threads,
             [&](std::int64_t begin, std::int64_t end) { kernel.sums(x, begin, end, out); });
  return out;
}

void run(const Kernel& kernel, const Matrix& a, const Matrix& b, std::int64_t k, const Epilogue& epilogue,
         int threads) {
  const bool swapped = b.bits != 1;
  Job job{swapped ? b : a, swapped ? a : b, nullptr, ceil_div(k, kGroup), swapped, &epilogue};
  const Path& path = job.table.bits == 1 ? kernel.one : job.table.bits == 2 ? kernel.two : kernel.four;
  const std::int64_t panels = ceil_div(job.index.rows, kPanel), panel_bytes = job.groups * path.group_bytes;
  std::uint8_t* const packed = cpu::scratch<Panels, std::uint8_t>(panels * panel_bytes);
  cpu::split(panels, grain(panel_bytes), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) path.pack(job.index, job.groups, p, packed + p * panel_bytes);
  });
  job.panels = packed;
  constexpr std::int64_t kUnit = 48;  // rows: a multiple of every tile, and of a cache line where they become columns
  const std::int64_t units = ceil_div(job.table.rows, kUnit);
  cpu::split(units, grain(kUnit * job.index.rows * (job.groups + 1)), threads,
             [&](std::int64_t begin, std::int64_t end) {
               path.multiply(job, begin * kUnit, std::min(end * kUnit, job.table.rows));
               if (epilogue.stream) cpu::order_streams();
             });
}

// One number per index, from one per group; with room for kPanel more.
template <int kArray, typename T>
T* spread(const T* values, bool grouped, std::int64_t count) {
  if (values == nullptr) return nullptr;
  T* const out = cpu::scratch<Numbers<kArray>, T>(count + kPanel);
  for (std::int64_t i = 0; i < count; ++i) out[i] = values[grouped ? i : 0];
  std::fill(out + count, out + count + kPanel, T{});
  return out;
}

// The largest |code - zero|.
std::int64_t reach(const std::int32_t* zero, std::int64_t count, int bits) {
  const std::int64_t top = (1 << bits) - 1;
  std::int64_t most = zero == nullptr ? top : 0;
  for (std::int64_t i = 0; zero != nullptr && i < count; ++i)
    most = std::max({most, std::abs(std::int64_t{zero[i]}), std::abs(top - zero[i])});
  return most;
}

}  // namespace

void multiply(const Kernel& kernel, const Operand& a, const Affine& of_a, const Operand& b, const Affine& of_b,
              const float* bias, int threads, float* y) {
  const std::int64_t rows = extent(a), columns = extent(b), k = terms(a);
  if (rows == 0 || columns == 0) return;
  const Matrix ma = contiguous<OfA>(kernel, a, threads), mb = contiguous<OfB>(kernel, b, threads);
  Epilogue e{};
  e.columns = columns;
  e.stream = cpu::streams(y, rows * columns, columns);
  e.y = y;
  e.sa = spread<0>(of_a.step, of_a.grouped, rows);
  e.za = spread<1>(of_a.zero, of_a.grouped, rows);
  e.oa = spread<2>(of_a.offset, of_a.grouped, rows);
  e.sb = spread<3>(of_b.step, of_b.grouped, columns);
  e.zb = spread<4>(of_b.zero, of_b.grouped, columns);
  e.ob = spread<5>(of_b.offset, of_b.grouped, columns);
  e.bias = spread<6>(bias, true, columns);
  if (e.zb != nullptr || e.ob != nullptr) {
    const std::int32_t* codes = sum_rows<Numbers<7>>(kernel, ma, threads);
    std::int64_t* const ra = cpu::scratch<Numbers<8>, std::int64_t>(rows);
    float* const u = cpu::scratch<Numbers<9>, float>(rows);
    for (std::int64_t m = 0; m < rows; ++m) {
      ra[m] = codes[m] - (e.za == nullptr ? 0 : k * e.za[m]);
      u[m] = static_cast<float>(static_cast<double>(e.sa[m]) * static_cast<double>(ra[m]));
    }
    e.ra = ra;
    e.u = u;
  }
  if (e.za != nullptr || e.oa != nullptr) {
    e.cb = sum_rows<Numbers<10>>(kernel, mb, threads);
    float* const v = cpu::scratch<Numbers<11>, float>(columns + kPanel);
    for (std::int64_t n = 0; n < columns; ++n) {
      const std::int64_t centered = e.cb[n] - (e.zb == nullptr ? 0 : k * e.zb[n]);
      double sum = static_cast<double>(e.sb[n]) * static_cast<double>(centered);
      if (e.ob != nullptr) sum += static_cast<double>(k) * static_cast<double>(e.ob[n]);
      v[n] = static_cast<float>(sum);
    }
    std::fill(v + columns, v + columns + kPanel, 0.0F);
    e.v = v;
  }
  e.wide = k * reach(e.za, rows, a.bits) > std::numeric_limits<std::int32_t>::max() / reach(e.zb, columns, b.bits);
  run(kernel, ma, mb, k, e, threads);
}

void multiply_integers(const Kernel& kernel, const Operand& a, const Operand& b, bool signs, int threads,
                       std::int32_t* out) {
  const std::int64_t rows = extent(a), columns = extent(b), k = terms(a);
  if (rows == 0 || columns == 0) return;
  const Matrix ma = contiguous<OfA>(kernel, a, threads), mb = contiguous<OfB>(kernel, b, threads);
  Epilogue e{};
  e.columns = columns;
  e.stream = cpu::streams(out, rows * columns, columns);
  e.integers = out;
  e.scale = 1;
  if (signs) {
    std::int32_t* const row = sum_rows<Numbers<7>>(kernel, ma, threads);
    std::int32_t* const column = sum_rows<Numbers<10>>(kernel, mb, threads);
    for (std::int64_t m = 0; m < rows; ++m) row[m] = static_cast<std::int32_t>(k) - 2 * row[m];
    for (std::int64_t n = 0; n < columns; ++n) column[n] *= -2;
    e.scale = 4;
    e.row = row;
    e.column = column;
  }
  run(kernel, ma, mb, k, e, threads);
}

}  // namespace fqtstats::product1
