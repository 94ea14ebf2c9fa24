#include "records.h"

#include <cstring>

namespace coldstream {

namespace {

uint64_t word_at(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);  // one load, aligned or not
  return word;
}

}  // namespace

void copy_records(uint8_t* arena, const int64_t* from, const int64_t* to, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(arena + to[i], arena + from[i], static_cast<size_t>(bytes));
}

uint64_t checksum(const uint8_t* data, const uint64_t* weights, int64_t words, uint64_t seed) {
  uint64_t a = seed, b = 0, c = 0, d = 0;  // four sums, so that no addition waits for the one before
  int64_t i = 0;
  for (; i + 4 <= words; i += 4) {
    const uint8_t* p = data + 8 * i;
    a += word_at(p) * weights[i];
    b += word_at(p + 8) * weights[i + 1];
    c += word_at(p + 16) * weights[i + 2];
    d += word_at(p + 24) * weights[i + 3];
  }
  for (; i < words; ++i) a += word_at(data + 8 * i) * weights[i];
  return a + b + c + d;
}

int64_t first_bad_record(const uint8_t* arena, const int64_t* offsets, int64_t count, const uint64_t* weights,
                         int64_t words, uint64_t seed) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* record = arena + offsets[i];
    if (checksum(record, weights, words, seed) != word_at(record + 8 * words)) return i;
  }
  return -1;
}

}  // namespace coldstream
