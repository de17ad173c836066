// Attention from one token of each row to the keys and values of a cache.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

// Converts `size` numbers to float32 vectors, times `scale`, and pads the last vector with zeros.
template <class Number>
inline void WidenRow(const Number* from, int size, Lanes* to, float scale = 1) {
  for (; size >= kLanes; size -= kLanes, from += kLanes) *to++ = Widen(from) * scale;
  if (size > 0) {
    Number padded[kLanes] = {};
    std::copy(from, from + size, padded);
    *to = Widen(padded) * scale;
  }
}

// Returns exp(x) for x <= 0, with an error of at most two units in the last place (Cephes' expf).
inline Lanes Exp(Lanes x) {
  x = x < -87.0f ? Lanes{} - 87.0f : x;  // NaN stays NaN.
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer.
  const Lanes n = (x * 1.44269504088896341f + kRound) - kRound;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  const auto power = (__builtin_convertvector(n, LanesOf<int32_t>) + 127) << 23;
  return (sum * r * r + r + 1.0f) * Load<float>(&power);
}

// Sizes of a row's cache: `slots` (S), `kv_heads` (K), query heads of each (G), head width (H).
struct Sizes {
  int slots, kv_heads, group, dim;
};

// Keys or values of one head, [S, dim] with a stride of dim * kv_heads numbers, and their scales, [S]
// with a stride of kv_heads, or null.
template <class Number>
struct Kept {
  const Number* numbers;
  const float* scales;

  void Get(int slot, Sizes sizes, Lanes* to) const {
    const size_t place = static_cast<size_t>(slot) * sizes.kv_heads;
    WidenRow(numbers + place * sizes.dim, sizes.dim, to, scales ? scales[place] : 1.0f);
  }
  // The numbers of a head are not contiguous, so the processor does not prefetch them by itself.
  // Prefetching into L2 allows more requests at a time than into L1.
  void Prefetch(int slot, Sizes sizes) const {
    const Number* from = numbers + static_cast<size_t>(slot) * sizes.kv_heads * sizes.dim;
    for (size_t i = 0; i < sizes.dim * sizeof(Number); i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from) + i, 0, 2);
  }
};

// Attends from queries [G, H] to the cache slots that `mask` [S] shows, with an online softmax (arXiv
// 1805.02867). `out` is [G, H]; zeros if the mask shows no slot.
template <class Number>
void AttendHead(const float* q, Kept<Number> k, Kept<Number> v, const bool* mask, float* out,
                Sizes sizes) {
  // Keys of a block, and vectors whose sums stay in registers at a time.
  constexpr int kKeys = 32, kVectors = 4;
  const int vectors = (sizes.dim + kVectors * kLanes - 1) / (kVectors * kLanes) * kVectors;
  std::vector<Lanes> queries(sizes.group * vectors), mixed(sizes.group * vectors);
  std::vector<Lanes> near(kKeys * vectors), weights(sizes.group * kKeys / kLanes);
  std::vector<float> tops(sizes.group, -std::numeric_limits<float>::infinity());
  std::vector<float> totals(sizes.group, 0);
  for (int g = 0; g < sizes.group; ++g)
    WidenRow(q + g * sizes.dim, sizes.dim, &queries[g * vectors]);

  const float scale = 1 / std::sqrt(static_cast<float>(sizes.dim));
  for (int slot = 0; slot < sizes.slots;) {
    int seen[kKeys], count = 0;
    for (; slot < sizes.slots && count < kKeys; ++slot)
      if (mask[slot]) seen[count++] = slot;
    if (count == 0) break;
    for (int i = 0; i < count; ++i) {
      k.Prefetch(seen[i] + kKeys, sizes);
      k.Get(seen[i], sizes, &near[i * vectors]);
    }
    for (int g = 0; g < sizes.group; ++g) {
      float* scores = reinterpret_cast<float*>(&weights[g * kKeys / kLanes]);
      std::fill(scores, scores + kKeys, -std::numeric_limits<float>::infinity());
      // kVectors keys at a time share one load of the query. Past the last key, `near` holds old
      // numbers, whose sums are not used.
      for (int i = 0; i < count; i += kVectors) {
        Lanes sums[kVectors] = {};
        for (int x = 0; x < vectors; ++x)
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j)
            sums[j] += queries[g * vectors + x] * near[(i + j) * vectors + x];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          if (i + j < count) scores[i + j] = Sum(sums[j]) * scale;
      }
      const float top = std::max(tops[g], *std::max_element(scores, scores + count));
      const float shrink = std::exp(tops[g] - top);  // Rescales earlier sums to the new maximum.
      Lanes total = {};
      for (int i = 0; i < kKeys / kLanes; ++i)
        total += weights[g * kKeys / kLanes + i] = Exp(weights[g * kKeys / kLanes + i] - top);
      for (int x = 0; x < vectors; ++x) mixed[g * vectors + x] *= shrink;
      totals[g] = totals[g] * shrink + Sum(total);
      tops[g] = top;
    }
    for (int i = 0; i < count; ++i) {
      v.Prefetch(seen[i] + kKeys, sizes);
      v.Get(seen[i], sizes, &near[i * vectors]);
    }
    for (int g = 0; g < sizes.group; ++g) {
      const float* weight = reinterpret_cast<const float*>(&weights[g * kKeys / kLanes]);
      for (int x = 0; x < vectors; x += kVectors) {
        Lanes sums[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sums[j] = mixed[g * vectors + x + j];
        for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sums[j] += weight[i] * near[i * vectors + x + j];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) mixed[g * vectors + x + j] = sums[j];
      }
    }
  }
  for (int g = 0; g < sizes.group; ++g) {
    const float* sums = reinterpret_cast<const float*>(&mixed[g * vectors]);
    for (int x = 0; x < sizes.dim; ++x)
      out[g * sizes.dim + x] = totals[g] == 0 ? 0 : sums[x] / totals[g];
  }
}
