// Which aligned reads bring some records of a file: as `cache.reader.plan_reads` says, in one pass. Knows bytes only.
#pragma once

#include <cstdint>

namespace coldstream {

struct PlanArgs {
  const int64_t* starts;  // [count] ascending
  int64_t count, record_bytes, alignment, merge_gap, staging_offset;
  int64_t *offsets, *lengths, *arena_offsets, *first_records;  // room for `count` each
  int64_t* record_offsets;                                     // [count]
};

// The number of reads; their bytes in `total`.
int64_t plan_reads(const PlanArgs& a, int64_t* total);

struct VolumeArgs {
  const int32_t* slot_of;  // [num], -1: absent
  const int32_t* ids;      // [count] ascending, null: all `num`
  int64_t num, count, stride, record_bytes, alignment, merge_gap;
};

// Requests and bytes that reading the absent ones would take, as `cache.reader.volume` estimates.
void volume_of_absent(const VolumeArgs& a, int64_t* requests, int64_t* bytes);

}  // namespace coldstream
