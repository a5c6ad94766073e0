#include "runtime/moe_layer.h"

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"
#include "base/status.h"

namespace ballast {

DispatchTable::DispatchTable(const Placement& placement, int32_t rank, const ExpertStore& store,
                             DispatchTable* previous)
    : placement_(placement), layers_(static_cast<size_t>(placement.num_layers())) {
  for (int32_t l = 0; l < placement.num_layers(); ++l) {
    Layer& layer = layers_[l];
    const bool same =
        previous != nullptr &&
        std::ranges::equal(previous->placement_.expert_of_slot(l), placement.expert_of_slot(l));
    layer.splitter = same ? std::move(previous->layers_[l].splitter)
                          : std::make_unique<Splitter>(placement.hosts(l));
    layer.group_of_expert.assign(static_cast<size_t>(placement.num_experts()), -1);
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      if (!placement.Hosts(l, e, rank)) continue;
      const std::byte* parameters = store.Parameters(l, e);
      BALLAST_CHECK(parameters != nullptr);
      layer.group_of_expert[e] = static_cast<int32_t>(layer.parameters.size());
      layer.parameters.push_back(parameters);
      layer.blocks.push_back(store.BlockOf(l, e));
    }
  }
}

MoeExecutor::MoeExecutor(const Options& options, const KernelSet& kernels)
    : options_(options),
      kernels_(kernels),
      row_bytes_(static_cast<size_t>(options.hidden) * SizeOf(options.dtype)),
      histogram_(kNumTokenKinds * static_cast<size_t>(options.gate.num_experts)) {}

absl::StatusOr<std::unique_ptr<MoeExecutor>> MoeExecutor::Create(const Options& options,
                                                                 const KernelSet& kernels) {
  std::unique_ptr<MoeExecutor> executor(new MoeExecutor(options, kernels));
  // The gate is computed in fp32 whatever the activations are: a near-tie decides between experts.
  BALLAST_ASSIGN_OR_RETURN(
      executor->gate_matmul_,
      kernels.make_matmul(options.gate.num_experts, options.hidden, DType::kF32));
  BALLAST_ASSIGN_OR_RETURN(
      executor->expert_mlp_,
      GatedMlp::Create(kernels, options.hidden, options.expert_inter, options.dtype));
  return executor;
}

void MoeExecutor::Connect(Communicator* communicator) {
  comm_ = communicator;
  dispatch_.emplace(communicator);
  return_.emplace(communicator);
  const size_t ranks = static_cast<size_t>(communicator->size());
  gathered_.assign(histogram_.size() * ranks, 0);
  by_source_.assign(gathered_.size() / kNumTokenKinds, 0);
  send_bytes_.assign(ranks, 0);
  recv_bytes_.assign(ranks, 0);
  out_.assign(ranks, {});
  in_.assign(ranks, {});
}

absl::Status MoeExecutor::Run(DispatchTable* table, const Args& args) {
  BALLAST_RETURN_IF_ERROR(RunGate(args));
  BALLAST_RETURN_IF_ERROR(SplitBatch(table, args));
  BALLAST_RETURN_IF_ERROR(Dispatch(*table, args));
  if (args.while_waiting) BALLAST_RETURN_IF_ERROR(args.while_waiting());
  BALLAST_RETURN_IF_ERROR(dispatch_->Wait());
  BALLAST_RETURN_IF_ERROR(RunExperts(table->layer(args.layer)));
  return Return(table->epoch(), args);
}

absl::Status MoeExecutor::RunGate(const Args& args) {
  const size_t tokens = static_cast<size_t>(args.num_tokens);
  const size_t experts = static_cast<size_t>(options_.gate.num_experts);
  logits_.EnsureSize(RoundUp(tokens, kRowBlock) * experts * sizeof(float));
  if (tokens > 0) {
    BALLAST_RETURN_IF_ERROR(gate_matmul_->Run(args.x_f32, args.num_tokens, args.router.packed,
                                              logits_.as<float>(), nullptr));
  }
  ids_.resize(tokens * options_.gate.top_k);
  weights_.resize(ids_.size());
  return kernels_.gate({.rule = options_.gate,
                        .num_tokens = args.num_tokens,
                        .num_prefill = args.num_prefill,
                        .logits = {logits_.as<float>(), tokens * experts},
                        .bias = args.router.bias,
                        .ids = ids_,
                        .weights = weights_,
                        .histogram = histogram_},
                       nullptr);
}

void FoldCounts(std::span<const int32_t> gathered, size_t experts, std::span<int32_t> by_source,
                LayerCounts* out) {
  for (auto& counts : out->counts) counts.assign(experts, 0);
  int32_t* __restrict all_prefill = out->counts[TokenKind::kPrefill].data();
  int32_t* __restrict all_decode = out->counts[TokenKind::kDecode].data();
  for (size_t r = 0; r < by_source.size() / experts; ++r) {
    const int32_t* __restrict prefill = gathered.data() + r * kNumTokenKinds * experts;
    const int32_t* __restrict decode = prefill + experts;
    int32_t* __restrict sum = by_source.data() + r * experts;
    for (size_t e = 0; e < experts; ++e) {
      all_prefill[e] += prefill[e];
      all_decode[e] += decode[e];
      sum[e] = prefill[e] + decode[e];
    }
  }
}

uint64_t ChoiceHash(std::span<const int32_t> by_source, std::span<const int32_t> quota,
                    uint64_t before) {
  return Hash64(std::as_bytes(quota), Hash64(std::as_bytes(by_source), before));
}

absl::Status MoeExecutor::SplitBatch(DispatchTable* table, const Args& args) {
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(table->epoch(), std::as_bytes(std::span(histogram_)),
                                           std::as_writable_bytes(std::span(gathered_))));
  const size_t experts = static_cast<size_t>(options_.gate.num_experts);
  FoldCounts(gathered_, experts, by_source_, args.counts);
  Splitter& splitter = *table->layer(args.layer).splitter;
  splitter.Run(options_.split, by_source_, &split_);
  splitter.Cut(options_.split, by_source_, split_, comm_->rank(), &part_);
  choice_hash_ = ChoiceHash(by_source_, split_.quota, choice_hash_);
  args.counts->rank_load.assign(split_.rank_load.begin(), split_.rank_load.end());
  return absl::OkStatus();
}

absl::Status MoeExecutor::Dispatch(const DispatchTable& table, const Args& args) {
  const LayerHosts& hosts = table.placement().hosts(args.layer);
  BALLAST_RETURN_IF_ERROR(cpu::AssignCopies({.num_tokens = args.num_tokens,
                                             .top_k = options_.gate.top_k,
                                             .ids = ids_,
                                             .hosts = &hosts,
                                             .share = part_.send,
                                             .route = &route_},
                                            nullptr));
  for (size_t r = 0; r < out_.size(); ++r) {
    send_bytes_[r] = route_.message[r].num_copies > 0 ? route_.message[r].bytes(row_bytes_) : 0;
    out_[r] = dispatch_->SendBuffer(static_cast<int>(r), send_bytes_[r]);
    // The split says how many copies come from r; a row for each is the most that can come along.
    DispatchMessage most;
    most.num_copies = static_cast<uint32_t>(part_.receive[r]);
    most.num_rows = most.num_copies;
    recv_bytes_[r] = most.num_copies > 0 ? most.bytes(row_bytes_) : 0;
  }
  cpu::Pack({.num_tokens = args.num_tokens,
             .top_k = options_.gate.top_k,
             .ids = ids_,
             .route = &route_,
             .rows = {static_cast<const std::byte*>(args.x_act),
                      static_cast<size_t>(args.num_tokens) * row_bytes_},
             .row_bytes = row_bytes_,
             .out = out_},
            nullptr);
  return dispatch_->Post(table.epoch(), send_bytes_, recv_bytes_);
}

absl::Status MoeExecutor::RunExperts(const DispatchTable::Layer& layer) {
  for (size_t r = 0; r < in_.size(); ++r) in_[r] = dispatch_->Received(static_cast<int>(r));
  const int32_t num_groups = static_cast<int32_t>(layer.parameters.size());
  BALLAST_RETURN_IF_ERROR(cpu::Group({.received = in_,
                                      .group_of_expert = layer.group_of_expert,
                                      .num_groups = num_groups,
                                      .row_bytes = row_bytes_,
                                      .grouped = &grouped_,
                                      .x = &grouped_x_},
                                     nullptr));
  const size_t width = static_cast<size_t>(options_.hidden);
  grouped_y_.EnsureSize(static_cast<size_t>(grouped_.group_begin[num_groups]) * width *
                        sizeof(float));
  for (int32_t g = 0; g < num_groups; ++g) {
    if (grouped_.group_rows[g] == 0) continue;
    const size_t begin = static_cast<size_t>(grouped_.group_begin[g]);
    BALLAST_RETURN_IF_ERROR(expert_mlp_->Run(grouped_x_.data() + begin * row_bytes_,
                                             grouped_.group_rows[g], layer.parameters[g],
                                             grouped_y_.as<float>() + begin * width, nullptr));
  }
  return absl::OkStatus();
}

absl::Status MoeExecutor::Return(int64_t epoch, const Args& args) {
  for (size_t r = 0; r < out_.size(); ++r) {
    const size_t copies =
        static_cast<size_t>(grouped_.source_begin[r + 1] - grouped_.source_begin[r]);
    send_bytes_[r] = copies * row_bytes_;
    recv_bytes_[r] = route_.message[r].num_copies * row_bytes_;
    cpu::PackResults({.grouped = &grouped_,
                      .source = static_cast<int32_t>(r),
                      .y = grouped_y_.as<float>(),
                      .width = options_.hidden,
                      .type = options_.dtype,
                      .out = return_->SendBuffer(static_cast<int>(r), send_bytes_[r])},
                     nullptr);
  }
  BALLAST_RETURN_IF_ERROR(return_->Post(epoch, send_bytes_, recv_bytes_));
  BALLAST_RETURN_IF_ERROR(return_->Wait());
  for (size_t r = 0; r < in_.size(); ++r) {
    in_[r] = return_->Received(static_cast<int>(r));
    if (in_[r].size() != recv_bytes_[r]) {
      return absl::InternalError(absl::StrCat("combine: rank ", r, " returned ", in_[r].size(),
                                              " bytes, expected ", recv_bytes_[r]));
    }
  }
  cpu::Combine({.num_tokens = args.num_tokens,
                .top_k = options_.gate.top_k,
                .width = options_.hidden,
                .route = &route_,
                .weights = weights_,
                .returned = in_,
                .type = options_.dtype,
                .base = args.base,
                .out = args.y},
               nullptr);
  return absl::OkStatus();
}

}  // namespace ballast
