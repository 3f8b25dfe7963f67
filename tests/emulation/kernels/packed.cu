// The tiles of packed rows as attention finds them, by themselves.
#include "cuda/attention.cuh"

using vlm::cuda::PackedTile;

// Tiles are rows of first, count, begin, end, shift. Those of the keys are found if `both`.
extern "C" __attribute__((visibility("default"))) const char* find_packed_tiles(
    const int* query_offsets, const int* key_offsets, int segments, int queries, int keys,
    PackedTile* query_tiles, PackedTile* key_tiles, int both) {
  vlm::cuda::AttentionCall call;
  call.queries = queries;
  call.keys = keys;
  call.query_offsets = query_offsets;
  call.key_offsets = key_offsets;
  call.segments = segments;
  return vlm::cuda::find_packed_tiles(call, query_tiles, both ? key_tiles : nullptr);
}
