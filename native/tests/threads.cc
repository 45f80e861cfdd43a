// Every operation that uses threads, with one and with several, and from two threads at once: the results must be
// equal. For the thread sanitizer, with FQTSTATS_STD_THREADS. `threads race` makes a race inside cpu::split instead,
// which the sanitizer must report.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <span>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "kernels/householder/householder.h"
#include "kernels/philox/philox.h"

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

bool philox_bits() {
  return same(philox::kernels(), [](const philox::Kernel& kernel, int threads) {
    std::vector<std::int32_t> out(300'003);
    philox::bits(kernel, {1, 2, 3, 4}, 24, 0, std::ssize(out), threads, out.data());
    return out;
  });
}

bool householder_both_ways() {
  constexpr std::int64_t kRows = 70, kColumns = 7001;
  std::vector<float> x(kRows * kColumns), scale(kRows, 0.75f);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 1000) - 500;
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

constexpr struct {
  const char* name;
  bool (*passes)();
} kOperations[] = {
    {"philox", philox_bits},
    {"householder", householder_both_ways},
};

int race() {
  std::int64_t sum = 0;
  cpu::split(1000, 1, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum += i;
  });
  std::printf("%lld\n", static_cast<long long>(sum));
  return 0;
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
  return passed ? 0 : 1;
}
