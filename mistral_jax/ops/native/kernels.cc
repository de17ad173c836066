// The kernels that XLA calls on a CPU: products of few rows, matrices widened to float32, attention of
// single tokens, rows of tables.
//
// XLA's own products are fast for many rows, but take up to twice as long as these for one to eight. To
// read or write rows of a 16-bit table, XLA converts the whole table to float32. `library.py` compiles
// this file.

#include <utility>

#include "xla/ffi/api/ffi.h"

#include "attention.h"
#include "products.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32, 3>;

// The least number of multiplications that is worth handing to another thread.
constexpr int64_t kLeast = 100000;
// Parts of a product are multiples of this many outputs: a multiple of every kOutputs below.
constexpr int kWhole = 12;

// The most rows for which products are faster here than in XLA. Products of bytes have no limit if the
// processor multiplies bytes.
template <class Weight>
constexpr int kMostRows = Operands<Weight>::kSums > 1 ? INT32_MAX : MOST_ROWS;

// A matrix, its result, and the index of its first output among the outputs of all matrices.
template <class Weight>
struct Factor {
  const Weight* matrix;
  float* out;
  int outputs, first;
};

// Returns the function that multiplies `count` rows. For few rows, the count is a template argument.
template <class Weight, int... R>
auto Choose(int count, std::integer_sequence<int, R...>) {
  decltype(&MultiplyMany<Weight>) found = nullptr;
  if (kMostRows<Weight> > MOST_ROWS) found = MultiplyMany<Weight>;
  if (count <= kGroup || kMostRows<Weight> == MOST_ROWS)
    ((count == R + 1 ? void(found = MultiplyFew<R + 1, Weight>) : void()), ...);
  return found;
}

// Multiplies the same rows by several matrices, so that threads synchronise once for all of them.
template <class Weight, ffi::DataType kType>
ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> rows, ffi::RemainingArgs matrices,
                   ffi::RemainingRets results) {
  const int count = rows.dimensions()[0], width = rows.dimensions()[1];
  const auto multiply = Choose<Weight>(count, std::make_integer_sequence<int, MOST_ROWS>());
  if (multiply == nullptr) return ffi::Error::InvalidArgument("too many rows, or none");
  std::vector<Factor<Weight>> factors;
  int total = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto matrix = matrices.get<ffi::Buffer<kType, 2>>(i);
    auto result = results.get<ffi::Buffer<ffi::F32, 2>>(i);
    if (!matrix) return matrix.error();
    if (!result) return result.error();
    const int outputs = matrix->dimensions()[0];
    factors.push_back({reinterpret_cast<const Weight*>(matrix->untyped_data()),
                       (*result)->typed_data(), outputs, total});
    total += outputs;
  }
  Packed<Weight> packed(count, width, kMostRows<Weight> > MOST_ROWS ? kGroup : Together(count));
  const auto parts = [=](int64_t cost) { return kLeast / std::max<int64_t>(1, cost); };
  Parallel(pool, count, 1 + parts(width), [&, numbers = rows.typed_data()](int first, int last) {
    packed.Pack(numbers, first, last);
  });
  const int step = (parts(static_cast<int64_t>(width) * count) / kWhole + 1) * kWhole;
  Parallel(pool, total, step, [=, packed = &packed, factors = &factors](int first, int last) {
    for (const auto& factor : *factors) {
      const int from = std::max(first - factor.first, 0);
      const int to = std::min(last - factor.first, factor.outputs);
      if (from < to) multiply(*packed, factor.matrix, factor.out, factor.outputs, from, to);
    }
  });
  return ffi::Error::Success();
}

auto ProductBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32, 2>>()
      .RemainingArgs()
      .RemainingRets();
}

// Attends from one query of each row. int8 keys and values have `scales`, each [B, S, K].
template <class Number, ffi::DataType kType, class... Scales>
ffi::Error Attend(ffi::ThreadPool pool, Floats q, ffi::Buffer<kType, 4> k,
                  ffi::Buffer<kType, 4> v, ffi::Buffer<ffi::PRED, 2> mask, Scales... scales,
                  ffi::Result<Floats> result) {
  const auto shape = k.dimensions();
  const int rows = shape[0], slots = shape[1], kv_heads = shape[2], dim = shape[3];
  const int group = static_cast<int>(q.dimensions()[1]) / kv_heads;
  const Sizes sizes{slots, kv_heads, group, dim};
  const Number* numbers[] = {reinterpret_cast<const Number*>(k.untyped_data()),
                             reinterpret_cast<const Number*>(v.untyped_data())};
  const float* scale[] = {scales.typed_data()..., nullptr, nullptr};
  float* out = result->typed_data();
  const int64_t cost = std::max<int64_t>(1, static_cast<int64_t>(slots) * group * dim);
  Parallel(pool, rows * kv_heads, 1 + kLeast / cost, [=](int first, int last) {
    for (int i = first; i < last; ++i) {
      const int row = i / kv_heads, head = i % kv_heads;
      const size_t at = static_cast<size_t>(row) * slots * kv_heads + head;
      const auto of = [&](int which) {
        const float* by = scale[which];
        return Kept<Number>{numbers[which] + at * dim, by ? by + at : nullptr};
      };
      const size_t query = static_cast<size_t>(i) * group * dim;
      AttendHead(q.typed_data() + query, of(0), of(1),
                 mask.typed_data() + static_cast<size_t>(row) * slots,
                 out + query, sizes);
    }
  });
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto AttendBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .template Arg<ffi::Buffer<kType, 4>>()
      .template Arg<ffi::Buffer<kType, 4>>()
      .template Arg<ffi::Buffer<ffi::PRED, 2>>();
}

// Widens a matrix to float32. It does not read `after`: the operand only makes XLA compute it first.
template <class Number, ffi::DataType kType>
ffi::Error ToFloats(ffi::ThreadPool pool, ffi::Buffer<kType, 2> matrix, ffi::AnyBuffer after,
                    ffi::ResultBuffer<ffi::F32, 2> result) {
  const int64_t size = matrix.element_count();
  const Number* from = reinterpret_cast<const Number*>(matrix.untyped_data());
  float* to = result->typed_data();
  const int vectors = size / kLanes;
  Parallel(pool, vectors, 1 + kLeast / kLanes, [=](int first, int last) {
    WidenRow(from + int64_t{first} * kLanes, (last - first) * kLanes,
             reinterpret_cast<Lanes*>(to) + first);
  });
  const int left = size % kLanes;
  Lanes end;
  WidenRow(from + size - left, left, &end);
  std::memcpy(to + size - left, &end, left * sizeof(float));
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto ToFloatsBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::AnyBuffer>()
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

ffi::Error Put(ffi::AnyBuffer table, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32, 1> places,
               ffi::Result<ffi::AnyBuffer> result) {
  const auto shape = table.dimensions();
  const size_t part = table.size_bytes() / shape[0], bytes = part / shape[1];
  const char* from = static_cast<const char*>(rows.untyped_data());
  char* to = static_cast<char*>(result->untyped_data());
  if (to != table.untyped_data()) std::memcpy(to, table.untyped_data(), table.size_bytes());
  for (int64_t i = 0; i < shape[0]; ++i) {
    const int64_t place = places.typed_data()[i];
    if (place >= 0 && place < shape[1])
      std::memcpy(to + i * part + place * bytes, from + i * bytes, bytes);
  }
  return ffi::Error::Success();
}

auto TakeBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32, 1>>()
      .Ret<ffi::AnyBuffer>();
}

auto PutBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32, 1>>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

extern "C" const int most_rows_int8 = kMostRows<int8_t>;
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16)
extern "C" const int multiplies_bfloat16 = 1;
#else
extern "C" const int multiplies_bfloat16 = 0;
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(take, Take, TakeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(put, Put, PutBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_float32, (Product<float, ffi::F32>), ProductBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, (Product<BFloat16, ffi::BF16>), ProductBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_int8, (Product<int8_t, ffi::S8>), ProductBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(widen_bfloat16, (ToFloats<BFloat16, ffi::BF16>),
                              ToFloatsBinding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(widen_int8, (ToFloats<int8_t, ffi::S8>), ToFloatsBinding<ffi::S8>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_float32, (Attend<float, ffi::F32>),
                              AttendBinding<ffi::F32>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_bfloat16, (Attend<BFloat16, ffi::BF16>),
                              AttendBinding<ffi::BF16>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_int8, (Attend<int8_t, ffi::S8, Floats, Floats>),
                              AttendBinding<ffi::S8>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
