// Products of one to eight rows with a matrix.
//
// out[r, y] = sum over x of rows[r, x] * matrix[y, x], in float32, for matrices of float32,
// bfloat16 or int8. Each weight is read once, and meets all rows.

#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

// Outputs that are worked on at once, at most.
constexpr int kMostOutputs = 3;
// Bytes of weights that are asked for before they are needed, at least.
constexpr size_t kAhead = 8192;

// Sums in float32, which start with nothing, of rows as they are.
struct InFloats {
  static constexpr int kSums = 1;
  struct Sums {
    Lanes lanes;
  };
  static void Start(Sums&, const char*) {}
  static Lanes Total(const Sums& sums) { return sums.lanes; }
  static float Step(const float*, int) { return 1; }
};

// How weights meet rows: `kSize` weights, and what they meet of a row, `kBytes`.
template <class Weight>
struct Operands : InFloats {
  static constexpr int kSize = kLanes, kBytes = sizeof(Lanes);
  using Vector = Lanes;
  static Vector Prepare(const Weight* weights) { return Widen(weights); }
  static void Add(Sums& sums, Vector weights, const char* row) {
    sums.lanes += weights * Load<float>(row);
  }
  static void Pack(const float* row, float, char* to) { std::memcpy(to, row, kBytes); }
};

#ifdef __AVX512BF16__
template <>
struct Operands<BFloat16> : InFloats {
  static constexpr int kSize = 2 * kLanes, kBytes = sizeof(Lanes);
  using Vector = __m512bh;
  static Vector Prepare(const BFloat16* weights) { return Bits<Vector>(weights); }
  static void Add(Sums& sums, Vector weights, const char* row) {
    sums.lanes = _mm512_dpbf16_ps(sums.lanes, weights, Bits<Vector>(row));
  }
  static void Pack(const float* row, float, char* to) {
    for (int i = 0; i < kSize; ++i)  // It is bfloat16, widened: nothing is lost.
      std::memcpy(to + 2 * i, reinterpret_cast<const char*>(row + i) + 2, 2);
  }
};
#endif

#ifdef __AVX512VNNI__
// Adds products of four neighbours each: those of `a` without a sign, those of `b` with one.
inline __m512i DotBytes(__m512i sum, __m512i a, __m512i b) {
  // By its intrinsic, GCC 12 copies every sum before and after, and runs out of registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// A row is rounded to 24 bits below its largest number, and split into three parts of 8 bits, whose
// sums with 8-bit weights, up to a million of them, are whole. So no weight is widened.
template <>
struct Operands<int8_t> {
  static constexpr int kParts = 3;
  static constexpr int kSize = 4 * kLanes, kBytes = kParts * kSize, kSums = kParts;
  using Vector = __m512i;
  struct Sums {
    __m512i parts[kParts];
  };
  // The product is one of numbers without a sign and numbers with one. So 128 is added to weights,
  // and what that adds to sums is taken off where they start.
  static Vector Prepare(const int8_t* weights) {
    return _mm512_xor_si512(Bits<Vector>(weights), _mm512_set1_epi8(-128));
  }
  static void Add(Sums& sums, Vector weights, const char* row) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i)
      sums.parts[i] = DotBytes(sums.parts[i], weights, Bits<Vector>(row + i * kSize));
  }
  static Lanes Total(const Sums& sums) {
    Lanes total = _mm512_cvtepi32_ps(sums.parts[kParts - 1]);
    for (int i = kParts - 2; i >= 0; --i) total = total * 256 + _mm512_cvtepi32_ps(sums.parts[i]);
    return total;
  }
  static float Step(const float* row, int width) {
    float most = 0, strange = 0;
    for (int x = 0; x < width; ++x) {
      most = std::max(most, std::abs(row[x]));
      strange += row[x] - row[x];  // Not a number, if that is infinite or none.
    }
    // By 127 and not 128: no part of the largest number is then above 127.
    return (most > 0 ? most / (127 << 16) : 1) + strange;
  }
  static void Pack(const float* row, float step, char* to) {
    for (int x = 0; x < kSize; x += kLanes) {
      auto rest = (LanesOf<int32_t>)_mm512_cvtps_epi32(Load<float>(row + x) / step);
      for (int i = 0; i < kParts; ++i) {
        const LanesOf<int32_t> low = ((rest + 128) & 255) - 128;  // From -128 to 127.
        const auto part = __builtin_convertvector(low, LanesOf<int8_t>);
        std::memcpy(to + i * kSize + x, &part, sizeof(part));
        rest = (rest - low) >> 8;
      }
    }
  }
  static void Start(Sums& sums, const char* row) {
    Sums added = {};
    Add(added, _mm512_set1_epi8(-128), row);
    for (int i = 0; i < kParts; ++i)
      sums.parts[i] = _mm512_sub_epi32(sums.parts[i], added.parts[i]);
  }
};
#endif

// Rows as weights meet them, [X / kSize][R][kBytes].
template <class Weight>
struct Packed {
  using Of = Operands<Weight>;
  struct alignas(64) Line {  // A load that crosses cache lines takes twice as long.
    char bytes[64];
  };

  Packed(const float* rows, int count, int width)
      : count(count),
        lines(static_cast<size_t>((width + Of::kSize - 1) / Of::kSize) * count *
              (Of::kBytes / sizeof(Line))),
        steps(count),
        starts(count) {
    for (int r = 0; r < count; ++r, rows += width) {
      steps[r] = Of::Step(rows, width);
      for (int x = 0; x < width; x += Of::kSize) {
        float padded[Of::kSize] = {};
        std::copy(rows + x, rows + std::min(width, x + Of::kSize), padded);
        char* to = const_cast<char*>(at(x, r));
        Of::Pack(padded, steps[r], to);
        Of::Start(starts[r], to);
      }
    }
  }
  // Returns what weights from `x` on meet of row `r`, and, behind it, of the next.
  const char* at(int x, int r) const {
    return lines[0].bytes + (static_cast<size_t>(x / Of::kSize) * count + r) * Of::kBytes;
  }

  int count;
  std::vector<Line> lines;
  std::vector<float> steps;               // What a row's totals are multiplied by.
  std::vector<typename Of::Sums> starts;  // What a row's sums start with.
};

// Multiplies R rows by the weights of outputs `first` to `last`.
template <int R, class Weight>
void MultiplyRows(const Packed<Weight>& rows, const Weight* matrix, float* out, int width,
                  int outputs, int first, int last) {
  using Of = Operands<Weight>;
  // Sums stay in registers, and are enough for none to wait for its last addition. Many rows are
  // read for several outputs at once; of few that takes longer.
  constexpr int kOutputs = Of::kSums > 1 || R <= 4 ? 1 : kMostOutputs;
  constexpr int kTurns = std::clamp(8 / (R * Of::kSums * kOutputs), 1, 4);
  // To ask for weights this early, and into the second cache alone, is worth up to a half.
  const size_t group = static_cast<size_t>(kOutputs) * width;
  const size_t ahead = (kAhead / (group * sizeof(Weight)) + 1) * group;
  for (int y = first; y < last; y += kOutputs) {
    typename Of::Sums sums[kTurns][R][kOutputs] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) sums[0][r][i] = rows.starts[r];
    }
    const Weight* weights[kOutputs];
    // Past the last output the last is computed again, and dropped.
    for (int i = 0; i < kOutputs; ++i)
      weights[i] = matrix + static_cast<size_t>(std::min(y + i, last - 1)) * width;
    const auto add = [&](auto& to, const Weight* const* from, int x) {
      typename Of::Vector w[kOutputs];
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) w[i] = Of::Prepare(from[i]);
      const char* row = rows.at(x, 0);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, row += Of::kBytes) {
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) Of::Add(to[r][i], w[i], row);
      }
    };
    int x = 0;
    for (; x + kTurns * Of::kSize <= width; x += kTurns * Of::kSize) {
#pragma GCC unroll 8
      for (int turn = 0; turn < kTurns; ++turn) {
        const Weight* from[kOutputs];
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) {
          from[i] = weights[i] + x + turn * Of::kSize;
          __builtin_prefetch(from[i] + ahead, 0, 2);
        }
        add(sums[turn], from, x + turn * Of::kSize);
      }
    }
    for (; x < width; x += Of::kSize) {  // Padded, at the end.
      Weight padded[kOutputs][Of::kSize] = {};
      const Weight* from[kOutputs];
      for (int i = 0; i < kOutputs; ++i) {
        std::copy(weights[i] + x, weights[i] + std::min(width, x + Of::kSize), padded[i]);
        from[i] = padded[i];
      }
      add(sums[0], from, x);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) {
        Lanes total = Of::Total(sums[0][r][i]);
#pragma GCC unroll 8
        for (int turn = 1; turn < kTurns; ++turn) total += Of::Total(sums[turn][r][i]);
        if (y + i < last)
          out[static_cast<size_t>(r) * outputs + y + i] = Sum(total) * rows.steps[r];
      }
    }
  }
}
