// The seam to torch's thread pool.
#pragma once

#include <cstdint>

namespace vlm {

int num_threads();
int thread_index();  // of the calling thread inside parallel_for, in [0, num_threads())

// fn(context) once on each of `count` threads at most; rethrows what fn throws.
void on_threads(int64_t count, void (*fn)(void*), void* context);

// body(index, thread) for each index of [0, count), over torch's threads. A thread takes the next
// index when it is free, since cores are rarely equally fast.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  struct Queue {
    const Body& body;
    int64_t count, next;
  } queue{body, count, 0};
  on_threads(
      count,
      [](void* context) {
        Queue& queue = *static_cast<Queue*>(context);
        const int thread = thread_index();
        int64_t i;
        while ((i = __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED)) < queue.count) {
          queue.body(i, thread);
        }
      },
      &queue);
}

}  // namespace vlm
