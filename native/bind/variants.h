// Variants of an operation: listed, and found by name.
#pragma once

#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace fqtstats::bind {

// One row of fqtstats.ops.kernels().
struct Variant {
  std::string op;
  std::string name;
  bool available;
  bool selected;
};

template <typename Kernel>
std::vector<Variant> list_variants(const char* op, std::span<const Kernel> rows) {
  const Kernel& selected = cpu::select(rows);
  std::vector<Variant> list;
  for (const Kernel& row : rows) list.push_back({op, row.name, cpu::supported(row.isa), &row == &selected});
  return list;
}

// The named variant, or the selected one where no name is given. Throws std::invalid_argument for a name that is not
// there or does not run here; the message lists those that do.
template <typename Kernel>
const Kernel& find_variant(std::span<const Kernel> rows, const std::optional<std::string>& name) {
  if (!name) return cpu::select(rows);
  std::string have;
  for (const Kernel& row : rows) {
    if (!cpu::supported(row.isa)) continue;
    if (*name == row.name) return row;
    have += (have.empty() ? "" : ", ") + std::string(row.name);
  }
  throw std::invalid_argument("variant must be one of " + have + ", got '" + *name + "'");
}

}  // namespace fqtstats::bind
