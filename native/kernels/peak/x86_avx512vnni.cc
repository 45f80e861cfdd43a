#include "kernels/peak/x86_avx512.h"

namespace fqtstats::peak {

extern const Kernel avx512vnni{"avx512vnni", cpu::Isa::avx512vnni, fp32, int8, nullptr, nullptr};

}  // namespace fqtstats::peak
