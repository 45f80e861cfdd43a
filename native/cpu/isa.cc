#include "cpu/isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace fqtstats::cpu {
namespace {

constexpr Isa kLevels[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::avx512vbmi};
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi"};
static_assert(std::size(kLevels) == std::size(kNames));

Isa highest() {
  Isa best = Isa::scalar;
  for (Isa isa : kLevels)
    if (supported(isa)) best = isa;
  return best;
}

Isa read_limit() {
  const char* wanted = std::getenv("FQTSTATS_ISA");
  if (wanted == nullptr || *wanted == '\0') return highest();
  std::string have;
  for (Isa isa : kLevels) {
    if (!supported(isa)) continue;
    if (name(isa) == std::string(wanted)) return isa;
    have += (have.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("FQTSTATS_ISA must name an instruction set that this machine has (" + have + "), got '" +
                              wanted + "'; unset it for the fastest");
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool supported(Isa isa) {
#if defined(__x86_64__)
  // These builtins also check that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool vbmi = vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vpopcntdq");
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512vnni:
      return vnni;
    case Isa::avx512vbmi:
      return vbmi;
  }
  return false;
#else
  return isa == Isa::scalar;
#endif
}

Isa limit() {
  static const Isa value = read_limit();
  return value;
}

}  // namespace fqtstats::cpu
