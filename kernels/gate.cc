#include "kernels/gate.h"

#include <cmath>
#include <limits>

#include "base/status.h"
#include "kernels/vector_math.h"

namespace ballast {

absl::Status CheckGate(const GateArgs& a) {
  const auto& r = a.rule;
  const size_t tokens = static_cast<size_t>(a.num_tokens);
  if (r.num_experts < 1 || r.num_experts > kMaxExperts || r.top_k < 1 || r.num_groups < 1 ||
      r.num_experts % r.num_groups != 0 || r.top_groups < 1 || r.top_groups > r.num_groups ||
      r.top_k > r.num_experts / r.num_groups * r.top_groups) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gate: ", r.num_experts, " experts in ", r.num_groups, " groups, top ", r.top_groups,
        " groups, top ", r.top_k, ": not a rule (at most ", kMaxExperts, " experts)"));
  }
  if (a.logits.size() != tokens * r.num_experts || a.ids.size() != tokens * r.top_k ||
      a.weights.size() != a.ids.size() ||
      a.histogram.size() != 2 * static_cast<size_t>(r.num_experts) || a.num_prefill < 0 ||
      a.num_prefill > a.num_tokens || (!a.margin.empty() && a.margin.size() != tokens) ||
      (!a.group_margin.empty() && a.group_margin.size() != tokens) ||
      (!a.bias.empty() && a.bias.size() != static_cast<size_t>(r.num_experts))) {
    return absl::InvalidArgumentError("gate: array sizes do not fit the rule");
  }
  return absl::OkStatus();
}

namespace cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// How far `best` is from `left`; infinities may be equal.
float Margin(float best, float left) {
  return best == left ? 0.0f : best - left;
}

// Marks all experts outside the best groups as taken: they are out even where choices run out.
// Returns the group margin.
float TakeOtherGroups(const GateRule& rule, const float* choice, bool* taken) {
  const int group_size = rule.num_experts / rule.num_groups;
  float group_score[kMaxExperts];
  for (int g = 0; g < rule.num_groups; ++g) {
    float best = kNever, second = kNever;
    for (int i = g * group_size; i < (g + 1) * group_size; ++i) {
      if (choice[i] > best) {
        second = best;
        best = choice[i];
      } else if (choice[i] > second) {
        second = choice[i];
      }
    }
    group_score[g] = group_size > 1 ? best + second : best;
  }
  float worst_in = kNever, best_out = kNever;
  for (int g = 0; g < rule.num_groups; ++g) {
    int better = 0;
    for (int h = 0; h < rule.num_groups; ++h) {
      if (group_score[h] > group_score[g] || (group_score[h] == group_score[g] && h < g)) ++better;
    }
    if (better == rule.top_groups - 1) worst_in = group_score[g];
    if (better == rule.top_groups) best_out = group_score[g];
    if (better < rule.top_groups) continue;
    for (int i = g * group_size; i < (g + 1) * group_size; ++i) taken[i] = true;
  }
  return rule.top_groups < rule.num_groups ? Margin(worst_in, best_out) : -kNever;
}

struct Margins {
  float expert, group;
};

Margins GateToken(const GateRule& rule, const float* logits, const float* bias, int32_t* ids,
                  float* weights, int32_t* histogram) {
  float score[kMaxExperts], choice[kMaxExperts];
  for (int e = 0; e < rule.num_experts; ++e) score[e] = Sigmoid(logits[e]);
  for (int e = 0; e < rule.num_experts; ++e) {
    const bool sound = !std::isnan(logits[e]);
    choice[e] = sound ? score[e] + (bias != nullptr ? bias[e] : 0.0f) : kNever;
    if (!sound) score[e] = 0.0f;
  }
  bool taken[kMaxExperts] = {};
  Margins margins = {-kNever, -kNever};
  if (rule.num_groups > 1) margins.group = TakeOtherGroups(rule, choice, taken);
  const auto best_left = [&] {
    int best = -1;
    for (int e = 0; e < rule.num_experts; ++e) {
      if (!taken[e] && (best < 0 || choice[e] > choice[best])) best = e;
    }
    return best;
  };

  float sum = 0.0f;
  for (int k = 0; k < rule.top_k; ++k) {
    const int best = best_left();
    taken[best] = true;
    ids[k] = best;
    weights[k] = score[best];
    sum += score[best];
    ++histogram[best];
  }
  const float factor = rule.scale / (rule.renormalise ? sum + 1e-20f : 1.0f);
  for (int k = 0; k < rule.top_k; ++k) weights[k] *= factor;
  const int left = best_left();
  if (left >= 0) margins.expert = Margin(choice[ids[rule.top_k - 1]], choice[left]);
  return margins;
}

}  // namespace

absl::Status Gate(const GateArgs& args, Stream) {
  BALLAST_RETURN_IF_ERROR(CheckGate(args));
  std::fill(args.histogram.begin(), args.histogram.end(), 0);
  const float* bias = args.bias.empty() ? nullptr : args.bias.data();
  int32_t* of_prefill = args.histogram.data();
  int32_t* of_others = of_prefill + args.rule.num_experts;
  for (int t = 0; t < args.num_tokens; ++t) {
    const Margins margins =
        GateToken(args.rule, args.logits.data() + static_cast<size_t>(t) * args.rule.num_experts,
                  bias, args.ids.data() + static_cast<size_t>(t) * args.rule.top_k,
                  args.weights.data() + static_cast<size_t>(t) * args.rule.top_k,
                  t < args.num_tokens - args.num_prefill ? of_others : of_prefill);
    if (!args.margin.empty()) args.margin[t] = margins.expert;
    if (!args.group_margin.empty()) args.group_margin[t] = margins.group;
  }
  return absl::OkStatus();
}

}  // namespace cpu
}  // namespace ballast
