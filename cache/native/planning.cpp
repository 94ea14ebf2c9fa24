#include "planning.h"

#include <algorithm>

namespace coldstream {

int64_t plan_reads(const PlanArgs& a, int64_t* total) {
  int64_t reads = 0, place = 0, end = 0;  // of the read at hand: its end in the file
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t start = a.starts[i];
    const int64_t begin = start / a.alignment * a.alignment;
    const int64_t last = (start + a.record_bytes + a.alignment - 1) / a.alignment * a.alignment;
    if (i == 0 || (start - a.starts[i - 1] - a.record_bytes > a.merge_gap && begin > end)) {
      if (i > 0) place += end - a.offsets[reads - 1];
      a.offsets[reads] = begin;
      a.arena_offsets[reads] = a.staging_offset + place;
      a.first_records[reads++] = i;
    }
    end = last;
    a.lengths[reads - 1] = end - a.offsets[reads - 1];
    a.record_offsets[i] = a.arena_offsets[reads - 1] - a.offsets[reads - 1] + start;
  }
  *total = a.count > 0 ? place + a.lengths[reads - 1] : 0;
  return reads;
}

void volume_of_absent(const VolumeArgs& a, int64_t* requests, int64_t* bytes) {
  const int64_t joins = std::max<int64_t>(a.merge_gap, 0);
  int64_t previous = -1, absent = 0, between = 0;
  *requests = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t id = a.ids != nullptr ? a.ids[i] : i;
    if (a.slot_of[id] >= 0) continue;
    const int64_t gap = (id - previous) * a.stride - a.record_bytes;
    const bool joined = previous >= 0 && gap <= joins;
    if (joined) between += gap;
    *requests += !joined;
    previous = id;
    ++absent;
  }
  *bytes = absent * a.record_bytes + between + *requests * a.alignment;
}

}  // namespace coldstream
