// A small io_uring: setup, submission, completion through raw system calls (no liburing to install).
// Knows rings and buffers; not what is read or who waits.
#pragma once

#include <linux/io_uring.h>
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace coldstream {

class Uring {
 public:
  // Null when the kernel or its policy (seccomp, sysctl) does not allow io_uring, or any of the calls that reading
  // needs, or lacks plain reads (Linux before 5.6): found here by doing it, since there is no way back later.
  static std::unique_ptr<Uring> open(unsigned depth);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  unsigned depth() const { return depth_; }
  // Registers [base, base + size) for reads without per-read page pinning; false when the kernel refuses (memlock).
  bool register_buffer(uint8_t* base, uint64_t size);
  // Puts one read into the queue; false when it is full. `tag` comes back with its completion.
  bool push(int fd, uint8_t* to, uint32_t length, uint64_t offset, uint64_t tag);
  // Hands what was pushed to the kernel and waits for at least `min_complete` completions. 0 or -errno.
  int enter(unsigned min_complete);
  // Takes one completion; false when there is none.
  bool pop(uint64_t* tag, int32_t* result);

 private:
  Uring() = default;
  bool works();
  int buffer_of(const uint8_t* to, uint32_t length) const;

  int fd_ = -1;
  unsigned depth_ = 0, to_submit_ = 0;
  void *sq_ring_ = nullptr, *cq_ring_ = nullptr;
  uint64_t sq_ring_bytes_ = 0, cq_ring_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr, sq_mask_ = 0;
  unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  std::vector<iovec> buffers_;
};

}  // namespace coldstream
