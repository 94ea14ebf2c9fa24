// The face of the CPU loops: plain arguments and one table of functions per instruction set.
// Knows no Python, allocates nothing, checks nothing: the bindings have done all three.
// This header is seen by files compiled with different flags, so it holds declarations and plain data only
// (an inline function would be compiled twice and the linker would keep either one).
#pragma once

#include <cstdint>

namespace coldstream {

enum class Dtype : int { fp32, bf16, fp16, int8 };
enum class Act : int { silu, relu, relu2 };

constexpr int64_t kPad = 128;             // elements: rows of x are zero-padded to a multiple of it
constexpr int64_t kPlanePad = 128;        // planes: what one widening of the 16-bit sums takes at most
constexpr int kMostBits = 15;             // of a dimension
constexpr int64_t kMostPlanes = 1 << 17;  // a row of more could overflow its 32-bit sum
constexpr int64_t kAttentionTokens = 256;  // tokens in one unit of attention work, fixed so that threads change nothing

// Runs work(context, thread) once on each of num_threads threads; returns when all are done.
struct Team {
  void* self;
  int num_threads;
  void (*run)(void* self, void (*work)(void* context, int thread), void* context);
};

struct VectorAt {
  int64_t offset;        // bytes from the start of the record, -1: the record has no such vector
  int64_t scale_offset;  // bytes to its fp32 scale, -1: none
};

struct FfnArgs {
  const float* x;           // [batch, ld], zero-padded copy
  int64_t ld;               // elements from one row of x to the next
  int64_t batch, hidden;    // B, D
  const uint8_t* arena;
  const int64_t* offsets;   // [num], bytes into the arena
  int64_t num;              // K
  const uint8_t* mask;      // [batch, num] or null: all
  const float* threshold;   // [num] or null: what a coefficient must reach to be counted in num_active
  VectorAt gate, up, down;
  Dtype dtype;
  Act act;
  float* coefficients;      // scratch [num, batch]
  int64_t* live;            // scratch [num]
  float* out;               // [batch, hidden], added to
  int64_t* num_active;      // written
};

struct SketchArgs {
  const float* x;              // [batch, hidden]
  int64_t batch, hidden, num;  // B, D, F
  const uint8_t* gate_codes;   // [num, (hidden + 1) / 2] or null
  const float* gate_scale;     // [num] or null
  const uint8_t* up_codes;
  const float* up_scale;
  const float* down_norm;  // [num]
  Act act;
  float* permuted;  // scratch [batch, hidden rounded up to kPad]
  int64_t ld;
  float* out;  // [batch, num]
};

// One matrix of sign planes (runtime/sketches.py, PlaneMatrix) and what is made of it for the tokens at hand.
struct Planes {
  const uint8_t* bits;    // [hidden], planes of each dimension
  const uint8_t* step;    // fp16 [hidden]
  const uint8_t* codes;   // [num, row_bytes], a bit a plane; null: there is no such matrix
  const uint8_t* scale;   // fp16 [num], times unit
  const uint8_t* bias;    // fp16 [num]
  int64_t row_bytes;
  float unit, noise;
  int64_t padded_planes;  // planes rounded up to kPlanePad
  int16_t* z;             // scratch [batch, padded_planes]: x times coefficient in units of z_scale, zero-padded
  int32_t* z_sum;         // scratch [batch]
  float* z_scale;         // scratch [batch]
};

struct PlaneArgs {
  const float* x;  // [batch, ld], zero-padded copy
  int64_t ld;
  int64_t batch, hidden, num;  // B, D, K
  Planes gate, up;
  const uint8_t* down_norm;  // fp16 [num], null when there is a gate
  Act act;
  float* out;  // [batch, num]
};

struct LinearArgs {
  const float* x;  // [batch, ld], zero-padded copy
  int64_t ld;
  int64_t batch, hidden, num;  // B, D, N
  const uint8_t* weight;       // [num, hidden] of dtype
  Dtype dtype;
  float* out;  // [batch, num]
};

struct AttentionArgs {
  const float* q;  // [num_heads, ld], zero-padded copy
  int64_t ld;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  const uint8_t *keys, *values;  // [num_blocks, block_size, num_kv_heads, head_dim]
  Dtype dtype;
  const int32_t* block_table;
  int64_t num_tokens;
  float scale;
  float* partial;  // scratch [units, num_heads, head_dim + 2]; units = num_tokens / kAttentionTokens, rounded up
  float* scores;   // scratch [num_threads, num_heads / num_kv_heads, kAttentionTokens]
  float* out;      // [num_heads, head_dim]
};

struct ReadArgs {
  const uint8_t* data;
  int64_t bytes;
  int64_t* sum;  // added to
};

struct RecordReadArgs {
  const uint8_t* data;
  const int64_t* offsets;  // [num], bytes into data
  int64_t num, bytes;      // of each record
  int64_t* sum;            // added to
};

struct KernelTable {
  const char* name;
  void (*ffn)(const FfnArgs&, const Team&);
  void (*sketch_scores)(const SketchArgs&, const Team&);
  void (*plane_scores)(const PlaneArgs&, const Team&);
  void (*linear)(const LinearArgs&, const Team&);
  void (*paged_attention)(const AttentionArgs&, const Team&);
  void (*read_through)(const ReadArgs&, const Team&);
  void (*read_records)(const RecordReadArgs&, const Team&);
};

extern const KernelTable generic_kernels;
extern const KernelTable avx2_kernels;    // x86 only
extern const KernelTable avx512_kernels;  // x86 only

}  // namespace coldstream
