// Products of a few rows with a matrix, and rows of a table, for CPUs: each number is read once.
//
// out[r, y] = sum over x of rows[r, x] * matrix[y, x], in float32, for matrices of float32,
// bfloat16 or int8. XLA's own products are fast for many rows; of one to eight they take up to twice
// the time of these. To take rows of a 16-bit table, XLA writes the whole table out in float32.
// `kernels.py` compiles this file.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

struct BFloat16 {
  uint16_t bits;
};

constexpr int kLanes = 16;
template <class T>
using LanesOf __attribute__((vector_size(kLanes * sizeof(T)))) = T;
using Lanes = LanesOf<float>;

template <class T>
inline LanesOf<T> Load(const void* from) {
  LanesOf<T> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline Lanes Widen(const float* weights) { return Load<float>(weights); }
inline Lanes Widen(const int8_t* weights) {
#ifdef __AVX512F__  // GCC 12 finds no instruction for all lanes.
  const auto narrow = reinterpret_cast<__m128i>(Load<int8_t>(weights));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
#else
  const auto narrow = __builtin_convertvector(Load<int8_t>(weights), LanesOf<int16_t>);
  return __builtin_convertvector(__builtin_convertvector(narrow, LanesOf<int32_t>), Lanes);
#endif
}
inline Lanes Widen(const BFloat16* weights) {
  const auto bits = __builtin_convertvector(Load<uint16_t>(weights), LanesOf<uint32_t>) << 16;
  return Load<float>(&bits);
}

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

inline float Sum(Lanes lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

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

// Calls `MultiplyRows` for the number of rows, which the compiler has to know.
template <class Weight, int... R>
auto Choose(int count, std::integer_sequence<int, R...>) {
  decltype(&MultiplyRows<1, Weight>) found = nullptr;
  ((count == R + 1 ? void(found = &MultiplyRows<R + 1, Weight>) : void()), ...);
  return found;
}

template <class Weight, ffi::DataType kType>
ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> rows,
                   ffi::Buffer<kType, 2> matrix, ffi::ResultBuffer<ffi::F32, 2> result) {
  const int count = rows.dimensions()[0], width = rows.dimensions()[1];
  const int outputs = matrix.dimensions()[0];
  const auto multiply = Choose<Weight>(count, std::make_integer_sequence<int, MOST_ROWS>());
  if (multiply == nullptr) return ffi::Error::InvalidArgument("too many rows, or none");
  const auto packed = Pack<Weight>(rows.typed_data(), count, width);
  const Weight* w = reinterpret_cast<const Weight*>(matrix.untyped_data());
  float* out = result->typed_data();
  // Several parts for a thread, if one of them is late; each large enough to pay for its handing out.
  const int64_t least = 100000 / (static_cast<int64_t>(width) * count);
  const int64_t part = std::max<int64_t>(outputs / (8 * pool.num_threads()), least);
  const int step = (part / kMostOutputs + 1) * kMostOutputs;
  Parallel(pool, outputs, step, [=, rows = packed.get()](int first, int last) {
    multiply(rows, w, out, width, outputs, first, last);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_float32, (Product<float, ffi::F32>),
                              Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, (Product<BFloat16, ffi::BF16>),
                              Binding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_int8, (Product<int8_t, ffi::S8>), Binding<ffi::S8>());
