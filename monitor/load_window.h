#ifndef BALLAST_MONITOR_LOAD_WINDOW_H_
#define BALLAST_MONITOR_LOAD_WINDOW_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace ballast {

// Imbalance of each layer over consecutive windows of whole steps. One batch of a few tokens is
// never balanced; a window of some thousand tokens says what a rank feels.
//
//   imbalance(layer) = max over ranks of load(layer, rank) / mean over ranks of load(layer, rank)
//
// THREADS one thread at a time. Allocates at construction only.
class LoadWindow {
 public:
  static constexpr int64_t kDefaultTokens = 4096;

  LoadWindow(int32_t num_layers, int32_t num_ranks, int64_t window_tokens = kDefaultTokens)
      : num_ranks_(num_ranks),
        window_tokens_(window_tokens),
        load_(static_cast<size_t>(num_layers) * num_ranks, 0),
        imbalance_(num_layers, 1.0) {}

  // SHAPES rank_load [num_ranks] copies per rank in this layer and step
  void Add(int32_t layer, std::span<const int64_t> rank_load) {
    int64_t* load = load_.data() + static_cast<size_t>(layer) * num_ranks_;
    for (int32_t r = 0; r < num_ranks_; ++r) load[r] += rank_load[r];
  }

  // Ends a step of `num_tokens` tokens over all ranks. Returns whether a window is complete:
  // imbalance() is then new.
  bool EndStep(int64_t num_tokens) {
    tokens_ += num_tokens;
    if (tokens_ < window_tokens_) return false;
    tokens_ = 0;
    for (size_t layer = 0; layer < imbalance_.size(); ++layer) {
      int64_t* load = load_.data() + layer * num_ranks_;
      int64_t largest = 0;
      int64_t total = 0;
      for (int32_t r = 0; r < num_ranks_; ++r) {
        largest = std::max(largest, load[r]);
        total += load[r];
        load[r] = 0;
      }
      imbalance_[layer] =
          total == 0 ? 1.0 : static_cast<double>(largest * num_ranks_) / static_cast<double>(total);
    }
    return true;
  }

  // [num_layers] of the last complete window; 1 before there is one.
  std::span<const double> imbalance() const { return imbalance_; }

 private:
  int32_t num_ranks_;
  int64_t window_tokens_;
  int64_t tokens_ = 0;
  std::vector<int64_t> load_;  // [num_layers * num_ranks]
  std::vector<double> imbalance_;
};

}  // namespace ballast

#endif  // BALLAST_MONITOR_LOAD_WINDOW_H_
