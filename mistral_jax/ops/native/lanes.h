// SIMD vectors of numbers on any processor, and a parallel loop over the threads of a pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#ifdef __AVX2__
#include <immintrin.h>
#endif

struct BFloat16 {
  uint16_t bits;
};

// The float32 numbers of a register. GCC keeps vectors larger than a register in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
template <class T>
using LanesOf __attribute__((vector_size(kLanes * sizeof(T)))) = T;
using Lanes = LanesOf<float>;

// Loads a value from an address that need not be aligned.
template <class T>
inline T Bits(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
inline LanesOf<T> Load(const void* from) {
  return Bits<LanesOf<T>>(from);
}

inline Lanes Widen(const float* weights) { return Load<float>(weights); }
inline Lanes Widen(const int8_t* weights) {
// With __builtin_convertvector GCC 12 does not convert all lanes with one instruction.
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Bits<__m128i>(weights)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)weights)));
#else
  const auto narrow = __builtin_convertvector(Load<int8_t>(weights), LanesOf<int16_t>);
  return __builtin_convertvector(__builtin_convertvector(narrow, LanesOf<int32_t>), Lanes);
#endif
}
inline Lanes Widen(const BFloat16* weights) {
  const auto bits = __builtin_convertvector(Load<uint16_t>(weights), LanesOf<uint32_t>) << 16;
  return Load<float>(&bits);
}

inline float Sum(Lanes lanes) {
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));
  Four parts[kLanes / 4];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// Calls `work(first, last)` for parts of the range from 0 to `size`, on this thread and on the pool's
// free threads. Parts shrink towards the end, down to `step`, so that all threads finish at about the
// same time. This thread waits only for parts that another thread has begun, so there is no deadlock
// when all threads of the pool are in this function.
template <class Pool, class Work>
void Parallel(Pool& pool, int size, int step, Work work) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
  };
  const int threads = pool.num_threads();
  const int helpers = std::min(threads, (size + step - 1) / step) - 1;
  if (helpers <= 0) return work(0, size);
  auto shared = std::make_shared<Shared>();
  auto take = [shared, threads, size, step, work] {
    for (int first = shared->next; first < size;) {
      const int part = std::max((size - first) / (2 * threads) / step, 1) * step;
      const int last = std::min(size, first + part);
      if (!shared->next.compare_exchange_weak(first, last)) continue;
      work(first, last);
      shared->done += last - first;
      first = shared->next;
    }
  };
  for (int i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();
  while (shared->done < size) std::this_thread::yield();
}
