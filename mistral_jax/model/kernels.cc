// Products of a few rows with a matrix, and rows of a table, for CPUs: each number is read once.
//
// out[r, y] = sum over x of rows[r, x] * matrix[y, x], in float32, for matrices of float32,
// bfloat16 or int8. XLA's own products are fast for many rows; of one to eight they take up to twice
// the time of these. To take rows of a 16-bit table, XLA writes the whole table out in float32.
// `kernels.py` compiles this file.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float Widen(float w) { return w; }
inline float Widen(int8_t w) { return w; }
inline float Widen(BFloat16 w) {
  uint32_t bits = static_cast<uint32_t>(w.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What a product is computed with: vectors of operands, whose products are summed in `Lanes`.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

template <class Operand>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = kLanes;
  typedef Lanes Type;
  static Lanes MultiplyAdd(Lanes sum, Type a, Type b) { return sum + a * b; }
  static float From(float x) { return x; }
};

#ifdef __AVX512BF16__
template <>
struct Vector<BFloat16> {
  static constexpr int kSize = 2 * kLanes;
  typedef __m512bh Type;
  static Lanes MultiplyAdd(Lanes sum, Type a, Type b) { return _mm512_dpbf16_ps(sum, a, b); }
  static BFloat16 From(float x) {  // The rows are bfloat16, widened: nothing is lost.
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  }
};
typedef BFloat16 BFloat16Operand;
#else
typedef float BFloat16Operand;
#endif

// Outputs and rows that are worked on at once: their sums stay in registers.
constexpr int kOutputs = 3;
constexpr int kRows = 8;
// Weights of an output that are widened at once, to a buffer in the processor's cache.
constexpr int kBlock = 4096;
constexpr int kMostRows = MOST_ROWS;

// Adds products of R rows and kOutputs outputs to `sums`. `next`, unless null: where the weights
// lie that are wanted afterwards; the processor fetches them meanwhile.
template <int R, class Operand, class Weight>
inline void Tile(const Operand* const* weights, const Operand* rows, int size,
                 Lanes (*sums)[kOutputs], const Weight* next, size_t width) {
  using V = Vector<Operand>;
  Lanes local[R][kOutputs];
  std::memcpy(local, sums, sizeof(local));
  for (int x = 0; x < size; x += V::kSize) {
    if (next != nullptr)
#pragma GCC unroll 8
      for (int y = 0; y < kOutputs; ++y) __builtin_prefetch(next + y * width + x);
    typename V::Type w[kOutputs];
#pragma GCC unroll 8
    for (int y = 0; y < kOutputs; ++y) std::memcpy(&w[y], weights[y] + x, sizeof(w[y]));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename V::Type row;
      std::memcpy(&row, rows + static_cast<size_t>(x) * R + r * V::kSize, sizeof(row));
#pragma GCC unroll 8
      for (int y = 0; y < kOutputs; ++y) local[r][y] = V::MultiplyAdd(local[r][y], w[y], row);
    }
  }
  std::memcpy(sums, local, sizeof(local));
}

// Copies rows in groups of 8, 4, 2, 1, and in each a vector of every row in turn:
// [X / size][R][size].
template <class Operand>
std::unique_ptr<Operand[], void (*)(Operand*)> Pack(const float* rows, int count, int width,
                                                    int padded) {
  constexpr int kSize = Vector<Operand>::kSize;
  // Aligned, since a load that crosses cache lines takes twice as long.
  constexpr std::align_val_t kLine{64};
  std::unique_ptr<Operand[], void (*)(Operand*)> packed(
      new (kLine) Operand[static_cast<size_t>(count) * padded](),
      [](Operand* array) { ::operator delete[](array, kLine); });
  Operand* to = packed.get();
  for (int first = 0, group = kRows; first < count; first += group) {
    while (group > count - first) group /= 2;
    for (int x = 0; x < padded; x += kSize)
      for (int r = 0; r < group; ++r)
        for (int i = 0; i < kSize; ++i, ++to)
          if (x + i < width)
            *to = Vector<Operand>::From(rows[static_cast<size_t>(first + r) * width + x + i]);
  }
  return packed;
}

template <class Operand, class Weight>
inline const Operand* Prepare(const Weight* weights, int size, int padded, Operand* buffer) {
  if constexpr (std::is_same_v<Operand, Weight>) {
    if (size == padded) return weights;
    std::copy(weights, weights + size, buffer);
  } else {
    for (int i = 0; i < size; ++i) buffer[i] = Widen(weights[i]);
  }
  std::fill(buffer + size, buffer + padded, Operand{});
  return buffer;
}

template <class Operand, class Weight>
void MultiplyRows(const Operand* packed, const Weight* matrix, float* out, int count, int width,
                  int outputs, int first, int last) {
  constexpr int kSize = Vector<Operand>::kSize;
  const int padded = (width + kSize - 1) / kSize * kSize;
  // A vector longer than the block, since rows 16 KiB apart would share sets of a cache.
  alignas(64) Operand buffers[kOutputs][kBlock + kSize];
  Lanes sums[kMostRows][kOutputs];
  for (int y = first; y < last; y += kOutputs) {
    std::memset(sums, 0, sizeof(sums[0]) * count);
    for (int x = 0; x < width; x += kBlock) {
      const int size = std::min(width - x, kBlock), whole = std::min(padded - x, kBlock);
      const Operand* weights[kOutputs];
      for (int i = 0; i < kOutputs; ++i) {
        // Past the last output the last is computed again, and dropped.
        const Weight* from = matrix + static_cast<size_t>(std::min(y + i, last - 1)) * width + x;
        weights[i] = Prepare<Operand>(from, size, whole, buffers[i]);
      }
      const Weight* next = matrix + static_cast<size_t>(y + kOutputs) * width + x;
      for (int r = 0, group = kRows; r < count; r += group, next = nullptr) {
        while (group > count - r) group /= 2;
        const Operand* rows =
            packed + static_cast<size_t>(r) * padded + static_cast<size_t>(x) * group;
        if (group == 8) Tile<8>(weights, rows, whole, sums + r, next, width);
        if (group == 4) Tile<4>(weights, rows, whole, sums + r, next, width);
        if (group == 2) Tile<2>(weights, rows, whole, sums + r, next, width);
        if (group == 1) Tile<1>(weights, rows, whole, sums + r, next, width);
      }
    }
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < std::min(kOutputs, last - y); ++i) {
        float sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += sums[r][i][lane];
        out[static_cast<size_t>(r) * outputs + y + i] = sum;
      }
  }
}

template <class Weight>
void MultiplyRow(const float* row, const Weight* matrix, float* out, int width, int first,
                 int last) {
  for (int y = first; y < last; ++y) {
    const Weight* weights = matrix + static_cast<size_t>(y) * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int x = 0; x < width; ++x) sum += Widen(weights[x]) * row[x];
    out[y] = sum;
  }
}

// Calls `work(first, last)` for parts of 0 to `size`, on this thread and on those of the pool that
// are free. This thread waits only for parts that another has begun: a pool whose threads all wait
// here goes on.
template <class Work>
void Parallel(ffi::ThreadPool& pool, int size, int step, Work work) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
  };
  const int parts = (size + step - 1) / step;
  auto shared = std::make_shared<Shared>();
  auto take = [shared, parts, size, step, work] {
    for (int part; (part = shared->next++) < parts; ++shared->done)
      work(part * step, std::min(size, (part + 1) * step));
  };
  const int helpers = std::min<int64_t>(pool.num_threads(), parts) - 1;
  for (int i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();
  while (shared->done < parts) std::this_thread::yield();
}

template <class Weight, class Operand, ffi::DataType kType>
ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> rows,
                   ffi::Buffer<kType, 2> matrix, ffi::ResultBuffer<ffi::F32, 2> result) {
  const int count = rows.dimensions()[0], width = rows.dimensions()[1];
  const int outputs = matrix.dimensions()[0];
  if (count > kMostRows) return ffi::Error::InvalidArgument("too many rows");
  const float* x = rows.typed_data();
  const Weight* w = reinterpret_cast<const Weight*>(matrix.untyped_data());
  float* out = result->typed_data();
  // Parts of some 100 thousand products: enough to pay for handing them out.
  const int64_t cost = static_cast<int64_t>(width) * count;
  const int step = std::max<int64_t>(1, 100000 / cost / kOutputs) * kOutputs;
  if (count == 1) {
    Parallel(pool, outputs, step, [=](int first, int last) {
      MultiplyRow(x, w, out, width, first, last);
    });
    return ffi::Error::Success();
  }
  constexpr int kSize = Vector<Operand>::kSize;
  const int padded = (width + kSize - 1) / kSize * kSize;
  const auto packed = Pack<Operand>(x, count, width, padded);
  Parallel(pool, outputs, step, [=, rows = packed.get()](int first, int last) {
    MultiplyRows<Operand>(rows, w, out, count, width, outputs, first, last);
  });
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32, 2>>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Ret<ffi::Buffer<ffi::F32, 2>>();
}

ffi::Error Take(ffi::AnyBuffer table, ffi::Buffer<ffi::S32, 1> tokens,
                ffi::Result<ffi::AnyBuffer> result) {
  const size_t bytes = table.size_bytes() / table.dimensions()[0];
  const char* from = static_cast<const char*>(table.untyped_data());
  char* to = static_cast<char*>(result->untyped_data());
  const int64_t last = table.dimensions()[0] - 1;
  for (size_t i = 0; i < tokens.element_count(); ++i) {
    const int64_t row = std::clamp<int64_t>(tokens.typed_data()[i], 0, last);
    std::memcpy(to + i * bytes, from + row * bytes, bytes);
  }
  return ffi::Error::Success();
}

auto TakeBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32, 1>>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(take, Take, TakeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_float32, (Product<float, float, ffi::F32>),
                              Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, (Product<BFloat16, BFloat16Operand, ffi::BF16>),
                              Binding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_int8, (Product<int8_t, float, ffi::S8>), Binding<ffi::S8>());
