// One vector of floats in three widths, and how the number formats of a record become such a vector.
// Included inside coldstream::<isa>::(anonymous) by kernels_impl.h: nothing here has linkage, so code compiled for one
// instruction set cannot be picked by the linker for another. For the same reason: no std:: functions.

#if defined(KERNELS_AVX512)

constexpr int W = 16;    // floats in a vector
constexpr int kRows = 4;  // rows of x that share one pass over a weight: 4 x 4 accumulators fit 32 registers
using vf = __m512;
using vi = __m512i;

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float a) { return _mm512_set1_ps(a); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max_keep_nan(vf low, vf a) { return _mm512_max_ps(low, a); }  // a NaN in the second operand is returned
inline vf shift_exponent(vf p, vf t) {  // p * 2^(low bits of t)
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
inline float sum(vf a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline vf load_bf16(const uint8_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline vf load_fp16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vf load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline vf load_fp32(const uint8_t* p) { return _mm512_loadu_ps(p); }
inline vi load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline vi load_words_tail(const uint8_t* p, int64_t bytes) {  // bytes < 64, zeros behind them
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}
template <int J>
inline vf nibble(vi words) {  // nibble J of each 32-bit word, minus 8; the permutation looks at the low four bits only
  const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * J), table);
}
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf root(vf a) { return _mm512_sqrt_ps(a); }
inline vf where_negative(vf a, vf x, vf y) {  // x in the lanes where a < 0, else y
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ), y, x);
}

constexpr int kPlanes = 32;    // 16-bit integers in a vector, and planes in a mask
constexpr int kPlaneRows = 2;  // rows of x that share one pass over codes: 4 x 2 pairs of accumulators
using vs = __m512i;
inline vs load_shorts(const int16_t* p) { return _mm512_loadu_si512(p); }
inline vs where_set(const uint8_t* bits, vs z) {  // z in the lanes whose bit is set, else 0
  __mmask32 mask;
  __builtin_memcpy(&mask, bits, sizeof(mask));
  return _mm512_maskz_mov_epi16(mask, z);
}
inline vs add_where_set(vs a, const uint8_t* bits, vs z) {
  __mmask32 mask;
  __builtin_memcpy(&mask, bits, sizeof(mask));
  return _mm512_mask_add_epi16(a, mask, a, z);
}
inline vi no_words() { return _mm512_setzero_si512(); }
inline vi add_words(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi add_widened(vi sum, vs a) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, _mm512_set1_epi16(1)));
}
inline int32_t sum_words(vi a) { return _mm512_reduce_add_epi32(a); }

#elif defined(KERNELS_AVX2)

constexpr int W = 8;
constexpr int kRows = 2;  // 2 x 4 accumulators of 16 registers
using vf = __m256;
using vi = __m256i;

inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float a) { return _mm256_set1_ps(a); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max_keep_nan(vf low, vf a) { return _mm256_max_ps(low, a); }
inline vf shift_exponent(vf p, vf t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
inline float sum(vf a) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline vf load_bf16(const uint8_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline vf load_fp16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vf load_int8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline vf load_fp32(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
inline vi load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int J>
inline vf nibble(vi words) {  // the bits of 2^23 with n below are 2^23 + n as a float: exact, no conversion
  const vi bits = _mm256_and_si256(_mm256_srli_epi32(words, 4 * J), _mm256_set1_epi32(15));
  const vf large = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x4B000000)));
  return _mm256_sub_ps(large, _mm256_set1_ps(8388616.0f));
}
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf root(vf a) { return _mm256_sqrt_ps(a); }
inline vf where_negative(vf a, vf x, vf y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_LT_OQ));
}

constexpr int kPlanes = 16;
constexpr int kPlaneRows = 1;
using vs = __m256i;
inline vs load_shorts(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline vs where_set(const uint8_t* bits, vs z) {
  const vs each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  int16_t word;
  __builtin_memcpy(&word, bits, sizeof(word));
  return _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(word), each), each), z);
}
inline vs add_where_set(vs a, const uint8_t* bits, vs z) { return _mm256_add_epi16(a, where_set(bits, z)); }
inline vi no_words() { return _mm256_setzero_si256(); }
inline vi add_words(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi add_widened(vi sum, vs a) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, _mm256_set1_epi16(1)));
}
inline int32_t sum_words(vi a) {
  const __m128i q = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i d = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(d, _mm_shuffle_epi32(d, 0xB1)));
}

#else  // any machine: the compiler's own vectors, four floats

constexpr int W = 4;
constexpr int kRows = 2;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));
typedef int8_t vb __attribute__((vector_size(4)));

inline vf zero() { return vf{0, 0, 0, 0}; }
inline vf set1(float a) { return vf{a, a, a, a}; }
template <class V>
inline V load_any(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
inline vf load(const float* p) { return load_any<vf>(p); }
inline void store(float* p, vf a) { __builtin_memcpy(p, &a, sizeof(vf)); }
inline vf add(vf a, vf b) { return a + b; }
inline vf sub(vf a, vf b) { return a - b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf max_keep_nan(vf low, vf a) { return low > a ? low : a; }
inline vf shift_exponent(vf p, vf t) { return (vf)((vu)p + ((vu)t << 23)); }
inline float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline vf load_bf16(const uint8_t* p) { return (vf)(__builtin_convertvector(load_any<vh>(p), vu) << 16); }
inline float half(uint16_t h) {  // exact: the exponent is moved by a multiplication, which handles subnormals too
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFF) << 13;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x70000000u : 0;  // inf and NaN
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, 4);
  scaled *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, 4);
  bits = (special != 0 ? (magnitude | special) : bits) | static_cast<uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&scaled, &bits, 4);
  return scaled;
}
inline vf load_fp16(const uint8_t* p) {
  const vh h = load_any<vh>(p);
  return vf{half(h[0]), half(h[1]), half(h[2]), half(h[3])};
}
inline vf load_int8(const uint8_t* p) { return __builtin_convertvector(load_any<vb>(p), vf); }
inline vf load_fp32(const uint8_t* p) { return load_any<vf>(p); }
inline vu load_words(const uint8_t* p) { return load_any<vu>(p); }
template <int J>
inline vf nibble(vu words) {
  return (vf)(((words >> (4 * J)) & 15u) | 0x4B000000u) - 8388616.0f;
}
inline vf div(vf a, vf b) { return a / b; }
inline vf root(vf a) {
  return vf{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline vf where_negative(vf a, vf x, vf y) { return a < zero() ? x : y; }

constexpr int kPlanes = 8;
constexpr int kPlaneRows = 1;
typedef int16_t vs __attribute__((vector_size(16)));
inline vs load_shorts(const int16_t* p) { return load_any<vs>(p); }
inline vs where_set(const uint8_t* bits, vs z) {
  const vs each = {1, 2, 4, 8, 16, 32, 64, 128};
  const int16_t byte = *bits;
  return (vs)((vs{byte, byte, byte, byte, byte, byte, byte, byte} & each) == each) & z;
}
inline vs add_where_set(vs a, const uint8_t* bits, vs z) { return a + where_set(bits, z); }
inline vi no_words() { return vi{0, 0, 0, 0}; }
inline vi add_words(vi a, vu b) { return (vi)((vu)a + b); }
inline vi add_widened(vi sum, vs a) { return sum + (((vi)a << 16) >> 16) + ((vi)a >> 16); }
inline int32_t sum_words(vi a) { return (int32_t)((uint32_t)a[0] + (uint32_t)a[1] + (uint32_t)a[2] + (uint32_t)a[3]); }

#endif

#if !defined(KERNELS_AVX512)
inline auto load_words_tail(const uint8_t* p, int64_t bytes) {  // bytes < 4 * W, zeros behind them
  alignas(64) uint8_t buffer[4 * W] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(bytes));
  return load_words(buffer);
}
#endif

struct Fp32 {
  static constexpr int64_t size = 4;
  static vf get(const uint8_t* p) { return load_fp32(p); }
};
struct Bf16 {
  static constexpr int64_t size = 2;
  static vf get(const uint8_t* p) { return load_bf16(p); }
};
struct Fp16 {
  static constexpr int64_t size = 2;
  static vf get(const uint8_t* p) { return load_fp16(p); }
};
struct Int8 {
  static constexpr int64_t size = 1;
  static vf get(const uint8_t* p) { return load_int8(p); }
};

// The last n < W elements; the rest of the vector is zero. Nothing beyond the n elements is touched.
template <class T>
inline vf get_tail(const uint8_t* p, int64_t n) {
  alignas(64) uint8_t buffer[W * T::size] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n * T::size));
  return T::get(buffer);
}

// Into the second-level cache: on Zen 4 one thread then reads 17 GB/s, with a hint for the first level 10 (its few miss
// buffers stay free for the loads themselves).
inline void prefetch_line(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

template <int64_t Bytes>
inline void prefetch(const uint8_t* p) {
  for (int64_t at = 0; at < Bytes; at += 64) prefetch_line(p + at);
}

// Some way ahead in an array read from front to back; beyond its end it does nothing.
inline void prefetch_ahead(const uint8_t* p, uintptr_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0, 2);
}

// exp for arguments <= 0, relative error below 2e-7; below -87 it stays at 1e-38. Cephes' polynomial.
inline vf exp_negative(vf a) {
  const vf x = max_keep_nan(set1(-87.0f), a);
  const vf t = fma(x, set1(1.44269504f), set1(12582912.0f));  // 1.5 * 2^23: the sum is rounded to an integer
  const vf n = sub(t, set1(12582912.0f));
  const vf r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return shift_exponent(add(fma(p, mul(r, r), r), set1(1.0f)), t);
}

inline vf absolute(vf a) { return max_keep_nan(sub(zero(), a), a); }

inline vf silu(vf a) {
  const vf e = exp_negative(sub(zero(), absolute(a)));
  return div(mul(a, where_negative(a, e, set1(1.0f))), add(set1(1.0f), e));
}
