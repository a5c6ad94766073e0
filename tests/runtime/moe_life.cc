#include "tests/runtime/moe_life.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

#include "base/block_checksum.h"
#include "base/random.h"
#include "base/status.h"
#include "runtime/moe_layer.h"
#include "runtime/rebalancer.h"
#include "runtime/step_protocol.h"
#include "tests/placement/random_instances.h"
#include "tests/support/flipping_transport.h"
#include "tests/support/run_ranks.h"

namespace ballast::testing {
namespace {

constexpr int32_t kPoolTokens = 40;  // batches are drawn from these
constexpr int64_t kLate = int64_t{1} << 62;
constexpr int64_t kMostStepsPerPlan = 2000;
constexpr int64_t kDeadlineMs = 60'000;

// What must become of a plan.
enum class Fate { kFlips, kWrongTarget, kWrongChecksum, kMayBeLate };

// One MoE layer: its parameters, the inputs of all tokens, and what one rank makes of them.
struct LayerData {
  RouterParameters router;
  std::vector<AlignedBuffer> packed;  // per expert
  std::vector<float> x, base, want;   // [pool, H]
  std::vector<int32_t> ids;           // [pool, K]
};

std::vector<float> Draw(size_t count, Random* random, double spread) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(spread * (2 * random->Uniform() - 1));
  return values;
}

absl::Status Expect(bool condition, const std::string& what) {
  return condition ? absl::OkStatus() : absl::InternalError(what);
}

// All that a seed says, the same for all ranks.
class Script {
 public:
  explicit Script(uint64_t seed, int64_t flips);
  // Makes the layers, with their outputs on one rank.
  absl::Status Prepare();

  int ranks() const { return initial->topology().num_ranks(); }
  // Pool numbers of the tokens of a rank in a step; the last `num_prefill` are prefill.
  std::vector<int32_t> Batch(int64_t step, int rank, int32_t* num_prefill) const;
  MigrationPlan Plan(const Placement& from, int64_t plan_id) const;
  Fate FateOf(const MigrationPlan& plan) const;
  // How many steps later than others a rank hears of a plan.
  int64_t Delay(int64_t plan_id, int rank) const { return For(5, plan_id, rank).Below(4); }

  uint64_t seed;
  int64_t flips = 0, least_steps = 1;
  MoeExecutor::Options options;
  const KernelSet* kernels = &PlainKernels();
  size_t chunk_bytes = 0, slice_bytes = 0;
  std::unique_ptr<Placement> initial;
  std::vector<LayerData> layers;

 private:
  Random For(uint64_t what, int64_t a, int64_t b) const {
    return Random(RandomBits(RandomBits(seed, what), static_cast<uint64_t>(a * 64 + b)));
  }
  std::vector<int32_t> ChangedRow(std::span<const int32_t> row, Random* random) const;
  absl::Status MakeLayer(Random* random, LayerData* layer);
};

Script::Script(uint64_t seed_in, int64_t flips_in) : seed(seed_in) {
  Random random = For(1, 0, 0);
  Topology topology = RandomTopology(&random, 8);
  const int32_t slots = topology.num_slots();
  const int32_t experts = 1 + static_cast<int32_t>(random.Below(std::min(slots, 16)));
  const int32_t num_layers = 1 + static_cast<int32_t>(random.Below(2));
  std::vector<int32_t> rows;
  for (int32_t l = 0; l < num_layers; ++l) {
    const auto row = RandomRow(&random, slots, experts);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  initial = std::make_unique<Placement>(
      *Placement::Create(num_layers, experts, std::move(topology), std::move(rows), 3));
  layers.resize(static_cast<size_t>(num_layers));

  GateRule rule{.num_experts = experts};
  if (experts % 2 == 0 && experts >= 4 && random.Below(2) == 0) rule.num_groups = 2;
  rule.top_k = 1 + static_cast<int32_t>(random.Below(std::min(experts / rule.num_groups, 6)));
  rule.renormalise = random.Below(2) == 0;
  rule.scale = random.Below(2) == 0 ? 1.0f : 2.5f;
  const bool bfloat16 = random.Below(3) == 0;
  options = {.gate = rule,
             .hidden = random.Below(2) == 0 ? 8 : 24,
             .expert_inter = 16,
             .dtype = bfloat16 ? DType::kBF16 : DType::kF32,
             .split = kAllSplitModes[seed % std::size(kAllSplitModes)]};
  const bool has_product = OneDnnKernels() != nullptr && (!bfloat16 || cpu::OneDnnHasBFloat16());
  if (has_product && random.Below(8) == 0) kernels = OneDnnKernels();

  flips = flips_in >= 0 ? flips_in : random.Below(4);
  least_steps = 1 + random.Below(3);
  chunk_bytes = size_t{256} << random.Below(6);
  slice_bytes = size_t{1} << (10 + random.Below(6));
}

std::vector<int32_t> Script::Batch(int64_t step, int rank, int32_t* num_prefill) const {
  Random random = For(2, step, rank);
  // Most steps are full, some have ranks without tokens, in some nobody has any.
  const uint32_t kind = For(3, step, 0).Below(8);
  const bool empty = kind == 0 || (kind < 4 && random.Below(2) == 0);
  std::vector<int32_t> tokens(empty ? 0 : random.Below(kind == 7 ? 40 : 9));
  for (int32_t& t : tokens) t = static_cast<int32_t>(random.Below(kPoolTokens));
  *num_prefill = static_cast<int32_t>(random.Below(static_cast<uint32_t>(tokens.size()) + 1));
  return tokens;
}

std::vector<int32_t> Script::ChangedRow(std::span<const int32_t> row, Random* random) const {
  const int32_t slots = static_cast<int32_t>(row.size());
  if (random->Below(3) == 0) return RandomRow(random, slots, initial->num_experts());
  std::vector<int32_t> changed(row.begin(), row.end());
  for (uint32_t i = random->Below(4); i < 8; ++i) {
    int32_t& slot = changed[random->Below(static_cast<uint32_t>(slots))];
    const uint32_t kind = random->Below(3);
    if (kind == 0) {
      std::swap(slot, changed[random->Below(static_cast<uint32_t>(slots))]);
    } else if (slot == kNoExpert || std::ranges::count(changed, slot) > 1) {
      const auto experts = static_cast<uint32_t>(initial->num_experts());
      slot = kind == 1 ? static_cast<int32_t>(random->Below(experts)) : kNoExpert;
    }
  }
  return changed;
}

MigrationPlan Script::Plan(const Placement& from, int64_t plan_id) const {
  Random random = For(4, plan_id, 0);
  std::vector<Placement::LayerRow> rows;
  for (int32_t l = 0; l < from.num_layers(); ++l) {
    if (random.Below(3) > 0) rows.push_back({l, ChangedRow(from.expert_of_slot(l), &random)});
  }
  MigrationPlan plan = *MakeMigrationPlan(from, std::move(rows), plan_id);
  if (FateOf(plan) == Fate::kWrongTarget) plan.target_fingerprint ^= 1;
  return plan;
}

Fate Script::FateOf(const MigrationPlan& plan) const {
  switch (For(6, plan.plan_id, 0).Below(12)) {
    case 0:
      return Fate::kWrongTarget;
    case 1:
      return plan.moves.empty() ? Fate::kFlips : Fate::kWrongChecksum;
    case 2:
      return Fate::kMayBeLate;
    default:
      return Fate::kFlips;
  }
}

// One rank.
class LifeRank {
 public:
  LifeRank(const Script& script, const Placement& initial, Transport* transport, Communicator* comm)
      : script_(script), comm_(comm), wire_(transport), initial_(initial) {}

  absl::Status Load();
  // Until the script ends.
  absl::Status Run();
  // One layer on some tokens of the pool, whose outputs are left in `y`.
  absl::Status Forward(int32_t layer, std::span<const int32_t> tokens, int32_t num_prefill);

  const std::vector<float>& y() const { return y_; }
  std::span<const int32_t> ids() const { return executor_->ids(); }
  const MoeLifeOutcome& outcome() const { return outcome_; }

 private:
  absl::Status TakePlan(int64_t step);
  absl::Status Open(int64_t step, int32_t num_tokens, int32_t num_prefill);
  absl::Status EndPlan(const Rebalancer::Outcome& ended);
  absl::Status CheckStore() const;
  void Compare(const LayerData& layer, std::span<const int32_t> tokens);
  absl::Status CheckCounts(const LayerData& layer, int64_t step) const;

  const Script& script_;
  Communicator* comm_;
  FlippingTransport wire_;
  const Placement& initial_;
  std::unique_ptr<MoeExecutor> executor_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<Rebalancer> rebalancer_;
  std::unique_ptr<StepProtocol> protocol_;
  std::unique_ptr<DispatchTable> table_;
  std::vector<StepHeader> headers_;
  StepProtocol::Opening opening_;
  MigrationPlan plan_;    // the last one issued
  int64_t issued_ = 0;    // step
  bool pending_ = false;  // it has not ended
  bool taken_ = true;     // it has reached this rank
  AlignedBuffer x_, act_;
  std::vector<float> base_, y_;
  LayerCounts counts_;
  MoeLifeOutcome outcome_;
};

absl::Status LifeRank::Load() {
  BALLAST_ASSIGN_OR_RETURN(executor_, MoeExecutor::Create(script_.options, *script_.kernels));
  executor_->Connect(comm_);
  const int32_t layers = initial_.num_layers();
  const int32_t slots = initial_.topology().slots_on(comm_->rank());
  int32_t most_slots = 0;
  for (int r = 0; r < comm_->size(); ++r) {
    most_slots = std::max(most_slots, initial_.topology().slots_on(r));
  }
  store_ = std::make_unique<ExpertStore>(
      ExpertStore::Options{.rank = comm_->rank(),
                           .num_layers = layers,
                           .num_experts = initial_.num_experts(),
                           .block_bytes = executor_->expert_mlp().packed_bytes(),
                           .resident_blocks = layers * slots,
                           .staging_blocks = layers * most_slots,
                           .chunk_bytes = script_.chunk_bytes},
      &wire_);
  for (int32_t l = 0; l < layers; ++l) {
    for (int32_t e = 0; e < initial_.num_experts(); ++e) {
      if (!initial_.Hosts(l, e, comm_->rank())) continue;
      const auto block = store_->Allocate(l, e);
      std::memcpy(block.data(), script_.layers[l].packed[e].data(), block.size());
      BALLAST_RETURN_IF_ERROR(store_->Seal(l, e));
    }
  }
  rebalancer_ = std::make_unique<Rebalancer>(
      Rebalancer::Options{
          .rank = comm_->rank(),
          .slice = {.slice_bytes = static_cast<int64_t>(script_.slice_bytes), .step_share = 1.0}},
      store_.get(), initial_, [this](const Placement& placement) {
        table_ = std::make_unique<DispatchTable>(placement, comm_->rank(), *store_, table_.get());
      });
  table_ = std::make_unique<DispatchTable>(initial_, comm_->rank(), *store_, nullptr);
  protocol_ = std::make_unique<StepProtocol>(comm_->rank(), 0, rebalancer_.get());
  headers_.resize(static_cast<size_t>(comm_->size()));
  return absl::OkStatus();
}

absl::Status LifeRank::Run() {
  outcome_.split = script_.options.split;
  const int64_t most_steps = kMostStepsPerPlan * (script_.flips + 1);
  for (int64_t step = 1; step <= most_steps; ++step) {
    BALLAST_RETURN_IF_ERROR(TakePlan(step));
    int32_t num_prefill = 0;
    const std::vector<int32_t> tokens = script_.Batch(step, comm_->rank(), &num_prefill);
    BALLAST_RETURN_IF_ERROR(Open(step, static_cast<int32_t>(tokens.size()), num_prefill));
    if (!opening_.run) rebalancer_->Slice(SliceOf::kRest);
    for (int32_t l = 0; opening_.run && l < initial_.num_layers(); ++l) {
      BALLAST_RETURN_IF_ERROR(Forward(l, tokens, num_prefill));
      Compare(script_.layers[l], tokens);
      BALLAST_RETURN_IF_ERROR(CheckCounts(script_.layers[l], step));
    }
    ++outcome_.steps;
    if (!pending_ && outcome_.flips == script_.flips && step >= script_.least_steps) {
      return absl::OkStatus();
    }
  }
  return absl::DeadlineExceededError(absl::StrCat("plan ", plan_.plan_id, " does not end"));
}

// All ranks issue the same plans at the same step; each hears of them when the script says.
absl::Status LifeRank::TakePlan(int64_t step) {
  if (!pending_ && outcome_.flips < script_.flips) {
    plan_ = script_.Plan(rebalancer_->placement(), plan_.plan_id + 1);
    issued_ = step;
    pending_ = true;
    taken_ = false;
  }
  if (taken_ || step < issued_ + script_.Delay(plan_.plan_id, comm_->rank())) {
    return absl::OkStatus();
  }
  taken_ = true;
  if (script_.FateOf(plan_) == Fate::kWrongChecksum && plan_.moves[0].from_rank == comm_->rank()) {
    wire_.FlipNext();
  }
  rebalancer_->OnPlan(plan_);
  return absl::OkStatus();
}

absl::Status LifeRank::Open(int64_t step, int32_t num_tokens, int32_t num_prefill) {
  const StepHeader mine = protocol_->Begin({.num_tokens = num_tokens,
                                            .num_prefill = num_prefill,
                                            .choice_hash = executor_->TakeChoiceHash()});
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(rebalancer_->placement().epoch(),
                                           std::as_bytes(std::span(&mine, 1)),
                                           std::as_writable_bytes(std::span(headers_))));
  const bool late = pending_ && script_.FateOf(plan_) == Fate::kMayBeLate && step > issued_ + 1;
  BALLAST_ASSIGN_OR_RETURN(opening_, protocol_->Open(headers_, late ? kLate : 0));
  return opening_.ended.has_value() ? EndPlan(*opening_.ended) : absl::OkStatus();
}

absl::Status LifeRank::EndPlan(const Rebalancer::Outcome& ended) {
  const bool flipped = ended.done == Command::kFlip;
  const Fate fate = script_.FateOf(plan_);
  const int64_t epoch = rebalancer_->placement().epoch();
  BALLAST_RETURN_IF_ERROR(Expect(pending_ && ended.plan_id == plan_.plan_id,
                                 absl::StrCat("plan ", ended.plan_id, " ended unasked")));
  BALLAST_RETURN_IF_ERROR(Expect(fate == Fate::kMayBeLate || flipped == (fate == Fate::kFlips),
                                 absl::StrCat("plan ", plan_.plan_id, " of fate ",
                                              static_cast<int>(fate), flipped ? " flipped" : "")));
  BALLAST_RETURN_IF_ERROR(Expect(epoch == plan_.base_epoch + (flipped ? 1 : 0),
                                 absl::StrCat("plan ", plan_.plan_id, " left epoch ", epoch)));
  (flipped ? outcome_.flips : outcome_.aborts) += 1;
  if (flipped) outcome_.copies += static_cast<int64_t>(plan_.moves.size());
  pending_ = false;
  return CheckStore();
}

// What the placement in force gives to this rank, byte for byte, and nothing else.
absl::Status LifeRank::CheckStore() const {
  const Placement& placement = rebalancer_->placement();
  for (int32_t l = 0; l < placement.num_layers(); ++l) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      const std::byte* block = store_->Parameters(l, e);
      const AlignedBuffer& packed = script_.layers[l].packed[e];
      const bool hosts = placement.Hosts(l, e, comm_->rank());
      const bool right =
          hosts == (block != nullptr) &&
          (!hosts || (std::memcmp(block, packed.data(), packed.size()) == 0 &&
                      store_->SealedChecksum(l, e) == BlockChecksum(packed.bytes())));
      BALLAST_RETURN_IF_ERROR(Expect(right, absl::StrCat("after plan ", plan_.plan_id, " layer ", l,
                                                         " expert ", e, " is not right")));
    }
  }
  return absl::OkStatus();
}

absl::Status LifeRank::Forward(int32_t layer, std::span<const int32_t> tokens,
                               int32_t num_prefill) {
  const LayerData& data = script_.layers[layer];
  const size_t h = static_cast<size_t>(script_.options.hidden);
  const size_t rows = RoundUp(tokens.size(), kRowBlock);
  x_.EnsureSize(rows * h * sizeof(float));
  act_.EnsureSize(rows * h * sizeof(float));
  base_.resize(tokens.size() * h);
  y_.resize(tokens.size() * h);
  for (size_t i = 0; i < base_.size(); ++i) {
    const size_t from = static_cast<size_t>(tokens[i / h]) * h + i % h;
    x_.as<float>()[i] = data.x[from];
    base_[i] = data.base[from];
    if (script_.options.dtype == DType::kF32) {
      act_.as<float>()[i] = data.x[from];
    } else {
      act_.as<BFloat16>()[i] = ToBFloat16(data.x[from]);
    }
  }
  return executor_->Run(table_.get(), {.layer = layer,
                                       .num_tokens = static_cast<int32_t>(tokens.size()),
                                       .num_prefill = num_prefill,
                                       .x_f32 = x_.as<float>(),
                                       .x_act = act_.data(),
                                       .router = data.router.view(),
                                       .while_waiting =
                                           [this] {
                                             rebalancer_->Slice(SliceOf::kStep);
                                             return absl::OkStatus();
                                           },
                                       .base = base_.data(),
                                       .y = y_.data(),
                                       .counts = &counts_});
}

void LifeRank::Compare(const LayerData& layer, std::span<const int32_t> tokens) {
  const size_t h = static_cast<size_t>(script_.options.hidden);
  for (size_t i = 0; i < y_.size(); ++i) {
    const float want = layer.want[static_cast<size_t>(tokens[i / h]) * h + i % h];
    outcome_.differing_bits +=
        std::popcount(std::bit_cast<uint32_t>(y_[i]) ^ std::bit_cast<uint32_t>(want));
  }
  outcome_.rows += static_cast<int64_t>(tokens.size());
}

// The counts are folded to logical experts: those of the tokens of all ranks, under any placement.
absl::Status LifeRank::CheckCounts(const LayerData& layer, int64_t step) const {
  const int32_t top_k = script_.options.gate.top_k;
  PerKind<std::vector<int32_t>> want;
  for (auto& counts : want) counts.assign(layer.packed.size(), 0);
  int64_t copies = 0, load = 0;
  for (int r = 0; r < comm_->size(); ++r) {
    int32_t num_prefill = 0;
    const std::vector<int32_t> tokens = script_.Batch(step, r, &num_prefill);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool prefill = i + static_cast<size_t>(num_prefill) >= tokens.size();
      auto& counts = want[prefill ? TokenKind::kPrefill : TokenKind::kDecode];
      for (int32_t k = 0; k < top_k; ++k) ++counts[layer.ids[tokens[i] * top_k + k]];
    }
    copies += static_cast<int64_t>(tokens.size()) * top_k;
  }
  for (const int64_t of_rank : counts_.rank_load) load += of_rank;
  return Expect(counts_.counts == want && load == copies,
                absl::StrCat("the counts of step ", step, " are not those of its tokens"));
}

absl::Status Script::MakeLayer(Random* random, LayerData* layer) {
  const size_t experts = static_cast<size_t>(options.gate.num_experts);
  const size_t h = static_cast<size_t>(options.hidden);
  const size_t f = static_cast<size_t>(options.expert_inter);
  BALLAST_ASSIGN_OR_RETURN(const auto executor, MoeExecutor::Create(options, *kernels));
  const std::vector<float> router = Draw(experts * h, random, 1.0);
  layer->router.packed = AlignedBuffer(executor->gate_matmul().packed_bytes());
  BALLAST_RETURN_IF_ERROR(
      executor->gate_matmul().Pack(router.data(), DType::kF32, layer->router.packed.data()));
  layer->router.bias = Draw(experts, random, 0.2);
  for (size_t e = 0; e < experts; ++e) {
    layer->packed.emplace_back(executor->expert_mlp().packed_bytes());
    const auto gate = Draw(f * h, random, 0.4), up = Draw(f * h, random, 0.4);
    const auto down = Draw(h * f, random, 0.4);
    BALLAST_RETURN_IF_ERROR(executor->expert_mlp().Pack(gate.data(), up.data(), down.data(),
                                                        DType::kF32, layer->packed.back().data()));
  }
  layer->x = Draw(kPoolTokens * h, random, 1.5);
  layer->base = Draw(kPoolTokens * h, random, 1.0);
  return absl::OkStatus();
}

absl::Status Script::Prepare() {
  Random random = For(7, 0, 0);
  for (LayerData& layer : layers) BALLAST_RETURN_IF_ERROR(MakeLayer(&random, &layer));
  const int32_t experts = options.gate.num_experts;
  BALLAST_ASSIGN_OR_RETURN(
      const Placement alone,
      Placement::Contiguous(initial->num_layers(), experts, Topology::Uniform(1, experts), false));
  std::vector<int32_t> all(kPoolTokens);
  for (int32_t t = 0; t < kPoolTokens; ++t) all[t] = t;
  const auto statuses = RunRanks(1, [&](Transport* transport, Communicator* comm, int) {
    LifeRank rank(*this, alone, transport, comm);
    BALLAST_RETURN_IF_ERROR(rank.Load());
    for (size_t l = 0; l < layers.size(); ++l) {
      BALLAST_RETURN_IF_ERROR(rank.Forward(static_cast<int32_t>(l), all, 0));
      layers[l].want = rank.y();
      layers[l].ids.assign(rank.ids().begin(), rank.ids().end());
    }
    return absl::OkStatus();
  });
  return statuses[0];
}

}  // namespace

MoeLifeOutcome LiveMoe(uint64_t seed, int64_t flips) {
  Script script(seed, flips);
  MoeLifeOutcome all;
  if (const absl::Status prepared = script.Prepare(); !prepared.ok()) {
    all.failure = std::string(prepared.message());
    return all;
  }
  std::vector<MoeLifeOutcome> outcomes(static_cast<size_t>(script.ranks()));
  const auto statuses = RunRanks(
      script.ranks(),
      [&](Transport* transport, Communicator* comm, int rank) {
        LifeRank self(script, *script.initial, transport, comm);
        absl::Status status = self.Load();
        if (status.ok()) status = self.Run();
        outcomes[static_cast<size_t>(rank)] = self.outcome();
        return status;
      },
      kDeadlineMs);
  all = outcomes[0];
  all.rows = all.differing_bits = 0;
  for (const MoeLifeOutcome& of_rank : outcomes) {
    all.rows += of_rank.rows;
    all.differing_bits += of_rank.differing_bits;
  }
  all.failure = FirstError(statuses);
  if (all.failure.empty() && all.differing_bits > 0) {
    all.failure = std::to_string(all.differing_bits) + " bits differ from those of one rank";
  }
  return all;
}

}  // namespace ballast::testing
