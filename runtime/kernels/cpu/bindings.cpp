// The Python face of the CPU loops. Checks dtypes, shapes and ranges here, once, then drops the GIL and calls the loop.
// No array is converted or copied silently: a wrong dtype or stride is a TypeError.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace coldstream {
namespace {

template <class T, class... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;
template <class T>
using Vector = Array<T, nb::ndim<1>>;
template <class T>
using Matrix = Array<T, nb::ndim<2>>;
using Floats = Matrix<const float>;
using Out = Matrix<float>;
using AnyMatrix = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu, nb::ndim<2>>;
using AnyPages = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu, nb::ndim<4>>;
using AnyVector = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu, nb::ndim<1>>;
// bits [D], step [D], codes [K, R], scale [K], bias [K], unit, noise
using PlaneMatrix =
    std::tuple<Vector<const uint8_t>, AnyVector, Matrix<const uint8_t>, AnyVector, AnyVector, double, double>;
using Offsets = std::tuple<int64_t, int64_t>;  // of a vector and of its scale in the record

void require(bool sound, const char* message) {
  if (!sound) throw nb::value_error(message);
}

template <class A>
int64_t dim(const A& a, size_t axis) {
  return static_cast<int64_t>(a.shape(axis));
}

std::vector<const KernelTable*> supported() {  // best first
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (v3 && v4) found.push_back(&avx512_kernels);
  if (v3) found.push_back(&avx2_kernels);
#endif
  found.push_back(&generic_kernels);
  return found;
}

const KernelTable* table_named(const std::string& name) {
  for (const KernelTable* table : supported())
    if (name == table->name) return table;
  throw nb::value_error(("this processor cannot run the kernels named " + name).c_str());
}

Act act_named(const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "relu") return Act::relu;
  if (name == "relu2") return Act::relu2;
  throw nb::value_error(("unknown activation " + name).c_str());
}

Dtype dtype_named(const std::string& name) {
  if (name == "fp32") return Dtype::fp32;
  if (name == "bf16") return Dtype::bf16;
  if (name == "fp16") return Dtype::fp16;
  if (name == "int8") return Dtype::int8;
  throw nb::value_error(("unknown record dtype " + name).c_str());
}

int64_t item_bytes(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }
int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

VectorAt vector_at(const Offsets& offsets, int64_t hidden, int64_t record_bytes, Dtype dtype) {
  const VectorAt at{std::get<0>(offsets), std::get<1>(offsets)};
  require(at.offset >= 0 && at.offset <= record_bytes - hidden * item_bytes(dtype), "a vector lies outside the record");
  require((at.scale_offset >= 0) == (dtype == Dtype::int8), "int8 vectors have a scale, others have none");
  require(at.scale_offset < 0 || at.scale_offset <= record_bytes - 4, "a scale lies outside the record");
  return at;
}

constexpr nb::dlpack::dtype kHalf{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};

// Weights are told apart by their numpy dtype: bf16, which numpy does not have, travels as uint16.
template <class A>
Dtype weight_dtype(const A& a, const char* message) {
  if (a.dtype() == nb::dtype<float>()) return Dtype::fp32;
  if (a.dtype() == nb::dtype<uint16_t>()) return Dtype::bf16;
  if (a.dtype() == kHalf) return Dtype::fp16;
  throw nb::type_error(message);
}

const uint8_t* halves(const AnyVector& a, int64_t count, const char* message) {
  if (!(a.dtype() == kHalf)) throw nb::type_error(message);
  require(dim(a, 0) == count, message);
  return static_cast<const uint8_t*>(a.data());
}

Planes planes_of(const PlaneMatrix& m, int64_t hidden, int64_t num) {
  const auto& [bits, step, codes, scale, bias, unit, noise] = m;
  require(dim(bits, 0) == hidden, "bits must be [D]");
  int64_t planes = 0;
  for (int64_t j = 0; j < hidden; ++j) {
    require(bits.data()[j] <= kMostBits, "a dimension has more than 15 bits");
    planes += bits.data()[j];
  }
  require(planes <= kMostPlanes, "a row has more than 131072 planes");
  require(dim(codes, 0) == num && dim(codes, 1) == (planes + 15) / 16 * 2, "codes must be [K, planes / 8 padded to 2]");
  Planes p{};
  p.bits = bits.data(), p.codes = codes.data(), p.row_bytes = dim(codes, 1), p.unit = static_cast<float>(unit), p.noise = static_cast<float>(noise);
  p.step = halves(step, hidden, "step must be float16 [D]");
  p.scale = halves(scale, num, "scale must be float16 [K]"), p.bias = halves(bias, num, "bias must be float16 [K]");
  p.padded_planes = (planes + kPlanePad - 1) / kPlanePad * kPlanePad;
  return p;
}

class CpuKernels {
 public:
  CpuKernels(const std::string& isa, int num_threads) : table_(table_named(isa)) { set_num_threads(num_threads); }

  const char* name() const { return table_->name; }
  int num_threads() const { return num_threads_; }

  void set_num_threads(int n) {
    require(n >= 1 && n <= 1024, "num_threads must be between 1 and 1024");
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_ = std::make_unique<ThreadPool>(n);
    num_threads_ = pool_->num_threads();  // fewer where the system gives no more
  }

  int64_t ffn(const Floats& x, const Vector<const uint8_t>& arena, const Vector<const int64_t>& offsets,
           const std::optional<Matrix<const uint8_t>>& mask, const std::optional<Vector<const float>>& threshold,
           int64_t record_bytes, const std::string& dtype, const std::optional<Offsets>& gate, const Offsets& up,
           const Offsets& down, const std::string& act, const Out& out) {
    FfnArgs a{};
    a.batch = dim(x, 0), a.hidden = dim(x, 1), a.num = dim(offsets, 0);
    a.dtype = dtype_named(dtype), a.act = act_named(act);
    require(dim(out, 0) == a.batch && dim(out, 1) == a.hidden, "out must have the shape of x");
    require(!mask || (dim(*mask, 0) == a.batch && dim(*mask, 1) == a.num), "mask must be [B, K]");
    require(!threshold || dim(*threshold, 0) == a.num, "threshold must be [K]");
    a.gate = gate ? vector_at(*gate, a.hidden, record_bytes, a.dtype) : VectorAt{-1, -1};
    a.up = vector_at(up, a.hidden, record_bytes, a.dtype), a.down = vector_at(down, a.hidden, record_bytes, a.dtype);
    a.arena = arena.data(), a.offsets = offsets.data(), a.out = out.data();
    a.mask = mask ? mask->data() : nullptr, a.threshold = threshold ? threshold->data() : nullptr;
    const int64_t last = dim(arena, 0) - record_bytes;
    for (int64_t k = 0; k < a.num; ++k)
      if (a.offsets[k] < 0 || a.offsets[k] > last) throw nb::index_error("a record offset lies outside the arena");
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    a.x = padded_rows(x.data(), a.batch, a.hidden), a.ld = padded(a.hidden);
    a.coefficients = second_.get<float>(a.num * a.batch), a.live = third_.get<int64_t>(a.num);
    int64_t num_active = 0;
    a.num_active = &num_active;
    table_->ffn(a, pool_->team());
    return num_active;
  }

  void sketch_scores(const Floats& x, const std::optional<Matrix<const uint8_t>>& gate_codes,
                     const std::optional<Vector<const float>>& gate_scale, const Matrix<const uint8_t>& up_codes,
                     const Vector<const float>& up_scale, const Vector<const float>& down_norm, const std::string& act,
                     const Out& out) {
    SketchArgs a{};
    a.batch = dim(x, 0), a.hidden = dim(x, 1), a.num = dim(up_codes, 0), a.act = act_named(act);
    const auto codes_fit = [&](const Matrix<const uint8_t>& c) {
      return dim(c, 0) == a.num && dim(c, 1) == (a.hidden + 1) / 2;
    };
    require(gate_codes.has_value() == gate_scale.has_value(), "gate_codes and gate_scale come together");
    require(codes_fit(up_codes) && (!gate_codes || codes_fit(*gate_codes)), "codes must be [F, (D + 1) / 2]");
    require(dim(up_scale, 0) == a.num && dim(down_norm, 0) == a.num && (!gate_scale || dim(*gate_scale, 0) == a.num),
            "scales and norms must be [F]");
    require(dim(out, 0) == a.batch && dim(out, 1) == a.num, "out must be [B, F]");
    a.x = x.data(), a.up_codes = up_codes.data(), a.up_scale = up_scale.data(), a.down_norm = down_norm.data();
    a.gate_codes = gate_codes ? gate_codes->data() : nullptr, a.gate_scale = gate_scale ? gate_scale->data() : nullptr;
    a.out = out.data(), a.ld = padded(a.hidden);
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    a.permuted = first_.get<float>(a.batch * a.ld);
    table_->sketch_scores(a, pool_->team());
  }

  void plane_scores(const Floats& x, const std::optional<PlaneMatrix>& gate, const PlaneMatrix& up,
                    const std::optional<AnyVector>& down_norm, const std::string& act, const Out& out) {
    PlaneArgs a{};
    a.batch = dim(x, 0), a.hidden = dim(x, 1), a.num = dim(std::get<2>(up), 0), a.act = act_named(act);
    require(gate.has_value() != down_norm.has_value(), "a sketch holds either a gate, or down_norm apart");
    if (gate) a.gate = planes_of(*gate, a.hidden, a.num);
    a.up = planes_of(up, a.hidden, a.num);
    a.down_norm = down_norm ? halves(*down_norm, a.num, "down_norm must be float16 [K]") : nullptr;
    require(dim(out, 0) == a.batch && dim(out, 1) == a.num, "out must be [B, K]");
    a.out = out.data();
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    a.x = padded_rows(x.data(), a.batch, a.hidden), a.ld = padded(a.hidden);
    int16_t* z = second_.get<int16_t>(a.batch * (a.gate.padded_planes + a.up.padded_planes));
    float* z_scale = third_.get<float>(4 * a.batch);  // scales, then sums
    for (Planes* p : {&a.gate, &a.up}) {
      p->z = z, p->z_scale = z_scale, p->z_sum = reinterpret_cast<int32_t*>(z_scale + a.batch);
      z += a.batch * p->padded_planes, z_scale += 2 * a.batch;
    }
    table_->plane_scores(a, pool_->team());
  }

  void linear(const Floats& x, const AnyMatrix& weight, const Out& out) {
    LinearArgs a{};
    a.batch = dim(x, 0), a.hidden = dim(x, 1), a.num = dim(weight, 0);
    a.dtype = weight_dtype(weight, "weight must be float32, float16, or bf16 as uint16");
    require(dim(weight, 1) == a.hidden, "weight must be [N, D]");
    require(dim(out, 0) == a.batch && dim(out, 1) == a.num, "out must be [B, N]");
    a.weight = static_cast<const uint8_t*>(weight.data()), a.out = out.data();
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    a.x = padded_rows(x.data(), a.batch, a.hidden), a.ld = padded(a.hidden);
    table_->linear(a, pool_->team());
  }

  void paged_attention(const Floats& q, const AnyPages& keys, const AnyPages& values,
                       const Vector<const int32_t>& block_table, int64_t num_tokens, const Out& out, float scale) {
    AttentionArgs a{};
    a.num_heads = dim(q, 0), a.head_dim = dim(q, 1);
    a.block_size = dim(keys, 1), a.num_kv_heads = dim(keys, 2), a.num_tokens = num_tokens, a.scale = scale;
    a.dtype = weight_dtype(keys, "keys must be float32 or bf16 as uint16");
    if (a.dtype == Dtype::fp16) throw nb::type_error("keys must be float32 or bf16 as uint16");
    if (values.dtype() != keys.dtype()) throw nb::type_error("keys and values must have one dtype");
    for (size_t axis = 0; axis < 4; ++axis)
      require(keys.shape(axis) == values.shape(axis), "keys and values must have one shape");
    require(dim(keys, 3) == a.head_dim && a.head_dim > 0, "q and keys must have one head_dim");
    require(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0, "query heads must be a multiple of kv heads");
    require(dim(out, 0) == a.num_heads && dim(out, 1) == a.head_dim, "out must have the shape of q");
    require(num_tokens >= 1 && num_tokens <= dim(block_table, 0) * a.block_size, "num_tokens must fit the block table");
    for (int64_t b = 0; b * a.block_size < num_tokens; ++b)
      if (block_table.data()[b] < 0 || block_table.data()[b] >= dim(keys, 0))
        throw nb::index_error("a block of the table does not exist");
    a.keys = static_cast<const uint8_t*>(keys.data()), a.values = static_cast<const uint8_t*>(values.data());
    a.block_table = block_table.data(), a.out = out.data();
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    a.q = padded_rows(q.data(), a.num_heads, a.head_dim), a.ld = padded(a.head_dim);
    const int64_t parts = (num_tokens + kAttentionTokens - 1) / kAttentionTokens;
    a.partial = second_.get<float>(parts * a.num_heads * (a.head_dim + 2));
    a.scores = third_.get<float>(num_threads_ * (a.num_heads / a.num_kv_heads) * kAttentionTokens);
    table_->paged_attention(a, pool_->team());
  }

  int64_t read_through(const Vector<const uint8_t>& data) {
    int64_t sum = 0;
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    table_->read_through(ReadArgs{data.data(), dim(data, 0), &sum}, pool_->team());
    return sum;
  }

  int64_t read_records(const Vector<const uint8_t>& data, const Vector<const int64_t>& offsets, int64_t bytes) {
    require(bytes >= 0, "a record has no bytes");
    for (int64_t i = 0; i < dim(offsets, 0); ++i)
      require(offsets.data()[i] >= 0 && offsets.data()[i] <= dim(data, 0) - bytes, "a record lies outside the data");
    int64_t sum = 0;
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(mutex_);
    table_->read_records(RecordReadArgs{data.data(), offsets.data(), dim(offsets, 0), bytes, &sum}, pool_->team());
    return sum;
  }

 private:
  const float* padded_rows(const float* x, int64_t num, int64_t width) {
    const int64_t ld = padded(width);
    float* copy = first_.get<float>(num * ld);
    for (int64_t r = 0; r < num; ++r) {
      std::memcpy(copy + r * ld, x + r * width, static_cast<size_t>(width) * 4);
      std::memset(copy + r * ld + width, 0, static_cast<size_t>(ld - width) * 4);
    }
    return copy;
  }

  const KernelTable* table_;
  std::mutex mutex_;  // one loop at a time: pool and scratch belong to it
  std::unique_ptr<ThreadPool> pool_;
  std::atomic<int> num_threads_{1};
  Scratch first_, second_, third_;
};

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported()) names.emplace_back(table->name);
  return names;
}

}  // namespace
}  // namespace coldstream

NB_MODULE(_cpu, m) {
  using coldstream::CpuKernels;
  m.def("backends", &coldstream::backends);
  nb::class_<CpuKernels>(m, "CpuKernels")
      .def(nb::init<const std::string&, int>(), "isa"_a, "num_threads"_a)
      .def_prop_ro("name", &CpuKernels::name)
      .def_prop_ro("num_threads", &CpuKernels::num_threads)
      .def("set_num_threads", &CpuKernels::set_num_threads, "num_threads"_a)
      .def("ffn", &CpuKernels::ffn, "x"_a.noconvert(), "arena"_a.noconvert(), "offsets"_a.noconvert(),
           "mask"_a.noconvert().none(), "threshold"_a.noconvert().none(), "record_bytes"_a, "dtype"_a, "gate"_a.none(),
           "up"_a, "down"_a, "act"_a, "out"_a.noconvert())
      .def("sketch_scores", &CpuKernels::sketch_scores, "x"_a.noconvert(), "gate_codes"_a.noconvert().none(),
           "gate_scale"_a.noconvert().none(), "up_codes"_a.noconvert(), "up_scale"_a.noconvert(),
           "down_norm"_a.noconvert(), "act"_a, "out"_a.noconvert())
      .def("plane_scores", &CpuKernels::plane_scores, "x"_a.noconvert(), "gate"_a.noconvert().none(),
           "up"_a.noconvert(), "down_norm"_a.noconvert().none(), "act"_a, "out"_a.noconvert())
      .def("linear", &CpuKernels::linear, "x"_a.noconvert(), "weight"_a.noconvert(), "out"_a.noconvert())
      .def("paged_attention", &CpuKernels::paged_attention, "q"_a.noconvert(), "keys"_a.noconvert(),
           "values"_a.noconvert(), "block_table"_a.noconvert(), "num_tokens"_a, "out"_a.noconvert(), "scale"_a)
      .def("read_through", &CpuKernels::read_through, "data"_a.noconvert())
      .def("read_records", &CpuKernels::read_records, "data"_a.noconvert(), "offsets"_a.noconvert(), "bytes"_a);
}
