// The policies that never move anything: the floor that every other one is measured against.
#include "placement/policy.h"

namespace ballast {
namespace {

// Leaves every layer as it started.
class StayPlanner : public LayerPlanner {
 public:
  void OnBatch(std::span<const int32_t>, TokenKind, float) override {}
  std::optional<std::vector<int32_t>> Plan(const Input&) override { return std::nullopt; }
  void Adopt(std::span<const int32_t>) override {}
};

class StayPolicy : public Policy {
 public:
  explicit StayPolicy(bool fills_spare) : fills_spare_(fills_spare) {}

  bool fills_spare_slots_at_start() const override { return fills_spare_; }
  PlacementRules rules_kept() const override { return {.coverage = 0, .node_local = true}; }
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext&, int32_t) const override {
    return std::make_unique<StayPlanner>();
  }

 private:
  bool fills_spare_;
};

template <bool kFillsSpare>
absl::StatusOr<std::unique_ptr<Policy>> Make(const std::string&) {
  return std::make_unique<StayPolicy>(kFillsSpare);
}

}  // namespace

std::vector<PolicyFamily> PoliciesIn_stay() {
  return {{"static", "", Make<false>}, {"never", "", Make<true>}};
}

}  // namespace ballast
