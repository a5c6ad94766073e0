#ifndef BALLAST_RUNTIME_IDS_CAPTURE_H_
#define BALLAST_RUNTIME_IDS_CAPTURE_H_

#include <cstdint>
#include <span>

#include "runtime/control_frames.h"

namespace ballast {

// Gathers what the gates of one rank choose in a step, for the leader's TraceRecorder:
// (Begin TakeLayer* frame)*. All ranks begin a recording in the same step, because its number
// travels in the step header; so each of them knows the numbers of all tokens.
// THREADS one (the step thread). Allocates when a batch is larger than all before.
class IdsCapture {
 public:
  // REQUIRES ids below 256^id_bytes; id_bytes is 1 or 2
  IdsCapture(int32_t rank, int32_t num_layers, int32_t top_k, int32_t id_bytes);

  // Opens a step. `recording` 0: none, and the step is not captured.
  // SHAPES rank_tokens [R] tokens of each rank in this step
  void Begin(uint32_t recording, std::span<const int32_t> rank_tokens);
  bool active() const { return routing().recording != 0; }
  // The choices of the next layer. SHAPES ids [tokens, top-k]
  void TakeLayer(std::span<const int32_t> ids);
  // The step's frame, when all layers were taken.
  const RankFrame& frame() const { return frame_; }

 private:
  RoutingFrame& routing() { return std::get<RoutingFrame>(frame_.body); }
  const RoutingFrame& routing() const { return std::get<RoutingFrame>(frame_.body); }

  const int32_t rank_, num_layers_, top_k_, id_bytes_;
  int32_t layer_ = 0;  // the next to be taken
  RankFrame frame_{RoutingFrame{}};
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_IDS_CAPTURE_H_
