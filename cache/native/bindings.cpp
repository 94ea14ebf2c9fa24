// Python's view of the reader and of records: checks lengths and ranges, drops the GIL, calls the loops.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "planning.h"
#include "reader.h"
#include "records.h"

namespace nb = nanobind;
using namespace coldstream;

namespace {

using Arena = nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const int64_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32s = nb::ndarray<const int32_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Uint64s = nb::ndarray<const uint64_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

EngineKind engine_kind(const std::string& name) {
  if (name == "auto") return EngineKind::automatic;
  if (name == "io_uring") return EngineKind::io_uring;
  if (name == "pread") return EngineKind::pread;
  if (name == "buffered") return EngineKind::buffered;
  throw nb::value_error("engine: one of auto, io_uring, pread, buffered");
}

Fault fault_kind(const std::string& name) {
  if (name == "eio") return Fault::eio;
  if (name == "short") return Fault::short_read;
  if (name == "eagain") return Fault::eagain;
  throw nb::value_error("fault: one of eio, short, eagain");
}

class PyReader {
 public:
  PyReader(const std::string& path, Arena arena, int64_t landing, int64_t landing_bytes, const std::string& engine,
           int64_t queue_depth)
      : arena_(std::move(arena)) {
    const EngineKind kind = engine_kind(engine);
    if (queue_depth < 1 || queue_depth > 4096) throw nb::value_error("queue_depth: 1 to 4096");
    if (landing < 0 || landing_bytes < 0 || landing_bytes > size() || landing > size() - landing_bytes) {
      throw nb::value_error("landing lies outside of the arena");
    }
    std::string reason;
    reader_ = Reader::open(path, arena_.data(), landing, landing_bytes, kind, queue_depth, &reason);
    if (!reader_) throw std::runtime_error(reason);
    if (reinterpret_cast<uintptr_t>(arena_.data()) % static_cast<uintptr_t>(reader_->info().alignment)) {
      throw nb::value_error("the arena does not start at a multiple of the alignment");
    }
  }

  nb::tuple info() const {
    const ReaderInfo& i = open()->info();
    return nb::make_tuple(i.engine, i.alignment, i.queue_depth, i.registered);
  }

  int64_t submit(Int64s offsets, Int64s lengths, Int64s arena_offsets) {
    const std::shared_ptr<Reader> reader = open();
    const size_t count = offsets.shape(0);
    if (lengths.shape(0) != count || arena_offsets.shape(0) != count) {
      throw nb::value_error("offsets, lengths and arena_offsets differ in length");
    }
    std::vector<Range> ranges(count);
    for (size_t i = 0; i < count; ++i) {
      ranges[i] = {offsets.data()[i], lengths.data()[i], arena_offsets.data()[i]};
      check(ranges[i], reader->info().alignment);
    }
    nb::gil_scoped_release release;
    return reader->submit(ranges.data(), static_cast<int64_t>(count));
  }

  bool done(int64_t ticket) {
    const std::shared_ptr<Reader> reader = open();
    std::optional<bool> answer;
    {
      nb::gil_scoped_release release;
      answer = reader->done(ticket);
    }
    if (!answer) throw no_such_ticket();
    return *answer;
  }

  nb::tuple wait(int64_t ticket) {
    const std::shared_ptr<Reader> reader = open();
    std::optional<Outcome> o;
    {
      nb::gil_scoped_release release;
      o = reader->wait(ticket);
    }
    if (!o) throw no_such_ticket();
    return nb::make_tuple(o->num_bytes, o->num_requests, o->seconds, o->error, o->error_offset, o->error_length);
  }

  void drain() {
    const std::shared_ptr<Reader> reader = open();
    nb::gil_scoped_release release;
    reader->drain();
  }

  void close() {
    std::shared_ptr<Reader> closing = std::move(reader_);
    nb::gil_scoped_release release;
    if (closing) closing->drain();  // another thread may be in a call: the last one out closes the file
    closing.reset();
  }

  void inject(const std::string& fault, int64_t nth, int64_t times) { open()->inject(fault_kind(fault), nth, times); }

 private:
  int64_t size() const { return static_cast<int64_t>(arena_.shape(0)); }

  // Shared with whoever is in a call, which may last longer than the reader is open.
  std::shared_ptr<Reader> open() const {
    if (!reader_) throw std::runtime_error("the reader is closed");
    return reader_;
  }

  static nb::builtin_exception no_such_ticket() {
    return nb::key_error("no such ticket, or it was waited for already");
  }

  void check(const Range& r, int64_t alignment) const {
    if (r.offset < 0 || r.length <= 0 || r.offset % alignment || r.length % alignment || r.arena_offset % alignment) {
      throw nb::value_error("a range is empty, negative or not aligned");
    }
    if (r.length > std::numeric_limits<int64_t>::max() - r.offset) throw nb::value_error("a range ends beyond 2^63");
    if (r.arena_offset < 0 || r.length > size() || r.arena_offset > size() - r.length) {
      throw nb::index_error("a range ends outside of the arena");
    }
  }

  Arena arena_;  // keeps the memory alive for reads under way
  std::shared_ptr<Reader> reader_;
};

// The offsets, each checked to be that of `bytes` bytes within the arena. A copy: nobody changes it without the GIL.
std::vector<int64_t> checked(const Int64s& offsets, int64_t bytes, size_t arena_bytes) {
  std::vector<int64_t> copy(offsets.data(), offsets.data() + offsets.shape(0));
  for (const int64_t offset : copy) {
    if (!inside(offset, bytes, static_cast<int64_t>(arena_bytes))) {
      throw nb::index_error("a record lies outside of the arena");
    }
  }
  return copy;
}

void py_copy_records(Arena arena, Int64s from_offsets, Int64s to_offsets, int64_t num_bytes) {
  if (from_offsets.shape(0) != to_offsets.shape(0)) {
    throw nb::value_error("from_offsets and to_offsets differ in length");
  }
  if (num_bytes < 0) throw nb::value_error("num_bytes is negative");
  const std::vector<int64_t> from = checked(from_offsets, num_bytes, arena.shape(0));
  const std::vector<int64_t> to = checked(to_offsets, num_bytes, arena.shape(0));
  nb::gil_scoped_release release;
  copy_records(arena.data(), from.data(), to.data(), static_cast<int64_t>(from.size()), num_bytes);
}

int64_t py_first_bad_record(Bytes arena, Int64s offsets, int64_t checksum_offset, Uint64s weights, uint64_t seed) {
  const auto words = static_cast<int64_t>(weights.shape(0));
  if (checksum_offset != 8 * words) throw nb::value_error("weights: one for each 8 bytes before checksum_offset");
  const std::vector<int64_t> places = checked(offsets, checksum_offset + 8, arena.shape(0));
  const auto count = static_cast<int64_t>(places.size());
  nb::gil_scoped_release release;
  return first_bad_record(arena.data(), places.data(), count, weights.data(), words, seed);
}

// An int64 array of Python's own, its first `count` elements those of the vector.
nb::object to_numpy(std::vector<int64_t>&& values, size_t count) {
  auto* kept = new std::vector<int64_t>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(kept->data(), {count}, owner));
}

// (offsets, lengths, arena_offsets, record_offsets, first_records); None when they are more than staging_bytes.
nb::object py_plan_reads(Int64s starts, int64_t record_bytes, int64_t alignment, int64_t merge_gap,
                         int64_t staging_offset, int64_t staging_bytes) {
  if (alignment < 1 || record_bytes < 1) throw nb::value_error("alignment and record_bytes: at least 1");
  const size_t count = starts.shape(0);
  std::vector<int64_t> offsets(count), lengths(count), places(count), first(count), records(count);
  const PlanArgs args{starts.data(),  static_cast<int64_t>(count), record_bytes,  alignment,     merge_gap,
                      staging_offset, offsets.data(),              lengths.data(), places.data(), first.data(),
                      records.data()};
  int64_t total = 0;
  const auto reads = static_cast<size_t>(plan_reads(args, &total));
  if (total > staging_bytes) return nb::none();
  return nb::make_tuple(to_numpy(std::move(offsets), reads), to_numpy(std::move(lengths), reads),
                        to_numpy(std::move(places), reads), to_numpy(std::move(records), count),
                        to_numpy(std::move(first), reads));
}

// (requests, bytes) of the absent among `ids`, or among all.
nb::tuple py_volume_of_absent(Int32s slot_of, std::optional<Int32s> ids, int64_t stride, int64_t record_bytes,
                              int64_t alignment, int64_t merge_gap) {
  const auto num = static_cast<int64_t>(slot_of.shape(0));
  const int64_t count = ids ? static_cast<int64_t>(ids->shape(0)) : num;
  for (int64_t i = 0; ids && i < count; ++i) {
    if (ids->data()[i] < 0 || ids->data()[i] >= num) throw nb::index_error("there is no such neuron");
  }
  const VolumeArgs args{slot_of.data(), ids ? ids->data() : nullptr, num, count, stride, record_bytes, alignment,
                        merge_gap};
  int64_t requests = 0, bytes = 0;
  volume_of_absent(args, &requests, &bytes);
  return nb::make_tuple(requests, bytes);
}

}  // namespace

NB_MODULE(_reader, m) {
  nb::class_<PyReader>(m, "Reader")
      .def(nb::init<const std::string&, Arena, int64_t, int64_t, const std::string&, int64_t>(), nb::arg("path"),
           nb::arg("arena").noconvert(), nb::arg("landing"), nb::arg("landing_bytes"), nb::arg("engine"),
           nb::arg("queue_depth"))
      .def("info", &PyReader::info)
      .def("submit", &PyReader::submit, nb::arg("offsets").noconvert(), nb::arg("lengths").noconvert(),
           nb::arg("arena_offsets").noconvert())
      .def("done", &PyReader::done)
      .def("wait", &PyReader::wait)
      .def("drain", &PyReader::drain)
      .def("close", &PyReader::close)
      .def("inject", &PyReader::inject);
  m.def("plan_reads", &py_plan_reads, nb::arg("starts").noconvert(), nb::arg("record_bytes"), nb::arg("alignment"),
        nb::arg("merge_gap"), nb::arg("staging_offset"), nb::arg("staging_bytes"));
  m.def("volume_of_absent", &py_volume_of_absent, nb::arg("slot_of").noconvert(), nb::arg("ids").noconvert().none(),
        nb::arg("stride"), nb::arg("record_bytes"), nb::arg("alignment"), nb::arg("merge_gap"));
  m.def("copy_records", &py_copy_records, nb::arg("arena").noconvert(), nb::arg("from_offsets").noconvert(),
        nb::arg("to_offsets").noconvert(), nb::arg("num_bytes"));
  m.def("first_bad_record", &py_first_bad_record, nb::arg("arena").noconvert(), nb::arg("offsets").noconvert(),
        nb::arg("checksum_offset"), nb::arg("weights").noconvert(), nb::arg("seed"));
}
