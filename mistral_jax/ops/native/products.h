// Products of rows with a matrix.
//
// out[r, y] = sum over x of rows[r, x] * matrix[y, x], in float32, for float32, bfloat16 and int8
// matrices. Each weight of the matrix is read from memory once, and multiplied by all of a few rows.
// Many rows are supported for int8, on processors that multiply bytes.

#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

// The most outputs computed at a time.
constexpr int kMostOutputs = 4;
// Rows of a group, when there are many rows: its sums with kMostOutputs outputs stay in registers.
constexpr int kGroup = 2;
// Bytes of rows that are multiplied by all outputs before the next rows: they stay in the L2 cache.
constexpr size_t kNear = 1 << 18;
// The least distance, in bytes of weights, from a prefetch to its use.
constexpr size_t kAhead = 8192;

// Sums in float32 that start at zero, of rows that are not scaled.
struct InFloats {
  static constexpr int kSums = 1;
  struct Sums {
    Lanes lanes;
  };
  static void Start(Sums&, const char*) {}
  static Lanes Total(const Sums& sums) { return sums.lanes; }
  static float Step(const float*, int) { return 1; }
};

// How weights are multiplied by a row: kSize weights at a time, by kBytes of the packed row.
template <class Weight>
struct Operands : InFloats {
  static constexpr int kSize = kLanes, kBytes = sizeof(Lanes);
  using Vector = Lanes;
  static Vector Prepare(const Weight* weights) { return Widen(weights); }
  template <int O>
  static void Add(Sums (&sums)[O], const Vector (&weights)[O], const char* row) {
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) sums[i].lanes += weights[i] * Load<float>(row);
  }
  static void Pack(const float* row, float, char* to) { std::memcpy(to, row, kBytes); }
};

template <>
struct Operands<BFloat16> : InFloats {
  static constexpr int kSize = 2 * kLanes;
#ifdef __AVX512BF16__
  static constexpr int kBytes = sizeof(Lanes);
  using Vector = __m512bh;
  static Vector Prepare(const BFloat16* weights) { return Bits<Vector>(weights); }
  template <int O>
  static void Add(Sums (&sums)[O], const Vector (&weights)[O], const char* row) {
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i)
      sums[i].lanes = _mm512_dpbf16_ps(sums[i].lanes, weights[i], Bits<Vector>(row));
  }
  static void Pack(const float* row, float, char* to) {
    for (int i = 0; i < kSize; ++i)  // The row was bfloat16 before it was widened: this is exact.
      std::memcpy(to + 2 * i, reinterpret_cast<const char*>(row + i) + 2, 2);
  }
#else
  // Even and odd weights are kept in two vectors: widening each takes one instruction.
  static constexpr int kBytes = 2 * sizeof(Lanes);
  struct Vector {
    Lanes firsts, seconds;
  };
  static Vector Prepare(const BFloat16* weights) {
    const auto pairs = Load<uint32_t>(weights);
    return {reinterpret_cast<Lanes>(pairs << 16), reinterpret_cast<Lanes>(pairs & 0xffff0000)};
  }
  template <int O>
  static void Add(Sums (&sums)[O], const Vector (&weights)[O], const char* row) {
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) {
      sums[i].lanes += weights[i].firsts * Load<float>(row);
      sums[i].lanes += weights[i].seconds * Load<float>(row + sizeof(Lanes));
    }
  }
  static void Pack(const float* row, float, char* to) {
    for (int i = 0; i < kSize; ++i)
      std::memcpy(to + (i / 2 + i % 2 * kLanes) * sizeof(float), row + i, sizeof(float));
  }
#endif
};

#ifdef __AVX512VNNI__
// Adds to each 32-bit lane the products of four unsigned bytes of `a` and four signed bytes of `b`.
inline __m512i DotBytes(__m512i sum, __m512i a, __m512i b) {
  // With the intrinsic, GCC 12 copies every sum before and after, and runs out of registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// A row is rounded to 24 bits below its largest number, and split into three parts of 8 bits. Sums of
// up to a million products of a part with 8-bit weights are exact, and no weight is widened.
template <>
struct Operands<int8_t> {
  static constexpr int kParts = 3;
  static constexpr int kSize = 4 * kLanes, kBytes = kParts * kSize, kSums = kParts;
  using Vector = __m512i;
  struct Sums {
    __m512i parts[kParts];
  };
  // The instruction multiplies unsigned by signed bytes. So 128 is added to each weight, and sums start
  // with minus what this adds to them.
  static Vector Prepare(const int8_t* weights) {
    return _mm512_xor_si512(Bits<Vector>(weights), _mm512_set1_epi8(-128));
  }
  template <int O>
  static void Add(Sums (&sums)[O], const Vector (&weights)[O], const char* row) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const auto numbers = Bits<Vector>(row + part * kSize);
#pragma GCC unroll 8
      for (int i = 0; i < O; ++i)
        sums[i].parts[part] = DotBytes(sums[i].parts[part], weights[i], numbers);
    }
  }
  static Lanes Total(const Sums& sums) {
    Lanes total = _mm512_cvtepi32_ps(sums.parts[kParts - 1]);
    for (int i = kParts - 2; i >= 0; --i) total = total * 256 + _mm512_cvtepi32_ps(sums.parts[i]);
    return total;
  }
  static float Step(const float* row, int width) {
    Lanes most = {}, strange = {};
    for (int x = 0; x < width; x += kLanes) {
      float padded[kLanes] = {};
      std::copy(row + x, row + std::min(width, x + kLanes), padded);
      const Lanes numbers = Load<float>(padded);
      most = _mm512_max_ps(most, _mm512_abs_ps(numbers));
      strange += numbers - numbers;  // NaN if a number is infinite or NaN.
    }
    const float largest = _mm512_reduce_max_ps(most);
    // 127 rather than 128 keeps each part of the largest number at 127 or below.
    return (largest > 0 ? largest / (127 << 16) : 1) + Sum(strange);
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
    Sums added[1] = {};
    Add(added, {_mm512_set1_epi8(-128)}, row);
    for (int i = 0; i < kParts; ++i)
      sums.parts[i] = _mm512_sub_epi32(sums.parts[i], added[0].parts[i]);
  }
};
#endif

// Returns the size of the first group of a few rows, whose sums with three outputs stay in registers.
constexpr int Together(int count) {
  constexpr int kMost = kRegisters / 4;
  return count > kMost ? (count + 1) / 2 : count;
}

// Rows in the order in which they are read, in groups: [groups][X / kSize][rows of a group][kBytes].
template <class Weight>
struct Packed {
  using Of = Operands<Weight>;
  struct alignas(64) Line {  // A load across two cache lines takes twice as long.
    char bytes[64];
  };

  Packed(int count, int width, int group)
      : count(count),
        width(width),
        group(group),
        row_bytes(static_cast<size_t>((width + Of::kSize - 1) / Of::kSize) * Of::kBytes),
        lines((count * row_bytes + sizeof(Line) - 1) / sizeof(Line)),
        steps(count),
        starts(count) {}

  void Pack(const float* rows, int first, int last) {
    for (int r = first; r < last; ++r) {
      const float* row = rows + static_cast<size_t>(r) * width;
      steps[r] = Of::Step(row, width);
      char* to = lines[0].bytes + r / group * group * row_bytes + r % group * Of::kBytes;
      for (int x = 0; x < width; x += Of::kSize, to += size(r / group) * Of::kBytes) {
        float padded[Of::kSize] = {};
        std::copy(row + x, row + std::min(width, x + Of::kSize), padded);
        Of::Pack(padded, steps[r], to);
        Of::Start(starts[r], to);
      }
    }
  }
  int size(int g) const { return std::min(group, count - g * group); }
  const char* of(int g) const { return lines[0].bytes + g * group * row_bytes; }

  int count, width, group;
  size_t row_bytes;
  std::vector<Line> lines;
  std::vector<float> steps;               // The factor of a row's totals.
  std::vector<typename Of::Sums> starts;  // The initial sums of a row.
};

// Multiplies the R rows of group `g` by the weights of O outputs y, y + apart, ... before `last`. With
// `kAsk`, prefetches the weights that come `ahead` weights later.
template <int R, int O, bool kAsk, class Weight>
inline void MultiplyGroup(const Packed<Weight>& rows, int g, const Weight* matrix, float* out,
                          int outputs, int y, int apart, int last, size_t ahead) {
  using Of = Operands<Weight>;
  // Enough sums that no addition waits for the one before, and few enough to stay in registers.
  constexpr int kTurns = std::clamp(8 / (R * Of::kSums * O), 1, kLanes == 16 ? 4 : 8);
  // With one or two rows in float the processor prefetches most weights by itself in time, and
  // further prefetches slow it down: prefetch every second cache line only.
  constexpr int kSkip = Of::kSums == 1 && R <= 2 ? 2 : 1;
  // Steps between two prefetched cache lines.
  constexpr int kSteps = std::max<int>(1, kSkip * 64 / (Of::kSize * sizeof(Weight)));
  const int width = rows.width, row = g * rows.group;
  typename Of::Sums sums[kTurns][R][O] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) sums[0][r][i] = rows.starts[row + r];
  }
  const Weight* weights[O];
  // Past the last output, the last one is computed again and not stored.
#pragma GCC unroll 8
  for (int i = 0; i < O; ++i)
    weights[i] = matrix + static_cast<size_t>(std::min(y + i * apart, last - 1)) * width;
  const char* numbers = rows.of(g);
  const auto add = [&](auto& to, const Weight* const* from) {
    typename Of::Vector w[O];
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) w[i] = Of::Prepare(from[i]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, numbers += Of::kBytes) Of::Add(to[r], w, numbers);
  };
  int x = 0;
  for (; x + kTurns * Of::kSize <= width; x += kTurns * Of::kSize) {
#pragma GCC unroll 8
    for (int turn = 0; turn < kTurns; ++turn) {
      const Weight* from[O];
#pragma GCC unroll 8
      for (int i = 0; i < O; ++i) {
        from[i] = weights[i] + x + turn * Of::kSize;
        if (kAsk && turn % kSteps == 0) __builtin_prefetch(from[i] + ahead, 0, 2);
      }
      add(sums[turn], from);
    }
  }
  for (; x < width; x += Of::kSize) {  // The remaining weights, padded with zeros.
    Weight padded[O][Of::kSize] = {};
    const Weight* from[O];
    for (int i = 0; i < O; ++i) {
      std::copy(weights[i] + x, weights[i] + std::min(width, x + Of::kSize), padded[i]);
      from[i] = padded[i];
    }
    add(sums[0], from);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) {
      Lanes total = Of::Total(sums[0][r][i]);
#pragma GCC unroll 8
      for (int turn = 1; turn < kTurns; ++turn) total += Of::Total(sums[turn][r][i]);
      if (y + i * apart < last)
        out[static_cast<size_t>(row + r) * outputs + y + i * apart] =
            Sum(total) * rows.steps[row + r];
    }
  }
}

// Returns the distance, in weights, from a prefetch to its use, in whole steps. Prefetching this early,
// into L2 only, makes products of 2 to 8 rows 1.2 to 1.6 times as fast.
template <class Weight>
size_t Ahead(size_t step) {
  return (kAhead / (step * sizeof(Weight)) + 1) * step;
}

// Multiplies R rows, in one group or two, by the weights of outputs `first` to `last`.
template <int R, class Weight>
void MultiplyFew(const Packed<Weight>& rows, const Weight* matrix, float* out, int outputs,
                 int first, int last) {
  constexpr int kFirst = Together(R);
  // With AVX-512, weights are prefetched, and many rows share the weights of neighbouring outputs; for
  // few rows one output at a time is faster. Other processors prefetch by themselves, and further ahead
  // the more streams are read at once: so outputs are taken far apart.
  constexpr bool kAsk = kLanes == 16;
  constexpr bool kFew = R <= (kAsk ? 4 : 2);
  constexpr int kOutputs = !kAsk ? (kFew ? 4 : 3) : kFew || Operands<Weight>::kSums > 1 ? 1 : 3;
  const size_t ahead = Ahead<Weight>(static_cast<size_t>(kOutputs) * rows.width);
  const int apart = kAsk ? 1 : (last - first + kOutputs - 1) / kOutputs;
  for (int y = first; y < (kAsk ? last : first + apart); y += kAsk ? kOutputs : 1) {
    MultiplyGroup<kFirst, kOutputs, kAsk>(rows, 0, matrix, out, outputs, y, apart, last, ahead);
    if constexpr (R > kFirst)
      MultiplyGroup<R - kFirst, kOutputs, false>(rows, 1, matrix, out, outputs, y, apart, last, 0);
  }
}

// Multiplies all rows, in groups of kGroup, by the weights of outputs `first` to `last`.
template <class Weight>
void MultiplyMany(const Packed<Weight>& rows, const Weight* matrix, float* out, int outputs,
                  int first, int last) {
  const int groups = (rows.count + kGroup - 1) / kGroup;
  const int near = std::max<int>(1, kNear / (kGroup * rows.row_bytes));
  const size_t step = static_cast<size_t>(kMostOutputs) * rows.width;
  const size_t ahead = Ahead<Weight>(step);
  for (int begin = 0; begin < groups; begin += near) {
    const int end = std::min(groups, begin + near);
    for (int y = first; y < last; y += kMostOutputs) {
      const Weight* later = matrix + static_cast<size_t>(y) * rows.width + ahead;
      for (size_t i = 0; begin == 0 && i < step; i += 64 / sizeof(Weight))
        __builtin_prefetch(later + i, 0, 2);
      for (int g = begin; g < end; ++g) {
        const auto multiply = rows.size(g) == 1 ? MultiplyGroup<1, kMostOutputs, false, Weight>
                                                : MultiplyGroup<2, kMostOutputs, false, Weight>;
        multiply(rows, g, matrix, out, outputs, y, 1, last, 0);
      }
    }
  }
}
