#include "comm/hierarchy.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {
namespace {

size_t At(int32_t index) {
  return static_cast<size_t>(index);
}

}  // namespace

Hierarchy::Hierarchy(std::span<const int32_t> node_of_rank, int rank) : rank_(rank) {
  const size_t ranks = node_of_rank.size();
  BALLAST_CHECK(rank >= 0 && At(rank) < ranks);
  std::vector<int32_t> given;  // the caller's number of each node
  for (size_t r = 0; r < ranks; ++r) {
    const auto found = std::find(given.begin(), given.end(), node_of_rank[r]);
    const size_t node = static_cast<size_t>(found - given.begin());
    if (found == given.end()) {
      given.push_back(node_of_rank[r]);
      ranks_of_node_.emplace_back();
    }
    node_of_rank_.push_back(static_cast<int32_t>(node));
    local_index_.push_back(static_cast<int32_t>(ranks_of_node_[node].size()));
    ranks_of_node_[node].push_back(static_cast<int32_t>(r));
  }
  const int own_node = node(rank);
  const auto& locals = ranks_of_node_[At(own_node)];
  sources_.resize(locals.size());
  size_t staged_sources = 0;
  for (int32_t source = 0; source < num_ranks(); ++source) {
    const int32_t holder = node(source) == own_node ? source : Proxy(source, own_node);
    sources_[At(local_index_[At(holder)])].push_back(source);
    if (holder == rank && source != rank) ++staged_sources;
  }
  send_offsets_.resize(ranks);
  staged_at_.resize(ranks);
  need_.resize(ranks);
  plan_.node_sends.reserve(ranks_of_node_.size());
  plan_.node_recvs.reserve(staged_sources);
  plan_.hand_sends.reserve((staged_sources + 1) * locals.size());
  plan_.hand_recvs.reserve(ranks);
  plan_.own_copies.reserve(staged_sources + 1);
}

int Hierarchy::Proxy(int rank, int node) const {
  const auto& there = ranks_of_node_[At(node)];
  return there[At(local_index_[At(rank)]) % there.size()];
}

void Hierarchy::SendOffsets(std::span<const size_t> send_bytes, std::span<size_t> offsets) const {
  size_t at = 0;
  for (const auto& there : ranks_of_node_) {
    for (const int32_t to : there) {
      offsets[At(to)] = at;
      at += send_bytes[At(to)];
    }
  }
}

size_t Hierarchy::NodeBytes(std::span<const size_t> pair_bytes, int from, int node) const {
  size_t bytes = 0;
  for (const int32_t to : ranks_of_node_[At(node)]) bytes += Bytes(pair_bytes, from, to);
  return bytes;
}

size_t Hierarchy::MostStagingBytes(std::span<const size_t> pair_bytes) {
  std::fill(need_.begin(), need_.end(), 0);
  for (int from = 0; from < num_ranks(); ++from) {
    for (int there = 0; there < num_nodes(); ++there) {
      if (there == node(from)) continue;
      need_[At(Proxy(from, there))] += NodeBytes(pair_bytes, from, there);
    }
  }
  return *std::max_element(need_.begin(), need_.end());
}

const Hierarchy::Plan& Hierarchy::MakePlan(std::span<const size_t> pair_bytes,
                                           std::span<const size_t> recv_offsets) {
  const size_t ranks = node_of_rank_.size();
  BALLAST_CHECK(pair_bytes.size() == ranks * ranks && recv_offsets.size() == ranks);
  plan_.node_sends.clear();
  plan_.node_recvs.clear();
  plan_.hand_sends.clear();
  plan_.hand_recvs.clear();
  plan_.own_copies.clear();
  SendOffsets(pair_bytes.subspan(At(rank_) * ranks, ranks), send_offsets_);
  PlanFirstRound(pair_bytes);
  PlanSecondRound(pair_bytes, recv_offsets);
  return plan_;
}

void Hierarchy::PlanFirstRound(std::span<const size_t> pair_bytes) {
  const int own_node = node(rank_);
  for (int there = 0; there < num_nodes(); ++there) {
    const size_t bytes = there == own_node ? 0 : NodeBytes(pair_bytes, rank_, there);
    if (bytes == 0) continue;
    const int32_t first = ranks_of_node_[At(there)].front();
    plan_.node_sends.push_back({Proxy(rank_, there), send_offsets_[At(first)], bytes});
  }
  size_t staged = 0;
  for (const int32_t source : sources_[At(local_index_[At(rank_)])]) {
    if (source == rank_) continue;
    staged_at_[At(source)] = staged;
    const size_t bytes = NodeBytes(pair_bytes, source, own_node);
    if (bytes == 0) continue;
    plan_.node_recvs.push_back({source, staged, bytes});
    staged += bytes;
  }
  plan_.staging_bytes = staged;
}

void Hierarchy::PlanSecondRound(std::span<const size_t> pair_bytes,
                                std::span<const size_t> recv_offsets) {
  const auto& locals = ranks_of_node_[At(node(rank_))];
  // By source first: within a pair of ranks the messages are then in the order of their sources,
  // and staged_at_ walks through what a source has sent, which is in the order of `locals`.
  for (const int32_t source : sources_[At(local_index_[At(rank_)])]) {
    const bool staged = source != rank_;
    for (const int32_t to : locals) {
      const size_t bytes = Bytes(pair_bytes, source, to);
      const size_t from = staged ? staged_at_[At(source)] : send_offsets_[At(to)];
      if (staged) staged_at_[At(source)] += bytes;
      if (bytes == 0) continue;
      if (to == rank_) {
        plan_.own_copies.push_back({staged, from, recv_offsets[At(source)], bytes});
      } else {
        plan_.hand_sends.push_back({to, staged, from, bytes});
      }
    }
  }
  for (size_t local = 0; local < locals.size(); ++local) {
    if (locals[local] == rank_) continue;
    for (const int32_t source : sources_[local]) {
      const size_t bytes = Bytes(pair_bytes, source, rank_);
      if (bytes == 0) continue;
      plan_.hand_recvs.push_back({locals[local], recv_offsets[At(source)], bytes});
    }
  }
}

}  // namespace ballast
