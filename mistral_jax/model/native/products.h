// Products of one to eight rows with a matrix.
//
// out[r, y] = sum over x of rows[r, x] * matrix[y, x], in float32, for matrices of float32,
// bfloat16 or int8. Each weight is read once, and meets all rows.

#pragma once

#include <cstdlib>
#include <memory>

#include "lanes.h"

// Outputs that are worked on at once.
constexpr int kMostOutputs = 3;

// How weights meet rows: a vector of weights times one of a row, added to sums.
template <class Weight>
struct Operands {
  static constexpr int kSize = kLanes;
  using Row = float;
  using Vector = Lanes;
  static Vector Load(const Weight* weights) { return Widen(weights); }
  static Lanes MultiplyAdd(Lanes sum, Vector weights, Lanes row) { return sum + weights * row; }
  static Row From(float x) { return x; }
};

#ifdef __AVX512BF16__
template <>
struct Operands<BFloat16> {
  static constexpr int kSize = 2 * kLanes;
  using Row = BFloat16;
  using Vector = __m512bh;
  static Vector Load(const BFloat16* weights) {
    Vector vector;
    std::memcpy(&vector, weights, sizeof(vector));
    return vector;
  }
  static Lanes MultiplyAdd(Lanes sum, Vector weights, Vector row) {
    return _mm512_dpbf16_ps(sum, weights, row);
  }
  static Row From(float x) {  // The rows are bfloat16, widened: nothing is lost.
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  }
};
#endif

// Copies a vector of every row in turn, [X / size][R][size], and pads with zeros.
template <class Weight>
std::unique_ptr<typename Operands<Weight>::Row[], void (*)(void*)> Pack(const float* rows,
                                                                       int count, int width) {
  using Of = Operands<Weight>;
  // Aligned, since a load that crosses cache lines takes twice as long.
  constexpr size_t kLine = 64;
  const size_t vectors = (width + Of::kSize - 1) / Of::kSize, bytes = vectors * count * kLine;
  auto* packed = static_cast<typename Of::Row*>(std::aligned_alloc(kLine, bytes));
  std::memset(packed, 0, bytes);
  for (int r = 0; r < count; ++r)
    for (int x = 0; x < width; ++x)
      packed[(static_cast<size_t>(x / Of::kSize) * count + r) * Of::kSize + x % Of::kSize] =
          Of::From(rows[static_cast<size_t>(r) * width + x]);
  return {packed, std::free};
}

// Multiplies R packed rows by the weights of outputs `first` to `last`.
template <int R, class Weight>
void MultiplyRows(const typename Operands<Weight>::Row* packed, const Weight* matrix, float* out,
                  int width, int outputs, int first, int last) {
  using Of = Operands<Weight>;
  // Sums stay in registers; there are enough for none to wait for its last addition.
  constexpr int kOutputs = R == 1 ? 1 : kMostOutputs, kParts = R == 1 ? 4 : 1;
  for (int y = first; y < last; y += kOutputs) {
    Lanes sums[kParts][R][kOutputs] = {};
    const Weight* weights[kOutputs];
    // Past the last output the last is computed again, and dropped.
    for (int i = 0; i < kOutputs; ++i)
      weights[i] = matrix + static_cast<size_t>(std::min(y + i, last - 1)) * width;
    const auto add = [&](Lanes(&to)[R][kOutputs], const Weight* const* from, size_t x) {
      typename Of::Vector w[kOutputs];
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) w[i] = Of::Load(from[i]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        typename Of::Vector row;
        std::memcpy(&row, packed + x * R + r * Of::kSize, sizeof(row));
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) to[r][i] = Of::MultiplyAdd(to[r][i], w[i], row);
      }
    };
    int x = 0;
    for (; x + kParts * Of::kSize <= width; x += kParts * Of::kSize) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const Weight* from[kOutputs];
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) {
          from[i] = weights[i] + x + part * Of::kSize;
          // The processor follows one output by itself; of several it has to be told what is next.
          if (kOutputs > 1) __builtin_prefetch(from[i] + static_cast<size_t>(kOutputs) * width);
        }
        add(sums[part], from, x + part * Of::kSize);
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
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < std::min(kOutputs, last - y); ++i) {
        Lanes sum = sums[0][r][i];
        for (int part = 1; part < kParts; ++part) sum += sums[part][r][i];
        out[static_cast<size_t>(r) * outputs + y + i] = Sum(sum);
      }
  }
}
