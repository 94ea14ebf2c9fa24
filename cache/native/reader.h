// Reads ranges of one file into one arena, many at a time. Knows bytes; no Python, no neurons.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace coldstream {

enum class EngineKind { automatic, io_uring, pread, buffered };
enum class Fault { eio, short_read, eagain };  // injected by tests

struct Range {
  int64_t offset, length, arena_offset;
};

struct ReaderInfo {
  std::string engine;  // io_uring+direct, pread+direct, pread+buffered
  int64_t alignment;
  int64_t queue_depth;
  bool registered;
};

// What became of a ticket. `error` is empty when all its bytes arrived.
struct Outcome {
  int64_t num_bytes = 0, num_requests = 0;
  double seconds = 0;  // under way; no moment is counted for two tickets
  int64_t error_offset = 0, error_length = 0;
  std::string error;
};

// Every call may come from any thread, but one that waits holds up the others.
class Reader {
 public:
  virtual ~Reader() = default;  // waits for what is under way: nothing lands in the arena afterwards
  // `landing`: the part of the arena that reads land in, registered with the kernel where it can be.
  // Null and a reason when the file cannot be opened, or not in the way that was asked for.
  static std::unique_ptr<Reader> open(const std::string& path, uint8_t* arena, int64_t landing, int64_t landing_bytes,
                                      EngineKind kind, int64_t queue_depth, std::string* reason);

  virtual const ReaderInfo& info() const = 0;
  virtual int64_t submit(const Range* ranges, int64_t count) = 0;  // never blocks on the disk
  virtual std::optional<bool> done(int64_t ticket) = 0;     // nothing for a ticket that is not, or no longer, known
  virtual std::optional<Outcome> wait(int64_t ticket) = 0;  // likewise; forgets the ticket
  virtual void drain() = 0;                                 // waits for all tickets, keeps their outcomes
  // The nth completion from now (0: the next one) is changed so, and those after it, `times` in all.
  virtual void inject(Fault fault, int64_t nth, int64_t times) = 0;
};

}  // namespace coldstream
