// ---- the predictor's pass over sign planes --------------------------------------------------------------------------
// Included inside coldstream::<isa>::(anonymous) by kernels_impl.h. A row is sum(z where its bit is set) * 2 - sum(z):
// masked additions of 16-bit integers, three times as fast as of floats on Zen 4 (10.4 against 3.6 GB/s of codes a
// thread), and exact, so no order of theirs matters. The rounding of z to 14 bits of the token's largest is far below
// what a sketch of two bits knows.

constexpr int kPlaneGroup = 4;        // rows of codes that share one load of z
constexpr int64_t kPlaneBlock = 32;   // rows whose scores are finished together
constexpr int64_t kWidenEvery = 4;    // additions that 16 bits hold
constexpr float kLargestZ = 8160.0f;  // at most 32767 / kWidenEvery; 2^5 * 255: the largest dimension has no ties
constexpr int64_t kPlaneChunk = kPlanes * kWidenEvery;
constexpr int64_t kPlaneChunkBytes = kPlaneChunk / 8;
static_assert(kPlanePad % kPlaneChunk == 0, "z is padded to whole chunks");

struct PlaneWork {
  const PlaneArgs* a;
  Ranges ranges;  // blocks of kPlaneBlock rows
};

inline float rounded(float a) { return a + 12582912.0f - 12582912.0f; }  // 1.5 * 2^23: to the nearest integer

// x times step, by dimension, W at a time; returns the largest magnitude that a plane of those dimensions has.
inline float stepped(const Planes& p, const float* x, int64_t at, int64_t count, float* values) {
  const uint8_t* step = p.step + 2 * at;
  store(values, mul(load(x + at), count >= W ? load_fp16(step) : get_tail<Fp16>(step, count)));
  float largest = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    if (p.bits[at + j] == 0) continue;
    values[j] *= 0.5f;  // the low plane's; the others double it
    const float high = (values[j] < 0 ? -values[j] : values[j]) * static_cast<float>(1 << (p.bits[at + j] - 1));
    largest = high <= largest ? largest : high;  // NaN is kept
    if (largest != largest) return largest;
  }
  return largest;
}

// z of one row of x. Where x has an infinity or a NaN, z_scale is NaN, and so are all scores of that row.
inline void make_z(const PlaneArgs& a, const Planes& p, int64_t row) {
  const float* x = a.x + row * a.ld;
  int16_t* z = p.z + row * p.padded_planes;
  float values[W], largest = 0.0f;
  for (int64_t j = 0; j < a.hidden; j += W) {
    const float found = stepped(p, x, j, min(W, a.hidden - j), values);
    largest = found <= largest ? largest : found;
    if (!(largest <= 3e38f)) break;
  }
  const bool finite = largest <= 3e38f;
  const float inverse = finite && largest > 1e-30f ? kLargestZ / largest : 0.0f;
  p.z_scale[row] = finite ? largest / kLargestZ : __builtin_nanf("");
  int32_t total = 0;
  for (int64_t j = 0; j < a.hidden; j += W) {
    const int64_t count = min(W, a.hidden - j);
    if (finite) stepped(p, x, j, count, values);
    for (int64_t i = 0; i < count; ++i) {
      float value = finite ? values[i] * inverse : 0.0f;
      for (int b = 0; b < p.bits[j + i]; ++b, value *= 2.0f) total += *z++ = static_cast<int16_t>(rounded(value));
    }
  }
  for (const int16_t* end = p.z + (row + 1) * p.padded_planes; z < end; ++z) *z = 0;
  p.z_sum[row] = total;
}

// sums[g][r] += z[r] where the bits of codes[g] are set, over one chunk.
template <int G, int R>
inline void add_chunk(const uint8_t* const* codes, const int16_t* const* z, int64_t at, vi (*sums)[R]) {
  vs part[G][R];
#pragma GCC unroll 4
  for (int64_t byte = 0; byte < kPlaneChunkBytes; byte += kPlanes / 8) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vs values = load_shorts(z[r] + (at + byte) * 8);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const uint8_t* bits = codes[g] + at + byte;
        part[g][r] = byte == 0 ? where_set(bits, values) : add_where_set(part[g][r], bits, values);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[g][r] = add_widened(sums[g][r], part[g][r]);
}

// The last, incomplete chunk. z is zero there, so what follows a row may be read, but nothing beyond the array.
template <int G, int R>
inline void add_tail(const Planes& p, const uint8_t* const* codes, const int16_t* const* z, int64_t at, int64_t num,
                     vi (*sums)[R]) {
  uint8_t edge[G][kPlaneChunkBytes] = {};
  const uint8_t* from[G];
  const int16_t* z_from[R];
  const uint8_t* end = p.codes + num * p.row_bytes;
  for (int g = 0; g < G; ++g) {
    const bool inside = end - (codes[g] + at) >= kPlaneChunkBytes;
    if (!inside) __builtin_memcpy(edge[g], codes[g] + at, static_cast<size_t>(p.row_bytes - at));
    from[g] = inside ? codes[g] + at : edge[g];
  }
  for (int r = 0; r < R; ++r) z_from[r] = z[r] + at * 8;
  add_chunk<G, R>(from, z_from, 0, sums);
}

// Of a block of rows of codes from `first` on: which, and for which rows of x.
struct PlaneBlock {
  int64_t first, count;        // rows of the sketch
  int64_t row;                 // the first row of x
  int64_t rows[kPlaneBlock];   // those of the sketch that are wanted
  bool fetch;                  // the next block's codes are to be fetched meanwhile
};

// out[r][i] = row block.first + i of the matrix times row block.row + r of x, for G of the block's wanted rows.
template <int G, int R>
inline void plane_dots(const Planes& p, const PlaneArgs& a, const PlaneBlock& block, int64_t from,
                       float (*out)[kPlaneBlock]) {
  const uint8_t* codes[G];
  const int16_t* z[R];
  vi sums[G][R];
  for (int g = 0; g < G; ++g) codes[g] = p.codes + block.rows[from + g] * p.row_bytes;
  for (int r = 0; r < R; ++r) z[r] = p.z + (block.row + r) * p.padded_planes;
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < R; ++r) sums[g][r] = no_words();
  const uintptr_t ahead = static_cast<uintptr_t>(kPlaneBlock * p.row_bytes);
  int64_t i = 0;
  for (; i + kPlaneChunkBytes <= p.row_bytes; i += kPlaneChunkBytes) {
    if (block.fetch && i % 64 == 0)
      for (int g = 0; g < G; ++g) prefetch_ahead(codes[g] + i, ahead);
    add_chunk<G, R>(codes, z, i, sums);
  }
  if (i < p.row_bytes) add_tail<G, R>(p, codes, z, i, a.num, sums);
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < R; ++r) {
      const int32_t row = 2 * sum_words(sums[g][r]) - p.z_sum[block.row + r];
      out[r][block.rows[from + g] - block.first] = static_cast<float>(row) * p.z_scale[block.row + r];
    }
}

template <int R>
inline void plane_products(const Planes& p, const PlaneArgs& a, const PlaneBlock& block, int64_t num,
                           float (*out)[kPlaneBlock]) {
  int64_t i = 0;
  for (; i + kPlaneGroup <= num; i += kPlaneGroup) plane_dots<kPlaneGroup, R>(p, a, block, i, out);
  for (; i < num; ++i) plane_dots<1, R>(p, a, block, i, out);
}

// fp16 of W rows from `at` on, of which `left` exist.
inline vf halves(const uint8_t* p, int64_t at, int64_t left) {
  return left >= W ? load_fp16(p + 2 * at) : get_tail<Fp16>(p + 2 * at, left);
}

inline vf activated(Act act, vf a) {
  if (act == Act::silu) return silu(a);
  const vf r = max_keep_nan(zero(), a);
  return act == Act::relu ? r : mul(r, r);
}

// Root of E[act(z)^2] for z = scale (product + bias + noise), by three Gauss-Hermite nodes.
inline vf expected(const Planes& p, Act act, vf product, int64_t at, int64_t left) {
  constexpr float kNode = 1.7320508f;  // standard deviations
  const vf centre = add(product, halves(p.bias, at, left));
  const vf scale = mul(halves(p.scale, at, left), set1(p.unit));
  const vf middle = activated(act, mul(centre, scale));
  const vf low = activated(act, mul(add(centre, set1(-kNode * p.noise)), scale));
  const vf high = activated(act, mul(add(centre, set1(kNode * p.noise)), scale));
  const vf outer = fma(low, low, mul(high, high));
  return root(fma(set1(1.0f / 6.0f), outer, mul(set1(2.0f / 3.0f), mul(middle, middle))));
}

inline vf up_size(const Planes& p, vf product, int64_t at, int64_t left) {
  const vf up = add(product, halves(p.bias, at, left));
  const vf scale = mul(halves(p.scale, at, left), set1(p.unit));
  return mul(root(fma(up, up, set1(p.noise * p.noise))), scale);
}

// products -> expected activations in place. The rest of the last vector is computed too; nobody looks at it.
inline void expect(const Planes& p, Act act, const PlaneBlock& block, float* products) {
  for (int64_t i = 0; i < block.count; i += W)
    store(products + i, expected(p, act, load(products + i), block.first + i, block.count - i));
}

// expected activations times what they are multiplied with, into out.
inline void finish(const PlaneArgs& a, const PlaneBlock& block, float* activation, const float* up, float* out) {
  for (int64_t i = 0; i < block.count; i += W) {
    const int64_t at = block.first + i, left = block.count - i;
    const vf size = up != nullptr ? up_size(a.up, load(up + i), at, left) : halves(a.down_norm, at, left);
    store(activation + i, mul(load(activation + i), size));
  }
  __builtin_memcpy(out + block.first, activation, static_cast<size_t>(block.count) * 4);
}

// Those of the block whose gate may be open for one of the R rows; up is not read for the others.
template <int R>
inline int64_t list_open(PlaneBlock* block, float (*activation)[kPlaneBlock]) {
  int64_t num = 0;
  for (int64_t i = 0; i < block->count; ++i) {
    bool open = false;
    for (int r = 0; r < R; ++r) open = open || activation[r][i] != 0.0f;
    if (open) block->rows[num++] = block->first + i;
  }
  return num;
}

template <int R>
inline void score_block(const PlaneArgs& a, int64_t first, int64_t count, int64_t row) {
  PlaneBlock block{first, count, row, {}, row == 0};
  float activation[R][kPlaneBlock] = {}, up[R][kPlaneBlock] = {};
  for (int64_t i = 0; i < count; ++i) block.rows[i] = first + i;
  const bool gated = a.gate.codes != nullptr;
  const Planes& inner = gated ? a.gate : a.up;
  plane_products<R>(inner, a, block, count, activation);
  for (int r = 0; r < R; ++r) expect(inner, a.act, block, activation[r]);
  if (gated) plane_products<R>(a.up, a, block, list_open<R>(&block, activation), up);
  for (int r = 0; r < R; ++r)
    finish(a, block, activation[r], gated ? up[r] : nullptr, a.out + (row + r) * a.num);
}

void plane_range(void* context, int) {
  PlaneWork& work = *static_cast<PlaneWork*>(context);
  const PlaneArgs& a = *work.a;
  int64_t begin, end;
  while (work.ranges.take(&begin, &end)) {
    for (int64_t first = begin * kPlaneBlock; first < min(end * kPlaneBlock, a.num); first += kPlaneBlock) {
      const int64_t count = min(kPlaneBlock, a.num - first);
      int64_t row = 0;
      for (; row + kPlaneRows <= a.batch; row += kPlaneRows) score_block<kPlaneRows>(a, first, count, row);
      for (; row < a.batch; ++row) score_block<1>(a, first, count, row);
    }
  }
}

void plane_scores(const PlaneArgs& a, const Team& team) {
  for (int64_t row = 0; row < a.batch; ++row) {
    if (a.gate.codes != nullptr) make_z(a, a.gate, row);
    make_z(a, a.up, row);
  }
  const int64_t blocks = (a.num + kPlaneBlock - 1) / kPlaneBlock;
  PlaneWork work{&a, make_ranges(blocks, team.num_threads, 4)};
  team.run(team.self, plane_range, &work);
}
