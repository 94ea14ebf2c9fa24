// What is done to many records of an arena at once: moving them, checking them. Knows bytes; no Python, no neurons.
#pragma once

#include <cstdint>

namespace coldstream {

// Whether `bytes` bytes from `offset` on lie within `size`.
inline bool inside(int64_t offset, int64_t bytes, int64_t size) {
  return offset >= 0 && bytes >= 0 && bytes <= size && offset <= size - bytes;
}

// Copies `bytes` bytes from each `from` to the `to` of the same index; every range lies within the arena. No
// destination may overlap a source or another destination of the same call.
void copy_records(uint8_t* arena, const int64_t* from, const int64_t* to, int64_t count, int64_t bytes);

// seed + sum of the words times their weights, modulo 2^64. `data` needs no alignment.
uint64_t checksum(const uint8_t* data, const uint64_t* weights, int64_t words, uint64_t seed);

// Index of the first record whose checksum over `words` words differs from the one stored behind them; -1: none.
int64_t first_bad_record(const uint8_t* arena, const int64_t* offsets, int64_t count, const uint64_t* weights,
                         int64_t words, uint64_t seed);

}  // namespace coldstream
