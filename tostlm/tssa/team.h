// Who works on what: whole sequences a thread, or teams of threads that share a sequence by its heads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <new>
#include <omp.h>
#include <thread>
#include <vector>

#include "simd.h"

// Zeroed memory on a cache line's boundary.
template <class Element>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    const size_t bytes = (count * sizeof(Element) / 64 + 1) * 64;
    at_ = static_cast<Element*>(std::aligned_alloc(64, bytes));
    if (at_ == nullptr) throw std::bad_alloc();
    memset(at_, 0, bytes);
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Element*() const { return at_; }

 private:
  Element* at_;
};

// Where the threads of a team show each other their heads of a step's chunk: boards [H, CHUNK].
//
// Threads of a team are one chunk ahead with what they show, so that none waits for another that is about as fast. Who
// writes step i's board has seen all of step i - 2, and the slowest still reads that of i - 3: four boards.
class Meeting {
 public:
  Meeting(int64_t H, int size) : size_(H * CHUNK), boards_(4 * H * CHUNK), shown_(size) {}

  float* board(int64_t step) const { return boards_ + step % 4 * size_; }

  void show(int rank, int64_t step) { shown_[rank].steps.store(step + 1, std::memory_order_release); }

  void wait_for(int threads, int64_t step) const {
    if (threads == 1) return;
    for (int rank = 0; rank < threads; rank++)
      for (int tries = 0; shown_[rank].steps.load(std::memory_order_acquire) <= step; tries++)
        tries < 1000 ? pause_briefly() : std::this_thread::yield();  // the other may have no processor
    for (size_t i = 0; i < size_; i += LANES) prefetch(board(step) + i);  // from the others' caches
  }

 private:
  struct alignas(64) Shown {
    std::atomic<int64_t> steps{0};
  };

  size_t size_;
  Buffer<float> boards_;
  std::vector<Shown> shown_;
};

// One thread's part in a team.
struct Member {
  int rank, size;
  Meeting& meeting;

  int64_t first(int64_t of) const { return of * rank / size; }
  int64_t last(int64_t of) const { return of * (rank + 1) / size; }
  bool has(int64_t h, int64_t H) const { return first(H) <= h && h < last(H); }

  // show(i) for each step, and finish(i) after all members have shown theirs.
  template <class Show, class Finish>
  void walk(int64_t steps, const Show& show, const Finish& finish) {
    const int64_t lag = size > 1 ? 1 : 0;
    for (int64_t i = 0; i < steps + lag; i++) {
      if (i < steps) {
        show(i);
        meeting.show(rank, i);
      }
      if (i >= lag) {
        meeting.wait_for(size, i - lag);
        finish(i - lag);
      }
    }
  }
};

// body(sequence, member) for the `count` sequences from `first`, `size` threads each.
template <class Body>
void with_teams(int64_t first, int64_t count, int64_t H, int size, int threads, const Body& body) {
  std::deque<Meeting> meetings;
  for (int64_t b = 0; b < count; b++) meetings.emplace_back(H, size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int given = omp_get_num_threads();  // may be fewer than were asked for
    const int members = given >= count * size ? size : 1;
    const int thread = omp_get_thread_num();
    for (int64_t b = thread / members; b < count; b += std::max(1, given / members))
      body(first + b, Member{thread % members, members, meetings[b]});
  }
}

template <class Body>
void for_sequences(int64_t B, int64_t H, int threads, const Body& body) {
  const int64_t shared = B % threads, alone = B - shared;
  if (alone > 0) with_teams(0, alone, H, 1, threads, body);
  if (shared > 0) {
    const int size = static_cast<int>(std::min<int64_t>(H, threads / shared));
    with_teams(alone, shared, H, size, static_cast<int>(shared) * size, body);
  }
}
