// The seam to torch's thread pool.
#pragma once

#include <cstdint>

namespace vlm {

int num_threads();
int thread_index();  // of the calling thread inside parallel_for, in [0, num_threads())

// fn(begin, end, context) over a split of [0, count); rethrows what fn throws.
void parallel_ranges(int64_t count, void (*fn)(int64_t, int64_t, void*), void* context);

// body(index, thread) for each index of [0, count), over torch's threads.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  parallel_ranges(
      count,
      [](int64_t begin, int64_t end, void* context) {
        const Body& body = *static_cast<const Body*>(context);
        const int thread = thread_index();
        for (int64_t i = begin; i < end; ++i) body(i, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace vlm
