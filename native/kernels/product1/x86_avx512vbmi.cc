// AVX-512 with VBMI, VNNI and VPOPCNTDQ. Tables: vpermb looks up 16 rows of `index` in four tables at once, the four
// results of a row side by side, so that vpdpbusd by ones adds them up in 32 bits. Two 1-bit operands: vpopcntq.
#include "kernels/integers.h"
#include "kernels/product1/zmm.h"

namespace fqtstats::product1 {
namespace {

struct Vbmi {
  static void spread(const std::uint64_t* w, std::uint8_t* out) {
    for (int v = 0; v < 4; ++v) {
      std::uint32_t at[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        std::uint32_t x = w[i] >> (16 * v) & 0xffff;  // four nibbles to four bytes, each with the number of its table
        x = (x | x << 8) & 0x00ff00ff;
        at[i] = ((x | x << 4) & 0x0f0f0f0f) | 0x30201000;
      }
      std::memcpy(out + 64 * v, at, 64);
    }
  }

  static void build(const __m128i (&codes)[4], std::uint8_t* out) { build_tables(codes, out); }

  // Four look-ups of at most 60 each fit into an unsigned byte.
  template <int kBits>
  __attribute__((noinline)) static void tile(const std::uint8_t* index, const std::uint8_t* tables, std::int64_t groups,
                                             std::int32_t* c, std::int64_t ldc, bool first) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i left[kTile], right[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) left[j] = right[j] = _mm512_setzero_si512();
    for (std::int64_t g = 0; g < groups; ++g, index += kIndexBytes) {
      const __m512i l0 = load512(index), l1 = load512(index + 64), l2 = load512(index + 128), l3 = load512(index + 192);
      const __m512i r0 = load512(index + 256), r1 = load512(index + 320), r2 = load512(index + 384),
                    r3 = load512(index + 448);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j, tables += kTableBytes) {
        const __m512i t0 = load512(tables), t1 = load512(tables + 64), t2 = load512(tables + 128),
                      t3 = load512(tables + 192);
        left[j] =
            _mm512_dpbusd_epi32(left[j], sum(look_up(l0, t0), look_up(l1, t1), look_up(l2, t2), look_up(l3, t3)), one);
        right[j] =
            _mm512_dpbusd_epi32(right[j], sum(look_up(r0, t0), look_up(r1, t1), look_up(r2, t2), look_up(r3, t3)), one);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j, c += ldc) {
      if (!first) {
        left[j] = _mm512_add_epi32(left[j], load512(c));
        right[j] = _mm512_add_epi32(right[j], load512(c + kBlock));
      }
      _mm512_storeu_si512(c, left[j]);
      _mm512_storeu_si512(c + kBlock, right[j]);
    }
  }

  static void transpose(const std::int32_t* c, std::int64_t ldc, std::int32_t (*t)[kPanel]) {
    transpose_square(c, ldc, t);
  }

 private:
  __attribute__((always_inline)) static __m512i look_up(__m512i index, __m512i table) {
    return _mm512_permutexvar_epi8(index, table);
  }
  __attribute__((always_inline)) static __m512i sum(__m512i a, __m512i b, __m512i c, __m512i d) {
    return _mm512_add_epi8(_mm512_add_epi8(a, b), _mm512_add_epi8(c, d));
  }
};

// --- 1 bit x 1 bit ---------------------------------------------------------------------------------------------------

constexpr int kRowsPerTile = 6;
constexpr std::int64_t kCached = 1 << 18;  // bytes of panels per pass, in the second-level cache

// A panel is [groups][kPanel] words.
void pack_words(const Matrix& x, std::int64_t groups, std::int64_t panel, std::uint8_t* out) {
  for (std::int64_t g = 0; g < groups; ++g, out += 8 * kPanel)
    for (std::int64_t i = 0, row = panel * kPanel; i < kPanel; ++i, ++row) {
      const std::uint64_t word = row < x.rows ? load<std::uint64_t>(x.data + row * x.stride, x.bytes, 8 * g) : 0;
      std::memcpy(out + 8 * i, &word, 8);
    }
}

__attribute__((noinline)) void count_tile(const std::uint8_t* const (&rows)[kRowsPerTile], const std::uint8_t* panel,
                                          std::int64_t groups, std::int32_t (*s)[kPanel]) {
  if (groups == 0) {
    std::memset(s, 0, sizeof *s * kRowsPerTile);
    return;
  }
  __m512i c[kRowsPerTile][4];
  const auto add = [&](std::int64_t g, auto first) __attribute__((always_inline)) {
    const __m512i b[4] = {load512(panel), load512(panel + 64), load512(panel + 128), load512(panel + 192)};
#pragma GCC unroll 6
    for (int i = 0; i < kRowsPerTile; ++i) {
      long long word;
      std::memcpy(&word, rows[i] + g, 8);
      const __m512i a = _mm512_set1_epi64(word);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i n = _mm512_popcnt_epi64(_mm512_and_si512(a, b[j]));
        c[i][j] = first ? n : _mm512_add_epi64(c[i][j], n);
      }
    }
    panel += 8 * kPanel;
  };
  add(0, std::true_type{});
  for (std::int64_t g = 8; g < 8 * groups; g += 8) add(g, std::false_type{});
  const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#pragma GCC unroll 6
  for (int i = 0; i < kRowsPerTile; ++i) {
    _mm512_store_si512(s[i], _mm512_permutex2var_epi32(c[i][0], low, c[i][1]));
    _mm512_store_si512(s[i] + 16, _mm512_permutex2var_epi32(c[i][2], low, c[i][3]));
  }
}

void count(const Job& job, std::int64_t begin, std::int64_t end) {
  const Matrix& x = job.table;
  const Epilogue e = *job.epilogue;  // a copy: no store can alias it
  const std::int64_t panel_bytes = job.groups * 8 * kPanel, panels = ceil_div(job.index.rows, kPanel);
  const std::int64_t pass = kCached / (panel_bytes + 1) + 1;
  alignas(64) std::int32_t s[kRowsPerTile][kPanel];
  for (std::int64_t first = 0; first < panels; first += pass)
    for (std::int64_t m = begin; m < end; m += kRowsPerTile) {
      const std::uint8_t* rows[kRowsPerTile];  // the last one again, where there are fewer
      for (int i = 0; i < kRowsPerTile; ++i) rows[i] = x.data + least(m + i, end - 1) * x.stride;
      for (std::int64_t p = first; p < least(panels, first + pass); ++p) {
        count_tile(rows, job.panels + p * panel_bytes, job.groups, s);
        const std::int64_t n = p * kPanel, columns = least(kPanel, e.columns - n);
        for (int i = 0; i < least(kRowsPerTile, end - m); ++i) finish(e, m + i, n, columns, s[i]);
      }
    }
}

}  // namespace

extern const Kernel avx512vbmi{"avx512vbmi",
                               cpu::Isa::avx512vbmi,
                               {8 * kPanel, pack_words, count},
                               table_path<Vbmi, 2>(),
                               table_path<Vbmi, 4>(),
                               transpose,
                               sums};

}  // namespace fqtstats::product1
