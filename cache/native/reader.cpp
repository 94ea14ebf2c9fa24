#include "reader.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "uring.h"

namespace coldstream {

namespace {

constexpr int64_t kLargestRequest = 1 << 20;  // longer ranges are split: one device request is not much longer anyway
constexpr int64_t kDefaultAlignment = 4096;
constexpr int kMaxRetries = 1000;  // of one request, 0.1 s at least
constexpr std::chrono::microseconds kPause{100};  // before a retry: what was short must have time to come back
constexpr int64_t kMaxThreads = 32;  // half of them reach three quarters of io_uring's pace at 4 KiB, these 85 %
constexpr unsigned kPiece = 16;      // requests that are handed to the kernel by one call

using Clock = std::chrono::steady_clock;

struct Request {
  int64_t ticket, offset, length, arena_offset;
  int64_t done = 0;      // bytes that have arrived and need no other read
  int64_t stopped = -1;  // where the last short read ended
  int retries = 0;
};

struct Ticket {
  int64_t pending = 0;
  Clock::time_point start, end;
  Outcome outcome;
};

// The file: descriptor, size when opened, alignment. Owned by the reader.
struct File {
  int fd = -1;
  int64_t size = 0, alignment = kDefaultAlignment;
  bool direct = false;
  ~File() {
    if (fd >= 0) ::close(fd);
  }
};

int64_t direct_alignment(const std::string& path) {
#ifdef STATX_DIOALIGN
  struct statx s {};
  if (syscall(SYS_statx, AT_FDCWD, path.c_str(), 0, STATX_DIOALIGN, &s) == 0 && (s.stx_mask & STATX_DIOALIGN)) {
    return std::max<int64_t>(s.stx_dio_offset_align, s.stx_dio_mem_align);  // 0: the file has no direct I/O
  }
#else
  (void)path;
#endif
  return kDefaultAlignment;
}

bool open_direct(const std::string& path, File* file) {
  const int64_t alignment = direct_alignment(path);
  if (alignment <= 0 || alignment > kDefaultAlignment) return false;  // ZFS says 128 KiB: more than records are long
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (fd < 0) return false;
  void* probe = nullptr;  // some file systems accept the flag and refuse the read
  bool works = posix_memalign(&probe, 4096, static_cast<size_t>(std::max<int64_t>(alignment, 4096))) == 0;
  works = works && ::pread(fd, probe, static_cast<size_t>(alignment), 0) >= 0;
  std::free(probe);
  if (!works) {
    ::close(fd);
    return false;
  }
  file->fd = fd;
  file->alignment = alignment;
  file->direct = true;
  return true;
}

bool open_buffered(const std::string& path, File* file) {
  file->fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file->fd < 0) return false;
  posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);  // no read-ahead: what is read is what was asked for
  return true;
}

// What both engines share: tickets, splitting, and what a completion means.
class BaseReader : public Reader {
 public:
  BaseReader(std::unique_ptr<File> file, uint8_t* arena) : file_(std::move(file)), arena_(arena) {}
  const ReaderInfo& info() const override { return info_; }

  int64_t submit(const Range* ranges, int64_t count) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t id = next_ticket_++;
    Ticket& ticket = tickets_[id];
    ticket.start = ticket.end = Clock::now();
    for (int64_t i = 0; i < count; ++i) split(ranges[i], id, &ticket);
    start_locked();
    return id;
  }

  void inject(Fault fault, int64_t nth, int64_t times) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    fault_ = fault;
    fault_in_ = nth;
    fault_times_ = times;
  }

 protected:
  enum class Step { again, finished, settled };  // settled: and it was the last one of its ticket

  virtual void start_locked() = 0;

  void split(const Range& range, int64_t id, Ticket* ticket) {
    for (int64_t at = 0; at < range.length; at += kLargestRequest) {
      const int64_t length = std::min(kLargestRequest, range.length - at);
      waiting_.push_back({id, range.offset + at, length, range.arena_offset + at});
      ++ticket->pending;
      ++ticket->outcome.num_requests;
    }
  }

  // Bytes of the request that the file must have: all, unless it ends inside the request's last block.
  int64_t required(const Request& r) const {
    const int64_t missing = r.offset + r.length - file_->size;
    return missing > 0 && missing < file_->alignment ? r.length - missing : r.length;
  }

  // A result of the kernel (bytes or -errno) for a request that asked for its bytes from `done` on.
  Step complete(Request* r, int64_t result) {
    result = changed(result);
    if (result == -EAGAIN || result == -EINTR || result == -ECANCELED) {  // the last: the thread that submitted is gone
      if (++r->retries <= kMaxRetries) return Step::again;
    }
    if (result < 0) return fail(*r, std::strerror(static_cast<int>(-result)));
    const int64_t end = r->done + result;
    if (end >= required(*r)) return finish(*r, end);
    if (result == 0 || end == r->stopped) return fail(*r, end_of_file());  // twice at one place: nothing follows
    r->stopped = end;
    r->done = file_->direct ? end - end % file_->alignment : end;  // the rest must start at a block again
    if (++r->retries > kMaxRetries) return fail(*r, "too many short reads");
    return Step::again;
  }

  std::string end_of_file() const {
    struct stat s {};  // the size now: the file may have been cut since it was opened
    return "the file ends at byte " + std::to_string(fstat(file_->fd, &s) == 0 ? s.st_size : file_->size);
  }

  int64_t pending(int64_t id) const {
    const auto found = tickets_.find(id);
    return found == tickets_.end() ? 0 : found->second.pending;
  }

  std::optional<bool> peek(int64_t id) const {
    if (tickets_.count(id) == 0) return std::nullopt;
    return pending(id) == 0;
  }

  std::optional<Outcome> take(int64_t id) {
    const auto found = tickets_.find(id);
    if (found == tickets_.end()) return std::nullopt;
    Outcome outcome = std::move(found->second.outcome);
    const Clock::time_point start = std::max(found->second.start, counted_until_);
    outcome.seconds = std::max(0.0, std::chrono::duration<double>(found->second.end - start).count());
    counted_until_ = std::max(counted_until_, found->second.end);
    tickets_.erase(found);
    return outcome;
  }

  Step fail(const Request& r, const std::string& reason) {
    Ticket& ticket = tickets_[r.ticket];
    if (ticket.outcome.error.empty()) {
      ticket.outcome.error = reason;
      ticket.outcome.error_offset = r.offset;
      ticket.outcome.error_length = r.length;
    }
    return settle(&ticket);
  }

  std::unique_ptr<File> file_;
  uint8_t* arena_;
  ReaderInfo info_;
  mutable std::mutex mutex_;
  std::deque<Request> waiting_;
  std::unordered_map<int64_t, Ticket> tickets_;

 private:
  int64_t changed(int64_t result) {
    if (fault_times_ <= 0 || fault_in_-- > 0) return result;
    --fault_times_;
    if (fault_ == Fault::eio) return -EIO;
    if (fault_ == Fault::eagain) return -EAGAIN;
    return result > 0 ? result / 2 : result;
  }

  Step finish(const Request& r, int64_t num_bytes) {
    Ticket& ticket = tickets_[r.ticket];
    ticket.outcome.num_bytes += num_bytes;
    return settle(&ticket);
  }

  static Step settle(Ticket* ticket) {
    ticket->end = Clock::now();
    return --ticket->pending == 0 ? Step::settled : Step::finished;
  }

  Clock::time_point counted_until_{};
  int64_t next_ticket_ = 1;
  Fault fault_ = Fault::eio;
  int64_t fault_in_ = 0, fault_times_ = 0;
};

// io_uring: submit fills the queue, wait reaps it and keeps it full. No thread: the kernel is the other party.
class UringReader final : public BaseReader {
 public:
  UringReader(std::unique_ptr<File> file, uint8_t* arena, std::unique_ptr<Uring> ring, bool registered)
      : BaseReader(std::move(file), arena), ring_(std::move(ring)), flying_(ring_->depth()) {
    for (unsigned i = 0; i < ring_->depth(); ++i) free_.push_back(i);
    info_ = {"io_uring+direct", file_->alignment, static_cast<int64_t>(ring_->depth()), registered};
  }
  ~UringReader() override { drain(); }

  std::optional<bool> done(int64_t ticket) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (broken_.empty()) reap();
    start_locked();
    return peek(ticket);
  }

  std::optional<Outcome> wait(int64_t ticket) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (const int64_t left = pending(ticket)) turn(left);
    return take(ticket);
  }

  void drain() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (broken_.empty() && (in_flight() > 0 || !waiting_.empty())) turn(1);
  }

 protected:
  void start_locked() override {
    if (!broken_.empty()) return fail_waiting();
    fill();
    ring_->enter(0);  // a refusal is met again in wait
  }

 private:
  size_t in_flight() const { return flying_.size() - free_.size(); }

  // What waits goes into the queue, a few at a time: the device begins with the first while the next are written down.
  void fill() {
    unsigned written = 0;
    while (!waiting_.empty() && !free_.empty() && launch(free_.back(), waiting_.front())) {
      free_.pop_back();
      waiting_.pop_front();
      if (++written % kPiece == 0) ring_->enter(0);  // a refusal is met again in turn
    }
  }

  bool launch(unsigned index, const Request& r) {
    flying_[index] = r;
    const auto length = static_cast<uint32_t>(r.length - r.done);
    const auto offset = static_cast<uint64_t>(r.offset + r.done);
    return ring_->push(file_->fd, arena_ + r.arena_offset + r.done, length, offset, index);
  }

  // One round: fill the queue, wait for some completions, take what is there. `left`: requests to come that are waited
  // for. Each round is a system call: with more waiting than fits the queue it takes an eighth of it at a time, which
  // keeps the device busy; never more than are left, for others may lie behind them.
  void turn(int64_t left) {
    fill();
    const size_t wanted = waiting_.empty() ? in_flight() : std::max<size_t>(1, in_flight() / 8);
    const int error = ring_->enter(static_cast<unsigned>(std::min({wanted, static_cast<size_t>(left), in_flight()})));
    const bool moved = reap();
    if (error != 0 && error != -EINTR && error != -EAGAIN && error != -EBUSY) {
      give_up(error);
    } else if (!moved) {
      std::this_thread::sleep_for(kPause);  // the kernel is short of something (EAGAIN, EBUSY), or all is to be retried
    }
  }

  // Whether anything was finished.
  bool reap() {
    bool moved = false;
    uint64_t tag;
    int32_t result;
    while (ring_->pop(&tag, &result)) {
      Request& r = flying_[tag];
      if (complete(&r, result) == Step::again) {
        waiting_.push_front(r);
      } else {
        moved = true;
      }
      free_.push_back(static_cast<unsigned>(tag));
    }
    return moved;
  }

  // The kernel refuses the ring itself (a policy that came later, lost completions): whoever waits is told so, now and
  // from now on. What may still be under way lands where it was to land; its completion is not looked at.
  void give_up(int error) {
    broken_ = std::string("io_uring_enter: ") + std::strerror(-error);
    std::vector<bool> idle(flying_.size(), false);
    for (const unsigned index : free_) idle[index] = true;
    for (size_t i = 0; i < flying_.size(); ++i) {
      if (!idle[i]) fail(flying_[i], broken_);
    }
    fail_waiting();
  }

  void fail_waiting() {
    for (const Request& r : waiting_) fail(r, broken_);
    waiting_.clear();
  }

  std::unique_ptr<Uring> ring_;
  std::vector<Request> flying_;
  std::vector<unsigned> free_;
  std::string broken_;  // why the ring is of no use any more
};

// Threads that each read one request at a time: what is left where io_uring is denied.
class PreadReader final : public BaseReader {
 public:
  PreadReader(std::unique_ptr<File> file, uint8_t* arena, int64_t queue_depth) : BaseReader(std::move(file), arena) {
    start_threads(std::clamp<int64_t>(queue_depth / 2, 1, kMaxThreads));
    const auto count = static_cast<int64_t>(threads_.size());
    info_ = {file_->direct ? "pread+direct" : "pread+buffered", file_->alignment, count, false};
  }

  ~PreadReader() override {
    drain();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  std::optional<bool> done(int64_t ticket) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return peek(ticket);
  }

  std::optional<Outcome> wait(int64_t ticket) override {
    std::unique_lock<std::mutex> lock(mutex_);
    settled_.wait(lock, [&] { return pending(ticket) == 0; });
    return take(ticket);
  }

  void drain() override {
    std::unique_lock<std::mutex> lock(mutex_);
    settled_.wait(lock, [&] { return idle(); });
  }

 protected:
  void start_locked() override {
    const size_t useful = std::min(waiting_.size(), threads_.size());
    for (size_t i = 0; i < useful; ++i) work_.notify_one();
  }

 private:
  // Fewer than `count` where the system gives no more; std::system_error when it gives none.
  void start_threads(int64_t count) {
    threads_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        if (threads_.empty()) throw;
        return;
      }
    }
  }

  bool idle() const { return busy_ == 0 && waiting_.empty(); }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      Request r = waiting_.front();
      waiting_.pop_front();
      ++busy_;
      const Step step = carry_out(&r, &lock);
      --busy_;
      if (step == Step::settled || idle()) settled_.notify_all();
    }
  }

  Step carry_out(Request* r, std::unique_lock<std::mutex>* lock) {
    for (;;) {
      lock->unlock();
      if (r->retries > 0) std::this_thread::sleep_for(kPause);
      const int64_t result = read(*r);
      lock->lock();
      const Step step = complete(r, result);
      if (step != Step::again) return step;
    }
  }

  int64_t read(const Request& r) const {
    const int64_t offset = r.offset + r.done, length = r.length - r.done;
    const ssize_t n = ::pread(file_->fd, arena_ + r.arena_offset + r.done, static_cast<size_t>(length), offset);
    if (n < 0) return -errno;
    if (!file_->direct) posix_fadvise(file_->fd, offset, length, POSIX_FADV_DONTNEED);  // the budget counts page cache
    return n;
  }

  std::condition_variable work_, settled_;
  std::vector<std::thread> threads_;
  int64_t busy_ = 0;
  bool stop_ = false;
};

}  // namespace

std::unique_ptr<Reader> Reader::open(const std::string& path, uint8_t* arena, int64_t landing, int64_t landing_bytes,
                                     EngineKind kind, int64_t queue_depth, std::string* reason) {
  struct stat s {};
  if (stat(path.c_str(), &s) != 0 || access(path.c_str(), R_OK) != 0) {
    *reason = std::strerror(errno);
    return nullptr;
  }
  if (!S_ISREG(s.st_mode)) {
    *reason = "not a regular file";
    return nullptr;
  }
  auto file = std::make_unique<File>();
  const bool direct = kind != EngineKind::buffered && open_direct(path, file.get());
  if (!direct && (kind == EngineKind::io_uring || kind == EngineKind::pread)) {
    *reason = "cannot be opened with O_DIRECT";
    return nullptr;
  }
  if (!direct && !open_buffered(path, file.get())) {
    *reason = std::strerror(errno);
    return nullptr;
  }
  if (fstat(file->fd, &s) != 0) {
    *reason = std::strerror(errno);
    return nullptr;
  }
  file->size = s.st_size;
  if (direct && kind != EngineKind::pread) {
    std::unique_ptr<Uring> ring = Uring::open(static_cast<unsigned>(queue_depth));
    if (ring) {
      const auto bytes = static_cast<uint64_t>(landing_bytes);
      const bool registered = bytes > 0 && ring->register_buffer(arena + landing, bytes);
      return std::make_unique<UringReader>(std::move(file), arena, std::move(ring), registered);
    }
    if (kind == EngineKind::io_uring) {
      *reason = "io_uring is not available";
      return nullptr;
    }
  }
  return std::make_unique<PreadReader>(std::move(file), arena, queue_depth);
}

}  // namespace coldstream
