#include <algorithm>
#include <cstdlib>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"
#include "kernels/integers.h"
#include "kernels/product8/product8.h"

namespace fqtstats::product8 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/product8/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/product8/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

// Panels are kDepth k deep (twice that for packed nibbles): so deep that the sums in between, which go through memory,
// cost little, and a panel and kBlock bytes of the other operand's rows fit the second-level cache. kSlab bytes of
// panels stay in the last-level one while they are used.
constexpr std::int64_t kDepth = 2048, kMostRows = 192, kBlock = 384 << 10, kSlab = 4 << 20;
constexpr std::int64_t kRowStep = 24;         // rows: of a thread's share; whole tiles, whole bytes of 1-bit codes
constexpr std::int64_t kGrain = 1 << 22;      // products: about 20 us
constexpr std::int64_t kPackGrain = 1 << 17;  // bytes: about 10 us
constexpr std::int64_t kSpan = 1 << 16;       // 65536 * 255 * 128 < 2^31
constexpr std::int64_t kConflict = 1024;      // rows at a multiple of it compete for the same sets of the cache

struct Panels {};
struct PartialSums {};
struct Rows {};
struct RowSums {};
struct ColumnSums {};
struct Constants {};
struct Sums32 {};
struct Sums64 {};

// Threads that share the columns need Sa of all rows, each its own.
std::int64_t copies(std::int64_t m, int threads) { return m < 2 * kRowStep * threads ? threads : 1; }

bool direct(const Operand& a) { return a.inner && a.bits == 8 && a.flip == 0 && a.words && a.stride % kConflict != 0; }

// How K is cut: chunks that a panel holds, slabs of chunks that are packed at a time.
struct Cut {
  std::int64_t depth, chunks, slab;
};

Cut cut(std::int64_t k, std::int64_t n, bool nibbles) {
  const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(k, nibbles ? 2 * kDepth : kDepth));
  const std::int64_t depth = std::max<std::int64_t>(64, round_up(ceil_div(k, chunks), 64));
  const std::int64_t bytes = round_up(n, kLanes) * depth / (nibbles ? 2 : 1);
  const std::int64_t count = std::max<std::int64_t>(1, ceil_div(k, depth));
  return {depth, count, std::clamp<std::int64_t>(kSlab / bytes, 1, count)};
}

// c[m, n] = P in int32, or the result where there is a `finish`, whose column constants `ready` makes once sum_b
// (added to, [N rounded up to 16]) is complete. sum_a, unless nullptr, is added to; [copies(m, threads), M], the first
// one complete in the end.
template <typename Ready>
void product(const Kernel& kernel, const Operand& a, const Operand& b, std::int64_t m, std::int64_t n, std::int64_t k,
             int threads, void* c, std::int64_t* sum_a, std::int64_t* sum_b, const Finish* finish, const Ready& ready) {
  const bool nibbles = b.bits == 4 && b.inner && b.values == nullptr;
  const Cut cuts = cut(k, n, nibbles);
  const std::int64_t panels = ceil_div(n, kTileColumns), width = round_up(n, kLanes);
  const std::int64_t column_bytes = cuts.depth / (nibbles ? 2 : 1);  // of one chunk
  auto* packed = cpu::scratch<Panels, std::uint8_t>(cuts.slab * width * column_bytes);
  auto* partial = cpu::scratch<PartialSums, std::int32_t>(cuts.slab * width);
  // Shares of the work: rows, or panels where there are too few rows.
  const auto shares = std::clamp<std::int64_t>(m * n * k / kGrain, 1, threads);
  const bool by_panels = m < 2 * kRowStep * shares && panels >= shares;
  const std::int64_t rows_stride = cuts.depth + ((cuts.depth + 64) % kConflict == 0 ? 128 : 64);
  const std::int64_t block_rows =
      std::clamp<std::int64_t>(kBlock / cuts.depth / kRowStep * kRowStep, kRowStep, kMostRows);
  const std::int64_t rows_bytes = block_rows * rows_stride;
  const bool stream = cuts.chunks == 1 && cpu::streams(c, m * n, n);
  auto* buffers = direct(a) ? nullptr : cpu::scratch<Rows, std::uint8_t>(shares * rows_bytes);

  for (std::int64_t s = 0; s < cuts.chunks; s += cuts.slab) {
    const std::int64_t chunks = std::min(cuts.slab, cuts.chunks - s);
    const auto panel = [&](std::int64_t chunk, std::int64_t p) {
      return packed + (chunk * width + p * kTileColumns) * column_bytes;
    };
    const std::int64_t grain = ceil_div(kPackGrain, kTileColumns * cuts.depth);
    cpu::split(chunks * panels, grain, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t chunk = i / panels, p = i % panels, k0 = (s + chunk) * cuts.depth;
        kernel.pack_panel(
            b, p * kTileColumns, static_cast<int>(std::min<std::int64_t>(kTileColumns, n - p * kTileColumns)), k0,
            std::min(cuts.depth, k - k0), nibbles, panel(chunk, p), partial + chunk * width + p * kTileColumns);
      }
    });
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
      for (std::int64_t j = 0; j < n; ++j) sum_b[j] += partial[chunk * width + j];
    const bool last_slab = s + chunks == cuts.chunks;
    if (last_slab) ready();

    const auto share = [&](std::int64_t index) {
      std::int64_t m0 = 0, m1 = m, p0 = 0, p1 = panels;
      if (by_panels) {
        p0 = panels * index / shares, p1 = panels * (index + 1) / shares;
      } else {
        const std::int64_t steps = ceil_div(m, kRowStep);
        m0 = steps * index / shares * kRowStep, m1 = std::min(m, steps * (index + 1) / shares * kRowStep);
      }
      std::int64_t* sums = sum_a == nullptr ? nullptr : sum_a + (by_panels ? index * m : 0);
      Finish own{};
      if (finish) own = *finish;
      if (sums) own.sum_a = sums;
      for (std::int64_t row = m0; row < m1; row += block_rows) {
        const std::int64_t rows = std::min(block_rows, m1 - row);
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
          const std::int64_t k0 = (s + chunk) * cuts.depth, kc = std::min(cuts.depth, k - k0);
          Block block{};
          if (direct(a)) {
            block.a = a.data + row * a.stride + k0;
            block.lda = a.stride;
          } else {
            std::uint8_t* buffer = buffers + index * rows_bytes;
            kernel.pack_rows(a, row, rows, k0, kc, buffer, rows_stride);
            block.a = buffer;
            block.lda = rows_stride;
          }
          if (sums) kernel.row_sums(block.a, block.lda, rows, kc, sums + row);
          block.rows = rows;
          block.nibbles = nibbles;
          block.groups = ceil_div(kc, 4);
          block.ldc = n;
          block.add = s + chunk > 0;
          block.finish = finish && last_slab && chunk + 1 == chunks ? &own : nullptr;
          block.stream = stream;
          block.row = row;
          for (std::int64_t p = p0; p < p1; ++p) {
            block.panel = panel(chunk, p);
            block.column = p * kTileColumns;
            block.columns = static_cast<int>(std::min<std::int64_t>(kTileColumns, n - block.column));
            block.c = static_cast<std::int32_t*>(c) + row * n + block.column;
            kernel.multiply(block);
          }
        }
      }
    };
    cpu::split(shares, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) share(i);
      if (stream) cpu::order_streams();
    });
  }
}

// At most the largest |code - zero|.
std::int64_t reach(const Affine& scale, const Operand& op, std::int64_t groups) {
  const std::int64_t top = op.values != nullptr ? 255 : (1 << op.bits) - 1;
  if (scale.zero == nullptr) return top;
  std::int64_t most = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t zero = scale.zero[g];
    most = std::max({most, std::abs(zero), std::abs(top - zero)});
  }
  return most;
}

// Zero points, steps and offsets of the columns, one each, and what the column sums make of them.
struct Columns {
  std::int32_t *zero, *sum;
  float *step, *offset, *v;
  std::int64_t shift, n;
  bool offset_a, offset_b;

  Columns(const Problem& p, std::int64_t width)
      : zero(reinterpret_cast<std::int32_t*>(cpu::scratch<Constants, float>(5 * width))),
        sum(zero + width),
        step(reinterpret_cast<float*>(zero + 2 * width)),
        offset(step + width),
        v(offset + width),
        shift(p.b.flip ? 128 : 0),
        n(p.n),
        offset_a(p.scale_a.offset != nullptr),
        offset_b(p.scale_b.offset != nullptr) {
    const Affine& scale = p.scale_b;
    const std::int64_t stride = scale.grouped ? 1 : 0;
    std::fill(zero, zero + 5 * width, 0);
    for (std::int64_t j = 0; j < n; ++j) {
      zero[j] = static_cast<std::int32_t>((scale.zero ? scale.zero[j * stride] : 0) - shift);
      if (scale.step) step[j] = scale.step[j * stride];
      if (scale.offset) offset[j] = scale.offset[j * stride];
    }
  }

  bool centered() const {
    return std::all_of(zero, zero + n, [](std::int32_t z) { return z == 0; });
  }

  bool one_zero() const {
    return std::all_of(zero, zero + n, [this](std::int32_t z) { return z == zero[0]; });
  }

  // From sums of the signed codes over k terms: Cb, and v as ops/products.py defines it.
  void complete(const std::int64_t* sums, std::int64_t k) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t cb = sums[j] - k * zero[j];
      sum[j] = static_cast<std::int32_t>(static_cast<std::uint32_t>(cb));
      double exact = static_cast<double>(step[j]) * static_cast<double>(cb);
      if (offset_b) exact = exact + static_cast<double>(k) * static_cast<double>(offset[j]);
      if (offset_a) v[j] = static_cast<float>(exact);
    }
  }
};

// As the kernels' last step, from sums in int64.
void finish_wide(const Finish& f, const std::int64_t* sum_b, std::int64_t n, std::int64_t m0, std::int64_t m1,
                 const std::int64_t* sums, float* out) {
  for (std::int64_t m = m0; m < m1; ++m) {
    const std::int64_t g = m * f.stride_a, za = (f.zero_a ? f.zero_a[g] : 0) + f.shift_a;
    const float sa = f.step_a[g];
    const auto ra = static_cast<double>(f.sum_a[m] - f.k * za);
    const auto u = static_cast<float>(static_cast<double>(sa) * ra);
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t zb = f.zero_b[j];
      const std::int64_t exact = sums[m * n + j] - za * (sum_b[j] - f.k * zb) - zb * f.sum_a[m];
      float y = static_cast<float>(exact) * (sa * f.step_b[j]);
      if (f.offset_b) y = y + u * f.offset_b[j];
      if (f.offset_a) y = y + f.offset_a[g] * f.v[j];
      if (f.bias) y = y + f.bias[j];
      out[m * n + j] = y;
    }
  }
}

// Both kinds of result: affine where there are steps.
void run(const Kernel& kernel, const Problem& p, int threads, void* out) {
  if (p.m == 0 || p.n == 0) return;
  const std::int64_t width = round_up(p.n, kLanes), rows = copies(p.m, threads) * p.m;
  auto* sum_a = cpu::scratch<RowSums, std::int64_t>(rows);
  auto* sum_b = cpu::scratch<ColumnSums, std::int64_t>(width);
  std::fill(sum_a, sum_a + rows, 0);
  std::fill(sum_b, sum_b + width, 0);
  Columns columns(p, width);
  const bool is_affine = p.scale_a.step != nullptr;
  const bool need_a = columns.offset_b || !columns.centered();
  const std::int32_t shift_a = p.a.flip ? 128 : 0;
  const Finish finish{p.k,
                      sum_a,
                      p.scale_a.zero,
                      shift_a,
                      p.scale_a.step,
                      p.scale_a.offset,
                      p.scale_a.grouped ? 1 : 0,
                      columns.sum,
                      columns.zero,
                      columns.step,
                      columns.offset_b ? columns.offset : nullptr,
                      columns.v,
                      p.bias,
                      is_affine && !p.scale_a.grouped && !columns.offset_b && columns.one_zero()};
  const auto most = static_cast<double>(reach(p.scale_a, p.a, p.scale_a.grouped ? p.m : 1)) *
                    static_cast<double>(reach(p.scale_b, p.b, p.scale_b.grouped ? p.n : 1));
  if (!is_affine || most * static_cast<double>(p.k) < 2147483648.0) {
    const bool plain = !is_affine && shift_a == 0 && columns.centered();
    product(kernel, p.a, p.b, p.m, p.n, p.k, threads, out, need_a ? sum_a : nullptr, sum_b, plain ? nullptr : &finish,
            [&] { columns.complete(sum_b, p.k); });
    return;
  }
  auto* part = cpu::scratch<Sums32, std::int32_t>(p.m * p.n);
  auto* sums = cpu::scratch<Sums64, std::int64_t>(p.m * p.n);
  std::fill(sums, sums + p.m * p.n, 0);
  for (std::int64_t k = 0; k < p.k; k += kSpan) {
    product(kernel, p.a.from(k), p.b.from(k), p.m, p.n, std::min(kSpan, p.k - k), threads, part, sum_a, sum_b, nullptr,
            [] {});
    for (std::int64_t i = 0; i < p.m * p.n; ++i) sums[i] += part[i];
  }
  columns.complete(sum_b, p.k);
  cpu::split(p.m, ceil_div(kGrain / 64, p.n), threads, [&](std::int64_t begin, std::int64_t end) {
    finish_wide(finish, sum_b, p.n, begin, end, sums, static_cast<float*>(out));
  });
}

}  // namespace

void affine(const Kernel& kernel, const Problem& p, int threads, float* out) { run(kernel, p, threads, out); }

void integer(const Kernel& kernel, const Problem& p, int threads, std::int32_t* out) { run(kernel, p, threads, out); }

}  // namespace fqtstats::product8
