#ifndef BALLAST_COMM_HIERARCHY_H_
#define BALLAST_COMM_HIERARCHY_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace ballast {

// A variable exchange that crosses between nodes once per sender and node.
//
// What rank s has for the ranks of another node goes as one message to the *proxy* of s there: the
// rank of that node with the local index of s (modulo its number of ranks). A proxy keeps what it
// gets in staging memory. Then the ranks of a node hand out among themselves what they have, their
// own rows and those of the ranks they are proxies of. So a link between two nodes carries as many
// messages as a node has ranks, not that number squared, and all adapters of a node are used.
//
//   A  the nodes' ranks in ascending order; the local index of a rank is its place there
//   first round    s -> Proxy(s, B)       for each node B other than that of s
//   second round   p -> d                 rows from s to d, for p = s or p = Proxy(s, d's node)
//
// Everything here is offsets on the host; who moves the bytes is nccl_communicator.h.
//
// ORDER messages of a pair of ranks stand in the same order in the plans of both: by ascending s.
// THREADS one
class Hierarchy {
 public:
  // A message of `peer`, at `offset` of the buffer that it leaves or reaches.
  struct Message {
    int32_t peer;
    size_t offset;
    size_t bytes;
  };
  struct HandOut {
    int32_t peer;
    bool staged;  // `offset` is in staging memory, otherwise in the send buffer
    size_t offset;
    size_t bytes;
  };
  struct OwnCopy {
    bool staged;  // as in HandOut
    size_t from;
    size_t to;  // in the receive buffer
    size_t bytes;
  };
  // What one rank does, without empty messages.
  struct Plan {
    std::vector<Message> node_sends;  // first round, from the send buffer
    std::vector<Message> node_recvs;  // first round, to staging memory
    std::vector<HandOut> hand_sends;  // second round
    std::vector<Message> hand_recvs;  // second round, to the receive buffer
    std::vector<OwnCopy> own_copies;  // second round
    size_t staging_bytes = 0;         // that this rank needs
  };

  // SHAPES node_of_rank [R], any numbers: equal means the same node
  Hierarchy(std::span<const int32_t> node_of_rank, int rank);

  int num_ranks() const { return static_cast<int>(node_of_rank_.size()); }
  int num_nodes() const { return static_cast<int>(ranks_of_node_.size()); }
  // Node of a rank: nodes are numbered by their lowest rank.
  int node(int rank) const { return node_of_rank_[static_cast<size_t>(rank)]; }
  // The rank of `node` that takes what `rank` sends there.
  int Proxy(int rank, int node) const;

  // Where what goes to each rank stands in the send buffer: by node, then by rank, without gaps.
  // (Nodes of consecutive ranks: by rank.)
  // SHAPES send_bytes, offsets [R]
  void SendOffsets(std::span<const size_t> send_bytes, std::span<size_t> offsets) const;

  // Most staging memory that any rank needs: the same number on every rank.
  // SHAPES pair_bytes [R, R]: from the row's rank to the column's
  size_t MostStagingBytes(std::span<const size_t> pair_bytes);

  // What this rank does. The plan is valid until the next call; nothing is allocated.
  // SHAPES pair_bytes as above   recv_offsets [R]: where what comes from each rank goes
  const Plan& MakePlan(std::span<const size_t> pair_bytes, std::span<const size_t> recv_offsets);

 private:
  size_t Bytes(std::span<const size_t> pair_bytes, int from, int to) const {
    return pair_bytes[static_cast<size_t>(from) * node_of_rank_.size() + static_cast<size_t>(to)];
  }
  size_t NodeBytes(std::span<const size_t> pair_bytes, int from, int node) const;
  void PlanFirstRound(std::span<const size_t> pair_bytes);
  void PlanSecondRound(std::span<const size_t> pair_bytes, std::span<const size_t> recv_offsets);

  int rank_;
  std::vector<int32_t> node_of_rank_;                // [R]
  std::vector<int32_t> local_index_;                 // [R]
  std::vector<std::vector<int32_t>> ranks_of_node_;  // ascending
  // For each rank of this node, by local index: itself and those it is a proxy of, ascending.
  std::vector<std::vector<int32_t>> sources_;
  std::vector<size_t> send_offsets_;  // [R] of this exchange
  std::vector<size_t> staged_at_;     // [R] where in staging memory what comes from a rank begins
  std::vector<size_t> need_;          // [R] staging memory per rank
  Plan plan_;
};

}  // namespace ballast

#endif  // BALLAST_COMM_HIERARCHY_H_
