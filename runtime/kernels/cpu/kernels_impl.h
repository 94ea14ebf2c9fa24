// The loops, written once and compiled for each instruction set (KERNELS_ISA names it).
// Knows neither Python nor files. Every sum has one fixed order that depends on the shape only: not on the batch, the
// number of threads, or which rows share a pass. Work is handed out dynamically, results are not affected.
// Masked-out records are never read; rows that do not need a record get exactly nothing from it.

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#if defined(KERNELS_AVX2) || defined(KERNELS_AVX512)
#include <immintrin.h>
#endif
// GCC's own header leaves a vector uninitialised on purpose (its PR 105593) and then warns of it here.
#if defined(KERNELS_AVX512) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// The library's function, not an inline one that would be compiled for this file's target.
extern "C" float expf(float);

namespace coldstream {
namespace KERNELS_ISA {
namespace {

#include "simd.h"

constexpr int64_t kPanel = 64;  // rows of a batch looked at together
constexpr int64_t kAhead = 3;   // records between the one computed and the one fetched: 1 is too near for small records
#if defined(KERNELS_AVX512)
constexpr int kGroup = 8;       // neurons read side by side, and added to the output in one pass
#else
constexpr int kGroup = 4;
#endif
constexpr int kSums = 16 / kGroup;  // accumulators of a neuron: together they must fit the registers

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline float activate(Act act, float a) {
  if (act == Act::silu) return a / (1.0f + expf(-a));
  const float r = a < 0.0f ? 0.0f : a;  // NaN stays NaN
  return act == Act::relu ? r : r * r;
}

inline float read_scale(const uint8_t* record, const VectorAt& v) {
  float scale = 1.0f;
  if (v.scale_offset >= 0) __builtin_memcpy(&scale, record + v.scale_offset, 4);
  return scale;
}

// Hands out [begin, end) ranges of one loop to the threads.
struct Ranges {
  int64_t next, num, step;
  bool take(int64_t* begin, int64_t* end) {
    *begin = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED);
    *end = min(*begin + step, num);
    return *begin < num;
  }
};

inline Ranges make_ranges(int64_t num, int num_threads, int64_t most) {
  const int64_t fair = (num / (num_threads * 4) + kGroup) / kGroup * kGroup;
  return Ranges{0, num, min(fair, most)};
}

template <int A>
inline float sum_all(const vf* acc) {
  if constexpr (A == 4) return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  return sum(add(acc[0], acc[1]));
}

// out[r] = w . x[r] for R rows. A accumulators a row, element i in accumulator (i / W) % A, whatever R is.
template <class T, int R, int A>
inline void dot_block(const uint8_t* w, const uint8_t* next, const float* const* x, int64_t n, float* out) {
  vf acc[R][A];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < A; ++u) acc[r][u] = zero();
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    if (next != nullptr) prefetch<4 * W * T::size>(next + i * T::size);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const vf v = T::get(w + (i + u * W) * T::size);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][u % A] = fma(v, load(x[r] + i + u * W), acc[r][u % A]);
    }
  }
  if (next != nullptr && i < n) prefetch_line(next + i * T::size);
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) {
    const int64_t at = i + u * W, left = n - at;
    if (left <= 0) break;
    const vf v = left >= W ? T::get(w + at * T::size) : get_tail<T>(w + at * T::size, left);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][u % A] = fma(v, load(x[r] + at), acc[r][u % A]);
  }
  for (int r = 0; r < R; ++r) out[r] = sum_all<A>(acc[r]);
}

// The same for any number of rows; `next` is fetched ahead during the first pass.
template <class T, int A = 4>
inline void dots(const uint8_t* w, const uint8_t* next, const float* const* x, int64_t rows, int64_t n, float* out) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dot_block<T, kRows, A>(w, r == 0 ? next : nullptr, x + r, n, out + r);
  const uint8_t* ahead = r == 0 ? next : nullptr;
  if (rows - r == 1) dot_block<T, 1, A>(w, ahead, x + r, n, out + r);
  if constexpr (kRows > 2) {
    if (rows - r == 2) dot_block<T, 2, A>(w, ahead, x + r, n, out + r);
    if (rows - r == 3) dot_block<T, 3, A>(w, ahead, x + r, n, out + r);
  }
}

// out[g] = w[g] . x for G vectors read side by side, each summed as dot_block does. Reading scattered vectors one after
// another, a thread of Zen 4 gets 17 GB/s whatever it fetches ahead, four side by side give 23; with Zen 5 four give 22 and
// eight 30 (benchmarks/LOG.md).
template <class T, int G>
inline void dot_side_by_side(const uint8_t* const* w, const uint8_t* const* next, const float* x, int64_t n,
                             float* out) {
  vf acc[G][kSums];
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < kSums; ++u) acc[g][u] = zero();
  constexpr int kStep = 64 / T::size > kSums * W ? 64 / T::size / W : kSums;  // vectors: a cache line at least
  int64_t i = 0;
  for (; i + kStep * W <= n; i += kStep * W) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) prefetch<kStep * W * T::size>(next[g] + i * T::size);
#pragma GCC unroll 4
    for (int u = 0; u < kStep; ++u) {
      const vf v = load(x + i + u * W);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) acc[g][u % kSums] = fma(T::get(w[g] + (i + u * W) * T::size), v, acc[g][u % kSums]);
    }
  }
  for (int u = 0; u < kStep; ++u) {
    const int64_t at = i + u * W, left = n - at;
    if (left <= 0) break;
    const vf v = load(x + at);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const uint8_t* p = w[g] + at * T::size;
      acc[g][u % kSums] = fma(left >= W ? T::get(p) : get_tail<T>(p, left), v, acc[g][u % kSums]);
    }
  }
  for (int g = 0; g < G; ++g) out[g] = sum_all<kSums>(acc[g]);
}

// The vectors at `offset` of `num` records times x; those of the kGroup `next` records are fetched meanwhile.
template <class T, int G = kGroup>
inline void dot_records(const uint8_t* const* records, int num, const uint8_t* const* next, int64_t offset,
                        const float* x, int64_t n, float* out) {
  if constexpr (G > 1) {
    if (num < G) return dot_records<T, G - 1>(records, num, next, offset, x, n, out);
  }
  const uint8_t *w[kGroup], *ahead[kGroup];
  for (int g = 0; g < G; ++g) w[g] = records[g] + offset;
  for (int g = 0; g < kGroup; ++g) ahead[g] = next[g] + offset;
  dot_side_by_side<T, G>(w, ahead, x, n, out);
}

// out += c[0] w[0] + ... + c[G-1] w[G-1], one after the other in each element: the same as G calls of one.
template <class T, int G>
inline void add_block(float* out, const uint8_t* const* w, const float* c, const uint8_t* const* next, int64_t n) {
  constexpr int64_t kStep = 64 / T::size > W ? 64 / T::size : W;  // elements in a cache line, at least a vector
  vf factor[G];
  for (int g = 0; g < G; ++g) factor[g] = set1(c[g]);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (next != nullptr)
      for (int g = 0; g < kGroup; ++g) prefetch<kStep * T::size>(next[g] + i * T::size);
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kStep; j += W) {
      vf a = load(out + j);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) a = fma(factor[g], T::get(w[g] + j * T::size), a);
      store(out + j, a);
    }
  }
  for (; i < n; i += W) {
    const int64_t left = n - i;
    alignas(64) float edge[W] = {};
    if (left < W) __builtin_memcpy(edge, out + i, static_cast<size_t>(left) * 4);
    vf a = load(left < W ? edge : out + i);
    for (int g = 0; g < G; ++g)
      a = fma(factor[g], left < W ? get_tail<T>(w[g] + i * T::size, left) : T::get(w[g] + i * T::size), a);
    store(left < W ? edge : out + i, a);
    if (left < W) __builtin_memcpy(out + i, edge, static_cast<size_t>(left) * 4);
  }
}

template <class T, int G = kGroup>
inline void add_scaled(float* out, const uint8_t* const* w, const float* c, int num, const uint8_t* const* next,
                       int64_t n) {
  if constexpr (G > 1) {
    if (num < G) return add_scaled<T, G - 1>(out, w, c, num, next, n);
  }
  if (num > 0) add_block<T, G>(out, w, c, next, n);
}

// ---- the FFN from records -------------------------------------------------------------------------------------------

struct FfnWork {
  const FfnArgs* a;
  int64_t num_live;
  int64_t slice;  // elements of the output that one range holds
  Ranges ranges;
};

// The rows [from, to) for which record k is wanted; returns how many.
inline int64_t wanted_rows(const FfnArgs& a, int64_t k, int64_t from, int64_t to, int64_t* rows) {
  int64_t count = 0;
  for (int64_t b = from; b < to; ++b)
    if (a.mask == nullptr || a.mask[b * a.num + k] != 0) rows[count++] = b;
  return count;
}

inline bool wanted(const FfnArgs& a, int64_t k) {
  if (a.mask == nullptr) return a.batch > 0;
  for (int64_t b = 0; b < a.batch; ++b)
    if (a.mask[b * a.num + k] != 0) return true;
  return false;
}

// Keeps those of rows whose activation is not zero; fills their x.
inline int64_t keep_active(const FfnArgs& a, const float* activation, int64_t count, int64_t* rows, float* kept,
                           const float** x) {
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (activation[i] == 0.0f) continue;
    kept[left] = activation[i];
    rows[left] = rows[i];
    x[left++] = a.x + rows[i] * a.ld;
  }
  return left;
}

// coefficients[k, b] for one record and up to kPanel rows, the scale of down included.
template <class T>
inline void record_coefficients(const FfnArgs& a, int64_t k, const uint8_t* next, int64_t* rows, int64_t count) {
  const uint8_t* record = a.arena + a.offsets[k];
  const float* x[kPanel];
  float product[kPanel], kept[kPanel];
  for (int64_t i = 0; i < count; ++i) x[i] = a.x + rows[i] * a.ld;
  if (a.gate.offset >= 0) {
    const uint8_t* ahead = next != nullptr ? next + a.gate.offset : nullptr;
    dots<T, kSums>(record + a.gate.offset, ahead, x, count, a.hidden, product);
    const float scale = read_scale(record, a.gate);
    for (int64_t i = 0; i < count; ++i) product[i] = activate(a.act, product[i] * scale);
    count = keep_active(a, product, count, rows, kept, x);
  }
  if (count == 0) return;
  dots<T, kSums>(record + a.up.offset, next != nullptr ? next + a.up.offset : nullptr, x, count, a.hidden, product);
  const float up_scale = read_scale(record, a.up), down_scale = read_scale(record, a.down);
  for (int64_t i = 0; i < count; ++i) {
    const float up = product[i] * up_scale;
    const float c = a.gate.offset >= 0 ? kept[i] * up : activate(a.act, up);
    a.coefficients[k * a.batch + rows[i]] = c * down_scale;
  }
}

// The same for the only row of x and up to kGroup records.
template <class T>
inline void group_coefficients(const FfnArgs& a, const int64_t* ids, int num, const uint8_t* const* next) {
  const uint8_t* record[kGroup];
  int64_t kept[kGroup];
  float product[kGroup], gate[kGroup];
  for (int g = 0; g < num; ++g) {
    record[g] = a.arena + a.offsets[ids[g]], kept[g] = ids[g];
    a.coefficients[ids[g]] = 0.0f;
  }
  if (a.gate.offset >= 0) {
    dot_records<T>(record, num, next, a.gate.offset, a.x, a.hidden, product);
    int left = 0;
    for (int g = 0; g < num; ++g) {
      const float activation = activate(a.act, product[g] * read_scale(record[g], a.gate));
      if (activation == 0.0f) continue;
      gate[left] = activation, kept[left] = kept[g], record[left++] = record[g];
    }
    num = left;
  }
  if (num > 0) dot_records<T>(record, num, next, a.up.offset, a.x, a.hidden, product);
  for (int g = 0; g < num; ++g) {
    const float up = product[g] * read_scale(record[g], a.up);
    const float c = a.gate.offset >= 0 ? gate[g] * up : activate(a.act, up);
    a.coefficients[kept[g]] = c * read_scale(record[g], a.down);
  }
}

template <class T>
void ffn_coefficients_of_one(void* context, int) {
  FfnWork& work = *static_cast<FfnWork*>(context);
  const FfnArgs& a = *work.a;
  int64_t begin, end;
  while (work.ranges.take(&begin, &end)) {
    for (int64_t i = begin; i < end; i += kGroup) {
      const uint8_t* next[kGroup];
      for (int64_t g = 0; g < kGroup; ++g) {
        next[g] = a.arena + a.offsets[a.live[min(i + kGroup + g, work.num_live - 1)]];
        if (a.up.scale_offset >= 0) prefetch_line(next[g] + a.up.scale_offset);
      }
      group_coefficients<T>(a, a.live + i, static_cast<int>(min(kGroup, end - i)), next);
    }
  }
}

template <class T>
void ffn_coefficients(void* context, int) {
  FfnWork& work = *static_cast<FfnWork*>(context);
  const FfnArgs& a = *work.a;
  int64_t begin, end, rows[kPanel];
  while (work.ranges.take(&begin, &end)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = a.live[i];
      const uint8_t* next = i + kAhead < work.num_live ? a.arena + a.offsets[a.live[i + kAhead]] : nullptr;
      if (next != nullptr && a.up.scale_offset >= 0) prefetch_line(next + a.up.scale_offset);
      for (int64_t b = 0; b < a.batch; ++b) a.coefficients[k * a.batch + b] = 0.0f;
      for (int64_t from = 0; from < a.batch; from += kPanel) {
        const int64_t count = wanted_rows(a, k, from, min(from + kPanel, a.batch), rows);
        if (count > 0) record_coefficients<T>(a, k, from == 0 ? next : nullptr, rows, count);
      }
    }
  }
}

template <class T>
void ffn_outputs(void* context, int) {
  FfnWork& work = *static_cast<FfnWork*>(context);
  const FfnArgs& a = *work.a;
  int64_t begin, end;
  while (work.ranges.take(&begin, &end)) {
    const int64_t first = begin * work.slice, n = min(end * work.slice, a.hidden) - first;
    const int64_t at = a.down.offset + first * T::size;
    for (int64_t i = 0; i < work.num_live; i += kGroup) {
      const uint8_t* next[kGroup];
      for (int64_t g = 0; g < kGroup; ++g)
        next[g] = a.arena + a.offsets[a.live[min(i + kGroup + g, work.num_live - 1)]] + at;
      bool fetched = false;
      for (int64_t b = 0; b < a.batch; ++b) {
        const uint8_t* w[kGroup];
        float c[kGroup];
        int count = 0;
        for (int64_t g = i; g < min(i + kGroup, work.num_live); ++g) {
          const float coefficient = a.coefficients[a.live[g] * a.batch + b];
          if (coefficient == 0.0f) continue;
          c[count] = coefficient;
          w[count++] = a.arena + a.offsets[a.live[g]] + at;
        }
        add_scaled<T>(a.out + b * a.hidden + first, w, c, count, fetched ? nullptr : next, n);
        fetched = fetched || count > 0;
      }
    }
  }
}

inline int64_t list_wanted(const FfnArgs& a) {
  int64_t count = 0;
  for (int64_t k = 0; k < a.num; ++k)
    if (wanted(a, k)) a.live[count++] = k;
  return count;
}

inline int64_t list_contributing(const FfnArgs& a, int64_t num_live) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_live; ++i) {
    const float* c = a.coefficients + a.live[i] * a.batch;
    bool any = false;
    for (int64_t b = 0; b < a.batch; ++b) any = any || c[b] != 0.0f;
    if (any) a.live[count++] = a.live[i];
  }
  return count;
}

// Coefficients, before the scale of down, that reach their neuron's threshold; all that are not zero without one.
inline int64_t count_active(const FfnArgs& a, int64_t num_live) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_live; ++i) {
    const int64_t k = a.live[i];
    const float least = a.threshold != nullptr ? a.threshold[k] * read_scale(a.arena + a.offsets[k], a.down) : 0.0f;
    const float* c = a.coefficients + k * a.batch;
    for (int64_t b = 0; b < a.batch; ++b) count += c[b] != 0.0f && (c[b] < 0 ? -c[b] : c[b]) >= least;
  }
  return count;
}

template <class T>
void ffn_of(const FfnArgs& a, const Team& team) {
  FfnWork work{&a, list_wanted(a), 0, {}};
  work.ranges = make_ranges(work.num_live, team.num_threads, 32);
  team.run(team.self, a.batch == 1 ? ffn_coefficients_of_one<T> : ffn_coefficients<T>, &work);
  work.num_live = list_contributing(a, work.num_live);
  *a.num_active = count_active(a, work.num_live);
  const int64_t per_thread = (a.hidden + team.num_threads - 1) / team.num_threads;
  work.slice = (per_thread + 63) / 64 * 64;
  work.ranges = Ranges{0, (a.hidden + work.slice - 1) / work.slice, 1};
  if (work.num_live > 0) team.run(team.self, ffn_outputs<T>, &work);
}

void ffn(const FfnArgs& a, const Team& team) {
  switch (a.dtype) {
    case Dtype::fp32: return ffn_of<Fp32>(a, team);
    case Dtype::bf16: return ffn_of<Bf16>(a, team);
    case Dtype::fp16: return ffn_of<Fp16>(a, team);
    case Dtype::int8: return ffn_of<Int8>(a, team);
  }
}

// ---- the predictor's pass over 4-bit sketches -----------------------------------------------------------------------

constexpr int64_t kSketchBlock = 8 * W;  // codes in one vector of 32-bit words
constexpr uintptr_t kSketchAhead = 2048;  // bytes

struct SketchWork {
  const SketchArgs* a;
  Ranges ranges;
};

// Nibble J of the words of a block meets x[8 * lane + J]: x is put into that order once, the codes stay as they are.
inline void permute_x(const SketchArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < a.ld; ++i) {
      const int64_t block = i / kSketchBlock * kSketchBlock, inside = i % kSketchBlock;
      const float value = i < a.hidden ? a.x[b * a.hidden + i] : 0.0f;
      a.permuted[b * a.ld + block + inside % 8 * W + inside / 8] = value;
    }
}

template <class Words, int R, int J>
inline void nibble_step(Words words, const float* const* x, int64_t at, vf (*acc)[4]) {
  const vf v = nibble<J>(words);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r][J % 4] = fma(v, load(x[r] + at + J * W), acc[r][J % 4]);
}

template <class Words, int R>
inline void nibble_block(Words words, const float* const* x, int64_t at, vf (*acc)[4]) {
  nibble_step<Words, R, 0>(words, x, at, acc);
  nibble_step<Words, R, 1>(words, x, at, acc);
  nibble_step<Words, R, 2>(words, x, at, acc);
  nibble_step<Words, R, 3>(words, x, at, acc);
  nibble_step<Words, R, 4>(words, x, at, acc);
  nibble_step<Words, R, 5>(words, x, at, acc);
  nibble_step<Words, R, 6>(words, x, at, acc);
  nibble_step<Words, R, 7>(words, x, at, acc);
}

template <int R>
inline void code_dot_block(const uint8_t* codes, int64_t bytes, const float* const* x, float* out) {
  using Words = decltype(load_words(codes));
  constexpr int64_t kBytes = kSketchBlock / 2;
  vf acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < 4; ++u) acc[r][u] = zero();
  int64_t i = 0;
  for (; i + kBytes <= bytes; i += kBytes) {
    prefetch_ahead(codes + i, kSketchAhead);
    nibble_block<Words, R>(load_words(codes + i), x, 2 * i, acc);
  }
  if (i < bytes) nibble_block<Words, R>(load_words_tail(codes + i, bytes - i), x, 2 * i, acc);
  for (int r = 0; r < R; ++r) out[r] = sum(add(add(acc[r][0], acc[r][1]), add(acc[r][2], acc[r][3])));
}

template <int R>
inline void sketch_neuron(const SketchArgs& a, int64_t f, int64_t row) {
  const int64_t bytes = (a.hidden + 1) / 2;
  const float* x[R];
  float gate[R] = {}, up[R] = {};
  bool any = a.gate_codes == nullptr;
  for (int r = 0; r < R; ++r) x[r] = a.permuted + (row + r) * a.ld;
  if (a.gate_codes != nullptr) {
    code_dot_block<R>(a.gate_codes + f * bytes, bytes, x, gate);
    for (int r = 0; r < R; ++r) {
      gate[r] = activate(a.act, gate[r] * a.gate_scale[f]);
      any = any || gate[r] != 0.0f;
    }
  }
  if (any) code_dot_block<R>(a.up_codes + f * bytes, bytes, x, up);
  for (int r = 0; r < R; ++r) {
    float value = 0.0f;
    if (a.gate_codes == nullptr) value = activate(a.act, up[r] * a.up_scale[f]);
    else if (gate[r] != 0.0f) value = gate[r] * (up[r] * a.up_scale[f]);
    a.out[(row + r) * a.num + f] = (value < 0 ? -value : value) * a.down_norm[f];
  }
}

void sketch_range(void* context, int) {
  SketchWork& work = *static_cast<SketchWork*>(context);
  const SketchArgs& a = *work.a;
  int64_t begin, end;
  while (work.ranges.take(&begin, &end)) {
    int64_t row = 0;
    for (; row + kRows <= a.batch; row += kRows)
      for (int64_t f = begin; f < end; ++f) sketch_neuron<kRows>(a, f, row);
    for (; row < a.batch; ++row)
      for (int64_t f = begin; f < end; ++f) sketch_neuron<1>(a, f, row);
  }
}

void sketch_scores(const SketchArgs& a, const Team& team) {
  permute_x(a);
  SketchWork work{&a, make_ranges(a.num, team.num_threads, 64)};
  team.run(team.self, sketch_range, &work);
}

#include "planes.h"

// ---- dense layers for a few rows ------------------------------------------------------------------------------------

struct LinearWork {
  const LinearArgs* a;
  Ranges ranges;
};

template <class T>
void linear_range(void* context, int) {
  LinearWork& work = *static_cast<LinearWork*>(context);
  const LinearArgs& a = *work.a;
  const float* x[kPanel];
  float result[kPanel];
  int64_t begin, end;
  while (work.ranges.take(&begin, &end)) {
    for (int64_t from = 0; from < a.batch; from += kPanel) {
      const int64_t rows = min(kPanel, a.batch - from);
      for (int64_t r = 0; r < rows; ++r) x[r] = a.x + (from + r) * a.ld;
      for (int64_t n = begin; n < end; ++n) {
        const uint8_t* w = a.weight + n * a.hidden * T::size;
        const uint8_t* next = n + 1 < a.num ? w + a.hidden * T::size : nullptr;
        dots<T>(w, next, x, rows, a.hidden, result);
        for (int64_t r = 0; r < rows; ++r) a.out[(from + r) * a.num + n] = result[r];
      }
    }
  }
}

void linear(const LinearArgs& a, const Team& team) {
  LinearWork work{&a, make_ranges(a.num, team.num_threads, 64)};
  void (*range)(void*, int) = linear_range<Fp32>;
  if (a.dtype == Dtype::bf16) range = linear_range<Bf16>;
  if (a.dtype == Dtype::fp16) range = linear_range<Fp16>;
  team.run(team.self, range, &work);
}

// ---- decode attention over a block table ----------------------------------------------------------------------------

struct AttentionWork {
  const AttentionArgs* a;
  Ranges ranges;  // unit = part of the tokens * num_kv_heads + kv head
};

inline int64_t token_at(const AttentionArgs& a, int64_t token, int64_t kv_head) {  // element of keys and values
  const int64_t block = a.block_table[token / a.block_size];
  return ((block * a.block_size + token % a.block_size) * a.num_kv_heads + kv_head) * a.head_dim;
}

// Scores to probabilities without the division; returns their sum. scores has room for kAttentionTokens.
inline float exponentials(float* scores, int64_t count, float largest) {
  for (int64_t t = count; t < (count + W - 1) / W * W; ++t) scores[t] = largest;
  for (int64_t t = 0; t < count; t += W) store(scores + t, exp_negative(sub(load(scores + t), set1(largest))));
  for (int64_t t = count; t < (count + W - 1) / W * W; ++t) scores[t] = 0.0f;
  vf total = zero();
  for (int64_t t = 0; t < count; t += W) total = add(total, load(scores + t));
  return sum(total);
}

template <class T>
inline void attention_scores(const AttentionArgs& a, int64_t first, int64_t count, int64_t kv_head, float* scores) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const float* q[kPanel];
  float dot[kPanel];
  for (int64_t from = 0; from < group; from += kPanel) {
    const int64_t heads = min(kPanel, group - from);
    for (int64_t g = 0; g < heads; ++g) q[g] = a.q + (kv_head * group + from + g) * a.ld;
    for (int64_t t = 0; t < count; ++t) {
      dots<T>(a.keys + token_at(a, first + t, kv_head) * T::size, nullptr, q, heads, a.head_dim, dot);
      for (int64_t g = 0; g < heads; ++g) scores[(from + g) * kAttentionTokens + t] = dot[g] * a.scale;
    }
  }
}

// One part of the tokens for the query heads of one kv head: partial = (maximum, sum, unnormalised output).
template <class T>
inline void attention_unit(const AttentionArgs& a, int64_t part, int64_t kv_head, float* scores) {
  const int64_t group = a.num_heads / a.num_kv_heads, first = part * kAttentionTokens;
  const int64_t count = min(kAttentionTokens, a.num_tokens - first);
  attention_scores<T>(a, first, count, kv_head, scores);
  for (int64_t g = 0; g < group; ++g) {
    float* own = scores + g * kAttentionTokens;
    float* result = a.partial + (part * a.num_heads + kv_head * group + g) * (a.head_dim + 2);
    float largest = own[0];
    for (int64_t t = 1; t < count; ++t) largest = own[t] > largest ? own[t] : largest;
    result[0] = largest;
    result[1] = exponentials(own, count, largest);
    for (int64_t d = 0; d < a.head_dim; ++d) result[2 + d] = 0.0f;
    for (int64_t t = 0; t < count; t += kGroup) {
      const uint8_t* v[kGroup];
      const int num = static_cast<int>(min(kGroup, count - t));
      for (int i = 0; i < num; ++i) v[i] = a.values + token_at(a, first + t + i, kv_head) * T::size;
      add_scaled<T>(result + 2, v, own + t, num, nullptr, a.head_dim);
    }
  }
}

template <class T>
void attention_range(void* context, int thread) {
  AttentionWork& work = *static_cast<AttentionWork*>(context);
  const AttentionArgs& a = *work.a;
  float* scores = a.scores + thread * (a.num_heads / a.num_kv_heads) * kAttentionTokens;
  int64_t begin, end;
  while (work.ranges.take(&begin, &end))
    for (int64_t unit = begin; unit < end; ++unit)
      attention_unit<T>(a, unit / a.num_kv_heads, unit % a.num_kv_heads, scores);
}

// Puts the parts together, in order: the usual rescaling to a common maximum.
inline void combine_parts(const AttentionArgs& a, int64_t head, int64_t parts) {
  const int64_t step = a.num_heads * (a.head_dim + 2);
  const float* first = a.partial + head * (a.head_dim + 2);
  float largest = first[0], total = 0.0f;
  for (int64_t p = 1; p < parts; ++p) largest = first[p * step] > largest ? first[p * step] : largest;
  float* out = a.out + head * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; ++d) out[d] = 0.0f;
  for (int64_t p = 0; p < parts; ++p) {
    const float weight = expf(first[p * step] - largest);
    total += weight * first[p * step + 1];
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] += weight * first[p * step + 2 + d];
  }
  for (int64_t d = 0; d < a.head_dim; ++d) out[d] /= total;
}

void paged_attention(const AttentionArgs& a, const Team& team) {
  const int64_t parts = (a.num_tokens + kAttentionTokens - 1) / kAttentionTokens;
  AttentionWork work{&a, Ranges{0, parts * a.num_kv_heads, 1}};
  team.run(team.self, a.dtype == Dtype::bf16 ? attention_range<Bf16> : attention_range<Fp32>, &work);
  for (int64_t head = 0; head < a.num_heads; ++head) combine_parts(a, head, parts);
}

// ---- what the machine reads at most ---------------------------------------------------------------------------------

constexpr int64_t kReadStep = 4 * W * 4;        // bytes
constexpr int64_t kReadPiece = 4096 * kReadStep;
constexpr uintptr_t kReadAhead = 4096;          // bytes

struct ReadWork {
  const ReadArgs* a;
  Ranges ranges;  // pieces
};

void read_range(void* context, int) {
  ReadWork& work = *static_cast<ReadWork*>(context);
  const ReadArgs& a = *work.a;
  int64_t begin, end, total = 0;
  while (work.ranges.take(&begin, &end)) {
    auto sum = no_words();
    const int64_t stop = min(end * kReadPiece, a.bytes / kReadStep * kReadStep);
    for (int64_t i = begin * kReadPiece; i < stop; i += kReadStep) {
      for (int64_t line = 0; line < kReadStep; line += 64) prefetch_ahead(a.data + i + line, kReadAhead);
#pragma GCC unroll 4
      for (int64_t u = 0; u < 4; ++u) sum = add_words(sum, load_words(a.data + i + u * W * 4));
    }
    total += sum_words(sum);
  }
  __atomic_fetch_add(a.sum, total, __ATOMIC_RELAXED);
}

void read_through(const ReadArgs& a, const Team& team) {
  ReadWork work{&a, Ranges{0, (a.bytes + kReadPiece - 1) / kReadPiece, 1}};
  team.run(team.self, read_range, &work);
}

struct RecordReadWork {
  const RecordReadArgs* a;
  Ranges ranges;  // records
};

// kGroup records side by side, as dot_side_by_side takes them, those of the next group fetched meanwhile.
void read_record_range(void* context, int) {
  RecordReadWork& work = *static_cast<RecordReadWork*>(context);
  const RecordReadArgs& a = *work.a;
  int64_t begin, end, total = 0;
  while (work.ranges.take(&begin, &end)) {
    for (int64_t i = begin; i < end; i += kGroup) {
      const uint8_t *record[kGroup], *next[kGroup];
      const int64_t count = min(kGroup, end - i);
      for (int64_t g = 0; g < kGroup; ++g) {
        record[g] = a.data + a.offsets[min(i + g, end - 1)];
        next[g] = a.data + a.offsets[min(i + kGroup + g, a.num - 1)];
      }
      auto sum = no_words();
      for (int64_t at = 0; at + kReadStep <= a.bytes; at += kReadStep) {
        for (int64_t g = 0; g < count; ++g) {
          prefetch<kReadStep>(next[g] + at);
#pragma GCC unroll 4
          for (int64_t u = 0; u < 4; ++u) sum = add_words(sum, load_words(record[g] + at + u * W * 4));
        }
      }
      total += sum_words(sum);
    }
  }
  __atomic_fetch_add(a.sum, total, __ATOMIC_RELAXED);
}

void read_records(const RecordReadArgs& a, const Team& team) {
  RecordReadWork work{&a, make_ranges(a.num, team.num_threads, 32)};
  team.run(team.self, read_record_range, &work);
}

}  // namespace
}  // namespace KERNELS_ISA
}  // namespace coldstream
