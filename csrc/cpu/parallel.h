// The seam to torch's thread pool.
#pragma once

#include <cstdint>

namespace vlm {

int num_threads();
int thread_index();  // of the calling thread inside parallel_for, in [0, num_threads())

// fn(context) once on each of `count` threads at most; rethrows what fn throws.
void on_threads(int64_t count, void (*fn)(void*), void* context);

// body(index, thread) for each index of [0, count), over torch's threads. Each begins with its own
// share, so that it meets the same data again in the next loop, and then helps the others with
// theirs, since cores are rarely equally fast.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  constexpr int kMostShares = 64;
  struct Queue {
    const Body& body;
    int64_t count;
    int shares;
    int64_t taken[kMostShares];  // of each share
  } queue{body, count, num_threads(), {}};
  if (queue.shares > kMostShares) queue.shares = kMostShares;
  on_threads(
      count,
      [](void* context) {
        Queue& q = *static_cast<Queue*>(context);
        const int thread = thread_index();
        for (int k = 0; k < q.shares; ++k) {
          const int share = (thread + k) % q.shares;
          const int64_t begin = q.count * share / q.shares, end = q.count * (share + 1) / q.shares;
          int64_t i;
          while ((i = begin + __atomic_fetch_add(&q.taken[share], 1, __ATOMIC_RELAXED)) < end) {
            q.body(i, thread);
          }
        }
      },
      &queue);
}

}  // namespace vlm
