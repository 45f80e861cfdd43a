// Every operation that uses threads, with one and with several, and from two threads at once: the results must be
// equal. For the thread sanitizer, with FQTSTATS_STD_THREADS; then every call of cpu::split must have had several
// threads at least once. `threads race` makes a race inside cpu::split instead, which the sanitizer must report.
#include <cxxabi.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "kernels/convolution1/convolution1.h"
#include "kernels/convolution8/convolution8.h"
#include "kernels/fused/fused.h"
#include "kernels/householder/encode.h"
#include "kernels/householder/householder.h"
#include "kernels/philox/philox.h"
#include "kernels/product1/product1.h"
#include "kernels/product8/product8.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats {
namespace {

// run(kernel, threads) gives a result that can be compared. True where all results of every kernel are equal.
template <typename Kernel, typename Run>
bool same(std::span<const Kernel> kernels, const Run& run) {
  bool equal = true;
  for (const Kernel& kernel : kernels) {
    if (!cpu::supported(kernel.isa)) continue;
    const auto expected = run(kernel, 1);
    for (const int threads : {2, 3, 8}) equal = equal && run(kernel, threads) == expected;
    bool other = false;
    std::thread caller([&] { other = run(kernel, 2) == expected; });
    equal = equal && run(kernel, 2) == expected;
    caller.join();
    equal = equal && other;
  }
  return equal;
}

std::uint32_t scrambled(std::size_t i) { return static_cast<std::uint32_t>((i + 1) * 2654435761u >> 7); }

std::vector<float> numbers(std::int64_t count) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(scrambled(i) % 1000) - 400;
  return x;
}

// Packed codes. Rows must fill their words.
std::vector<std::uint8_t> bytes(std::int64_t count) {
  std::vector<std::uint8_t> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint8_t>(scrambled(i));
  return x;
}

template <typename T>
bool philox_bits() {
  return same(philox::kernels(), [](const philox::Kernel& kernel, int threads) {
    std::vector<T> out(300'003);
    philox::bits(kernel, {1, 2, 3, 4}, 24, 0, std::ssize(out), threads, out.data());
    return out;
  });
}

bool householder_both_ways() {
  constexpr std::int64_t kRows = 70, kColumns = 7001;
  const std::vector<float> x = numbers(kRows * kColumns), scale(kRows, 0.75f);
  std::vector<std::int64_t> order(kRows);
  std::iota(order.rbegin(), order.rend(), 0);
  const std::int64_t heads[] = {0, 13, 20};
  const double sizes[] = {13, 2, 50};
  const householder::Transform t{kRows, 3, order.data(), heads, sizes, scale.data()};
  return same(householder::kernels(), [&](const householder::Kernel& kernel, int threads) {
    std::vector<float> out(2 * x.size() + 2 * kRows);
    float *y = out.data(), *back = y + x.size(), *low = back + x.size(), *high = low + kRows;
    householder::forward(kernel, t, x.data(), kColumns, threads, y, low, high);
    householder::inverse(kernel, t, y, kColumns, threads, back);
    return out;
  });
}

struct Quantized {
  std::vector<std::uint8_t> codes;
  std::vector<float> numbers;
  bool operator==(const Quantized&) const = default;
};

// Of bfloat16 rows of so many values, the ninth part of them large: several groups; or the first one: one group, which
// adaptive grouping leaves alone where there are two values.
bool householder_codes(bool adaptive, bool several, std::uint32_t values) {
  constexpr std::int64_t kRows = 70, kColumns = 7001;
  std::vector<std::uint16_t> x(kRows * kColumns);
  for (std::int64_t i = 0; i < std::ssize(x); ++i) {
    const std::int64_t row = i / kColumns;
    const bool large = several ? row % 9 == 4 : row == 0;
    const float v = static_cast<float>(scrambled(i) % values) * (large ? 1.0f : 0.01f);
    x[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(v) >> 16);
  }
  const quantize::Input in{x.data(), quantize::Type::bf16, true, kRows, kColumns, 1};
  return same(householder::kernels(), [&](const householder::Kernel& kernel, int threads) {
    Quantized out{std::vector<std::uint8_t>(kRows * row_bytes(kColumns, 8)), std::vector<float>(3 * kRows)};
    std::vector<std::int64_t> order(kRows), heads(kRows);
    std::vector<std::int32_t> zero(kRows);
    std::vector<double> sizes(kRows);
    float *step = out.numbers.data(), *offset = step + kRows;
    const quantize::Kernel* rounding = nullptr;
    for (const quantize::Kernel& row : quantize::kernels())
      if (row.isa == kernel.isa) rounding = &row;
    const householder::Encoded encoded = householder::encode(
        kernel, *rounding, in, 255, 24, {1, 2, 3, 4}, {8, 1, 1, 0, 0}, nullptr, nullptr, threads, adaptive,
        {order.data(), heads.data(), sizes.data(), offset + kRows}, out.codes.data(), step, zero.data(), offset);
    if ((encoded.groups == 0) != (values == 2) || encoded.groups < 0)
      out.numbers[0] = std::numeric_limits<float>::quiet_NaN();  // equals nothing
    return out;
  });
}

// There and back.
bool quantize_tensor(std::int64_t n, std::int64_t c, std::int64_t height, std::int64_t width, bool channels_last,
                     quantize::Axis axis, quantize::Rule rule, int random_bits) {
  const std::int64_t size = n * c * height * width;
  const std::int64_t groups = axis == quantize::Axis::none ? 1 : axis == quantize::Axis::sample ? n : c;
  const std::vector<float> x = numbers(size);
  const quantize::Input in{x.data(), quantize::Type::f32, channels_last, n, c, height * width};
  const std::int64_t pad = height * width > 1;
  const quantize::Layout layout{4, height, width, pad, pad};
  return same(quantize::kernels(), [&](const quantize::Kernel& kernel, int threads) {
    Quantized out{std::vector<std::uint8_t>(n * (height + 2 * pad) * (width + 2 * pad) * row_bytes(c, 4)),
                  std::vector<float>(size + 4 * groups)};
    std::vector<std::int32_t> zero(groups);
    float *step = out.numbers.data(), *offset = step + groups, *low = offset + groups, *high = low + groups;
    const bool log = rule == quantize::Rule::log;
    quantize::encode(kernel, in, {}, {axis, rule, log ? 14 : 15, random_bits}, {1, 2, 3, 4}, layout, nullptr, nullptr,
                     threads, out.codes.data(), step, zero.data(), offset);
    quantize::decode(kernel, out.codes.data(), layout, n, c, {axis, log, step, zero.data(), offset}, channels_last,
                     threads, high + groups);
    quantize::extremes(kernel, in, axis, threads, low, high);
    return out;
  });
}

bool quantize_both_ways() {
  bool equal = true;
  for (const quantize::Axis axis : {quantize::Axis::none, quantize::Axis::sample, quantize::Axis::channel})
    for (const int random_bits : {0, 16}) {
      const quantize::Rule rule = random_bits == 0 ? quantize::Rule::affine : quantize::Rule::log;
      for (const bool channels_last : {false, true})
        equal = quantize_tensor(12, 40, 12, 13, channels_last, axis, rule, random_bits) && equal;
      equal = quantize_tensor(150, 500, 1, 1, false, axis, rule, random_bits) && equal;
    }
  return equal;
}

// [m, n], with a common zero point for each operand.
bool product8_of(int bits, bool a_inner, bool b_inner, std::int64_t m, std::int64_t n, std::int64_t k,
                 std::int32_t zero) {
  const auto a = bytes(m * k * bits / 8), b = bytes(n * k * bits / 8);
  const float step = 0.5f, offset = -3;
  const std::uint8_t flip = bits == 8 ? 0x80 : 0;
  const product8::Affine scale{&step, &zero, &offset, false};
  const product8::Problem p{{a.data(), (a_inner ? k : m) * bits / 8, bits, a_inner, true, 0},
                            {b.data(), (b_inner ? k : n) * bits / 8, bits, b_inner, true, flip},
                            m,
                            n,
                            k,
                            scale,
                            scale,
                            nullptr};
  return same(product8::kernels(), [&](const product8::Kernel& kernel, int threads) {
    std::vector<float> out(m * n);
    product8::affine(kernel, p, threads, out.data());
    return out;
  });
}

bool product8_all() {
  bool equal = true;
  for (const int bits : {8, 4}) {
    equal = product8_of(bits, true, true, 40, 200, 1104, 5) && equal;   // forward
    equal = product8_of(bits, true, false, 16, 512, 1104, 5) && equal;  // input gradient, split by columns
    equal = product8_of(bits, false, false, 64, 512, 272, 5) && equal;  // weight gradient
  }
  // Sums beyond int32: many to finish, many to pack.
  equal = product8_of(8, true, true, 400, 400, 64, 1 << 20) && equal;
  return product8_of(8, true, true, 32, 600, 512, 1 << 20) && equal;
}

bool product1_of(int a_bits, bool a_rows, std::int64_t m, int b_bits, bool b_rows, std::int64_t n, std::int64_t k) {
  const auto a = bytes(m * k * a_bits / 8), b = bytes(n * k * b_bits / 8);
  const product1::Operand x{a.data(), a_rows ? k : m, a_rows ? m : k, a_bits, a_rows};
  const product1::Operand w{b.data(), b_rows ? k : n, b_rows ? n : k, b_bits, b_rows};
  const float step = 0.5f, offset = -3;
  const std::int32_t zero = 1;
  const product1::Affine scale{&step, &zero, &offset, false};
  return same(product1::kernels(), [&](const product1::Kernel& kernel, int threads) {
    std::vector<float> out(m * n);
    product1::multiply(kernel, x, scale, w, scale, nullptr, threads, out.data());
    return out;
  });
}

bool product1_all() {
  constexpr std::int64_t kFew = 64, kMany = 576, kTerms = 4096;
  bool equal = true;
  for (const bool wide : {false, true}) {
    const std::int64_t m = wide ? kMany : kFew, n = wide ? kFew : kMany;
    equal = product1_of(1, false, m, 1, false, n, kTerms) && equal;  // forward
    for (const int bits : {1, 4}) {
      equal = product1_of(bits, false, m, 1, true, n, kTerms) && equal;  // input gradient
      equal = product1_of(bits, true, m, 1, true, n, kTerms) && equal;   // weight gradient
    }
  }
  equal = product1_of(2, true, kMany, 1, true, kFew, kTerms) && equal;
  return product1_of(1, true, kFew, 4, true, kMany, kTerms) && equal;
}

bool convolution8_all() {
  constexpr std::int64_t kN = 7, kIn = 128, kOut = 256, kSize = 12, kSmall = 3;
  const float step = 0.5f, offset = -3;
  const std::int32_t zero = 5;
  const convolution8::Geometry quarter{{4, 4}, {1, 1}, {1, 1}, 1}, half{{2, 2}, {0, 0}, {1, 1}, 1};
  bool equal = true;
  for (const int bits : {8, 4}) {
    const auto make = [&](const std::vector<std::uint8_t>& data, std::int64_t n, std::int64_t channels,
                          std::int64_t height, std::int64_t width) {
      return convolution8::Codes{data.data(), bits, n, channels, height, width, 0, 0, 1, &step, &zero, &offset};
    };
    const auto data = bytes(8 * 64 * 64 * 64);
    const auto x = make(data, kN, kIn, kSize, kSize), w = make(data, kOut, kIn, 3, 3),
               g = make(data, kN, kOut, kSmall, kSmall);
    const auto many = make(data, 8, 16, 64, 64), gradient = make(data, 8, 64, 32, 32);
    equal = same(convolution8::kernels(),
                 [&](const convolution8::Kernel& kernel, int threads) {
                   std::vector<float> out(kN * kSmall * kSmall * kOut + kN * kSize * kSize * kIn + 64 * 16);
                   float *y = out.data(), *dx = y + kN * kSmall * kSmall * kOut, *dw = dx + kN * kSize * kSize * kIn;
                   convolution8::forward(kernel, x, w, quarter, nullptr, kSmall, kSmall, threads, y);
                   convolution8::grad_input(kernel, g, w, quarter, kSize, kSize, threads, dx);
                   convolution8::grad_weight(kernel, gradient, many, half, 1, 1, threads, dw);
                   return out;
                 }) &&
            equal;
  }
  return equal;
}

bool convolution1_all() {
  constexpr std::int64_t kN = 7, kIn = 128, kOut = 256, kSize = 12, kSmall = 6;
  const float step = 0.5f, offset = -3;
  const std::int32_t zero = 1;
  const convolution1::Grid grid{&step, &zero, &offset, false};
  const convolution1::Geometry geometry{{2, 2}, {1, 1}, {1, 1}};
  const auto data = bytes(kOut * kIn * 9);
  const convolution1::Image x{data.data(), 1, kN, kIn, kSize, kSize, 0, 0, grid};
  const convolution1::Image w{data.data(), 1, kOut, kIn, 3, 3, 0, 0, grid};
  bool equal = true;
  for (const int bits : {1, 4}) {
    const convolution1::Image g{data.data(), bits, kN, kOut, kSmall, kSmall, 0, 0, grid};
    equal = same(convolution1::kernels(),
                 [&](const convolution1::Kernel& kernel, int threads) {
                   std::vector<float> out(kN * kSmall * kSmall * kOut + kN * kSize * kSize * kIn + kOut * kIn * 9);
                   float *y = out.data(), *dx = y + kN * kSmall * kSmall * kOut, *dw = dx + kN * kSize * kSize * kIn;
                   const bool all =
                       convolution1::forward(kernel, x, w, geometry, nullptr, kSmall, kSmall, threads, y) &&
                       convolution1::grad_input(kernel, g, w, geometry, kSize, kSize, threads, dx) &&
                       convolution1::grad_weight(kernel, g, x, geometry, 3, 3, threads, dw);
                   if (!all) out[0] = std::numeric_limits<float>::quiet_NaN();  // equals nothing
                   return out;
                 }) &&
            equal;
  }
  return equal;
}

bool fused_chain() {
  constexpr std::int64_t kN = 6, kHeight = 16, kWidth = 17, kC = 96, kSize = kN * kHeight * kWidth * kC;
  const std::vector<float> y = numbers(kSize), a(kC, 0.25f), b(kC, 1), mean(kC, 2), p(kC, 0.5f), q(kC, 0.125f),
                           r(kC, 3);
  const std::vector<std::uint32_t> flip(kC, 0);
  const fused::Map map{a.data(), b.data(), 0, 1};
  const fused::Adjoint adjoint{mean.data(), p.data(), q.data(), r.data()};
  struct Result {
    std::vector<float> numbers = std::vector<float>(2 * kSize + 4 * kC + 2 * kN * kC);
    std::vector<double> sums = std::vector<double>(4 * kC);
    std::vector<std::uint8_t> codes = std::vector<std::uint8_t>(kN * (kHeight + 2) * (kWidth + 2) * kC);
    std::vector<std::uint8_t> bits = std::vector<std::uint8_t>(kN * (kHeight + 2) * (kWidth + 2) * 16);
    std::vector<std::uint8_t> signs = std::vector<std::uint8_t>(kN * kHeight * kC * 8);
    bool operator==(const Result&) const = default;
  };
  bool equal = true;
  for (const bool pooled : {false, true}) {
    const fused::Images in{y.data(), kN, kHeight, kWidth, kC, pooled};
    equal = same(fused::kernels(),
                 [&](const fused::Kernel& kernel, int threads) {
                   Result out;
                   float *x = out.numbers.data(), *dy = x + kSize, *low = dy + kSize, *high = low + kN * kC;
                   double* sums = out.sums.data();
                   fused::moments(kernel, y.data(), kSize / kC, kC, threads, sums, sums + kC, high + kN * kC,
                                  high + kN * kC + kC);
                   fused::window_extremes(kernel, {y.data(), kN, kHeight, kWidth, kC, true}, threads, flip.data(),
                                          high + kN * kC + 2 * kC, high + kN * kC + 3 * kC);
                   fused::encode(kernel, in, map, {0, 1, 1, 3, 255}, 1, 1, kC, threads, out.codes.data());
                   fused::bits(kernel, in, map, 0.5f, 1, 1, 16, threads, out.bits.data());
                   fused::signs(kernel, y.data(), kN * kHeight, kWidth, kC, 8, threads, out.signs.data());
                   fused::apply(kernel, in, map, threads, x);
                   fused::gradient_sums(kernel, in, map, mean.data(), y.data(), threads, sums + 2 * kC, sums + 3 * kC);
                   fused::gradient(kernel, in, map, adjoint, y.data(), threads, dy, low, high);
                   return out;
                 }) &&
            equal;
  }
  return equal;
}

constexpr struct {
  const char* name;
  bool (*passes)();
} kOperations[] = {
    {"philox, int32", philox_bits<std::int32_t>},
    {"philox, int64", philox_bits<std::int64_t>},
    {"householder", householder_both_ways},
    {"householder, codes", [] { return householder_codes(false, true, 1000); }},
    {"householder, codes of adaptive groups", [] { return householder_codes(true, true, 1000); }},
    {"householder, codes of an adaptive group", [] { return householder_codes(true, false, 1000); }},
    {"householder, codes of rows left alone", [] { return householder_codes(true, false, 2); }},
    {"quantize", quantize_both_ways},
    {"product8", product8_all},
    {"product1", product1_all},
    {"convolution8", convolution8_all},
    {"convolution1", convolution1_all},
    {"fused", fused_chain},
};

int race() {
  std::int64_t sum = 0;
  cpu::split(1000, 1, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum += i;
  });
  std::printf("%lld\n", static_cast<long long>(sum));
  return 0;
}

// Has every call of cpu::split but the one in race() had several threads?
bool all_shared() {
  bool all = true;
#if defined(FQTSTATS_STD_THREADS)
  for (const cpu::Place* place = cpu::Place::first; place != nullptr; place = place->next) {
    char* const body = abi::__cxa_demangle(place->body, nullptr, nullptr, nullptr);
    if (!place->shared && std::strstr(body, "::race()") == nullptr) {
      std::printf("never on several threads: %s\n", body);
      all = false;
    }
    std::free(body);
  }
#endif
  return all;
}

}  // namespace
}  // namespace fqtstats

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "race") == 0) return fqtstats::race();
  bool passed = true;
  for (const auto& operation : fqtstats::kOperations) {
    const bool equal = operation.passes();
    std::printf("%s: %s\n", operation.name, equal ? "same on any number of threads" : "RESULTS DIFFER");
    passed = passed && equal;
  }
  return fqtstats::all_shared() && passed ? 0 : 1;
}
