#include "uring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace coldstream {

namespace {

constexpr uint64_t kLargestBuffer = uint64_t{1} << 30;  // of one registered buffer, the kernel's limit

unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void store_release(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

template <typename T>
T* at(void* base, unsigned offset) {
  return reinterpret_cast<T*>(static_cast<uint8_t*>(base) + offset);
}

void* map(int fd, uint64_t bytes, uint64_t offset) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(offset));
  return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

std::unique_ptr<Uring> Uring::open(unsigned depth) {
  io_uring_params p{};
#ifdef IORING_SETUP_COOP_TASKRUN
  p.flags = IORING_SETUP_COOP_TASKRUN;  // completions wait until the next call: nobody is interrupted for one
#endif
  int fd = static_cast<int>(syscall(SYS_io_uring_setup, depth, &p));
  if (fd < 0 && errno == EINVAL) {  // Linux before 5.19
    p = io_uring_params{};
    fd = static_cast<int>(syscall(SYS_io_uring_setup, depth, &p));
  }
  if (fd < 0) return nullptr;
  std::unique_ptr<Uring> ring(new Uring());
  ring->fd_ = fd;
  ring->depth_ = p.sq_entries;
  const bool plain_reads = p.features & IORING_FEAT_RW_CUR_POS;  // came with IORING_OP_READ, in Linux 5.6
  ring->sq_ring_bytes_ = p.sq_off.array + p.sq_entries * sizeof(unsigned);
  ring->cq_ring_bytes_ = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
  ring->sq_ring_ = map(fd, ring->sq_ring_bytes_, IORING_OFF_SQ_RING);
  ring->cq_ring_ = map(fd, ring->cq_ring_bytes_, IORING_OFF_CQ_RING);
  ring->sqes_ = static_cast<io_uring_sqe*>(map(fd, p.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
  if (!ring->sq_ring_ || !ring->cq_ring_ || !ring->sqes_) return nullptr;
  ring->sq_head_ = at<unsigned>(ring->sq_ring_, p.sq_off.head);
  ring->sq_tail_ = at<unsigned>(ring->sq_ring_, p.sq_off.tail);
  ring->sq_array_ = at<unsigned>(ring->sq_ring_, p.sq_off.array);
  ring->sq_mask_ = *at<unsigned>(ring->sq_ring_, p.sq_off.ring_mask);
  ring->cq_head_ = at<unsigned>(ring->cq_ring_, p.cq_off.head);
  ring->cq_tail_ = at<unsigned>(ring->cq_ring_, p.cq_off.tail);
  ring->cq_mask_ = *at<unsigned>(ring->cq_ring_, p.cq_off.ring_mask);
  ring->cqes_ = at<io_uring_cqe>(ring->cq_ring_, p.cq_off.cqes);
  if (!plain_reads || !ring->works()) return nullptr;
  return ring;
}

// One read of no file, there and back: its error does not matter, only that the calls are allowed.
bool Uring::works() {
  uint64_t tag;
  int32_t result = 0;
  if (!push(-1, nullptr, 0, 0, 0)) return false;
  int error = enter(1);
  while (error == -EINTR) error = enter(1);
  return error == 0 && pop(&tag, &result);
}

Uring::~Uring() {
  if (sqes_) munmap(sqes_, depth_ * sizeof(io_uring_sqe));
  if (cq_ring_) munmap(cq_ring_, cq_ring_bytes_);
  if (sq_ring_) munmap(sq_ring_, sq_ring_bytes_);
  if (fd_ >= 0) ::close(fd_);
}

bool Uring::register_buffer(uint8_t* base, uint64_t size) {
  std::vector<iovec> pieces;
  for (uint64_t done = 0; done < size; done += kLargestBuffer) {
    pieces.push_back({base + done, size - done < kLargestBuffer ? size - done : kLargestBuffer});
  }
  const auto count = static_cast<unsigned>(pieces.size());
  if (syscall(SYS_io_uring_register, fd_, IORING_REGISTER_BUFFERS, pieces.data(), count) < 0) return false;
  buffers_ = std::move(pieces);
  return true;
}

int Uring::buffer_of(const uint8_t* to, uint32_t length) const {
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const auto* base = static_cast<const uint8_t*>(buffers_[i].iov_base);
    if (to >= base && to + length <= base + buffers_[i].iov_len) return static_cast<int>(i);
  }
  return -1;
}

bool Uring::push(int fd, uint8_t* to, uint32_t length, uint64_t offset, uint64_t tag) {
  const unsigned tail = *sq_tail_;
  if (tail - load_acquire(sq_head_) >= depth_) return false;
  const unsigned index = tail & sq_mask_;
  io_uring_sqe* sqe = &sqes_[index];
  std::memset(sqe, 0, sizeof *sqe);
  const int buffer = buffer_of(to, length);
  sqe->opcode = buffer < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED;
  sqe->fd = fd;
  sqe->addr = reinterpret_cast<uint64_t>(to);
  sqe->len = length;
  sqe->off = offset;
  sqe->user_data = tag;
  if (buffer >= 0) sqe->buf_index = static_cast<uint16_t>(buffer);
  sq_array_[index] = index;
  store_release(sq_tail_, tail + 1);
  ++to_submit_;
  return true;
}

int Uring::enter(unsigned min_complete) {
  const unsigned flags = min_complete ? IORING_ENTER_GETEVENTS : 0;
  const long n = syscall(SYS_io_uring_enter, fd_, to_submit_, min_complete, flags, nullptr, 0);
  if (n < 0) return -errno;
  to_submit_ -= static_cast<unsigned>(n);
  return 0;
}

bool Uring::pop(uint64_t* tag, int32_t* result) {
  const unsigned head = *cq_head_;
  if (head == load_acquire(cq_tail_)) return false;
  const io_uring_cqe* cqe = &cqes_[head & cq_mask_];
  *tag = cqe->user_data;
  *result = cqe->res;
  store_release(cq_head_, head + 1);
  return true;
}

}  // namespace coldstream
