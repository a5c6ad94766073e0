#include "kernels/dispatch.h"

#include <cmath>
#include <cstring>

#include "base/status.h"
#include "kernels/matmul.h"

namespace ballast::cpu {
namespace {

using Entry = DispatchMessage::Entry;

// Reads and checks the counts of a received message.
absl::Status ReadMessage(std::span<const std::byte> bytes, size_t row_bytes, int source,
                         DispatchMessage* message) {
  if (bytes.empty()) return absl::OkStatus();
  if (bytes.size() >= DispatchMessage::kEntriesOffset) {
    std::memcpy(&message->num_rows, bytes.data(), 4);
    std::memcpy(&message->num_copies, bytes.data() + 4, 4);
    if (message->bytes(row_bytes) == bytes.size()) return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat("dispatch: the message of rank ", source, " has ",
                                          bytes.size(), " bytes, its counts (", message->num_rows,
                                          " rows, ", message->num_copies, " copies) need ",
                                          message->bytes(row_bytes)));
}

Entry EntryAt(std::span<const std::byte> bytes, uint32_t i) {
  Entry entry;
  std::memcpy(&entry, bytes.data() + DispatchMessage::kEntriesOffset + i * sizeof(Entry),
              sizeof(Entry));
  return entry;
}

// Rows of no bytes may be nowhere.
void CopyRow(const std::byte* from, std::byte* to, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

template <typename T>
void PackResultsTyped(const ReturnArgs& a) {
  T* out = reinterpret_cast<T*>(a.out.data());
  const Grouped& g = *a.grouped;
  for (int32_t i = g.source_begin[a.source]; i < g.source_begin[a.source + 1]; ++i) {
    const float* y = a.y + static_cast<size_t>(g.position[i]) * a.width;
    for (int j = 0; j < a.width; ++j) out[j] = FromFloat<T>(y[j]);
    out += a.width;
  }
}

template <typename T>
void CombineTyped(const CombineArgs& a) {
  for (int t = 0; t < a.num_tokens; ++t) {
    float* out = a.out + static_cast<size_t>(t) * a.width;
    const float* base = a.base + static_cast<size_t>(t) * a.width;
    for (int i = 0; i < a.width; ++i) out[i] = base[i];
    for (int k = 0; k < a.top_k; ++k) {
      const size_t copy = static_cast<size_t>(t) * a.top_k + k;
      const float weight = a.weights[copy];
      const T* row = reinterpret_cast<const T*>(a.returned[a.route->copy_rank[copy]].data()) +
                     static_cast<size_t>(a.route->copy_index[copy]) * a.width;
      for (int i = 0; i < a.width; ++i) out[i] = std::fma(weight, ToFloat(row[i]), out[i]);
    }
  }
}

}  // namespace

absl::Status AssignCopies(const RouteArgs& a, Stream) {
  const LayerHosts& hosts = *a.hosts;
  const size_t num_copies = static_cast<size_t>(a.num_tokens) * a.top_k;
  Route& route = *a.route;
  route.copy_rank.resize(num_copies);
  route.copy_index.resize(num_copies);
  route.message.assign(static_cast<size_t>(hosts.num_ranks), {});

  // Per expert: the host that takes the next copy, and how many more it takes.
  thread_local std::vector<int32_t> cursor, remaining, last_token;
  cursor.assign(hosts.host_offsets.begin(), hosts.host_offsets.end() - 1);
  remaining.resize(static_cast<size_t>(hosts.num_experts));
  for (int e = 0; e < hosts.num_experts; ++e) remaining[e] = a.share[cursor[e]];
  last_token.assign(static_cast<size_t>(hosts.num_ranks), -1);

  for (int t = 0; t < a.num_tokens; ++t) {
    for (int k = 0; k < a.top_k; ++k) {
      const size_t copy = static_cast<size_t>(t) * a.top_k + k;
      const int32_t e = a.ids[copy];
      while (remaining[e] == 0) {
        if (++cursor[e] >= hosts.host_offsets[e + 1]) {
          return absl::InvalidArgumentError(
              absl::StrCat("dispatch: the shares of expert ", e, " are fewer than its copies"));
        }
        remaining[e] = a.share[cursor[e]];
      }
      --remaining[e];
      const int32_t rank = hosts.host_rank[cursor[e]];
      DispatchMessage& message = route.message[rank];
      if (last_token[rank] != t) {
        last_token[rank] = t;
        ++message.num_rows;
      }
      route.copy_rank[copy] = rank;
      route.copy_index[copy] = static_cast<int32_t>(message.num_copies++);
    }
  }
  return absl::OkStatus();
}

void Pack(const PackArgs& a, Stream) {
  const Route& route = *a.route;
  const size_t num_ranks = route.message.size();
  thread_local std::vector<int32_t> last_token;
  thread_local std::vector<uint32_t> rows;
  last_token.assign(num_ranks, -1);
  rows.assign(num_ranks, 0);
  for (size_t r = 0; r < num_ranks; ++r) {
    if (route.message[r].num_copies == 0) continue;
    std::memcpy(a.out[r].data(), &route.message[r].num_rows, 4);
    std::memcpy(a.out[r].data() + 4, &route.message[r].num_copies, 4);
  }
  for (int t = 0; t < a.num_tokens; ++t) {
    for (int k = 0; k < a.top_k; ++k) {
      const size_t copy = static_cast<size_t>(t) * a.top_k + k;
      const int32_t rank = route.copy_rank[copy];
      std::byte* out = a.out[rank].data();
      if (last_token[rank] != t) {
        last_token[rank] = t;
        CopyRow(a.rows.data() + static_cast<size_t>(t) * a.row_bytes,
                out + route.message[rank].rows_offset() + rows[rank] * a.row_bytes, a.row_bytes);
        ++rows[rank];
      }
      const Entry entry{rows[rank] - 1, static_cast<uint32_t>(a.ids[copy])};
      std::memcpy(out + DispatchMessage::kEntriesOffset +
                      static_cast<size_t>(route.copy_index[copy]) * sizeof(Entry),
                  &entry, sizeof entry);
    }
  }
}

absl::Status Group(const GroupArgs& a, Stream) {
  Grouped& g = *a.grouped;
  const size_t num_sources = a.received.size();
  thread_local std::vector<DispatchMessage> messages;
  messages.assign(num_sources, {});
  g.group_rows.assign(static_cast<size_t>(a.num_groups), 0);
  g.source_begin.assign(num_sources + 1, 0);
  for (size_t s = 0; s < num_sources; ++s) {
    BALLAST_RETURN_IF_ERROR(
        ReadMessage(a.received[s], a.row_bytes, static_cast<int>(s), &messages[s]));
    g.source_begin[s + 1] = g.source_begin[s] + static_cast<int32_t>(messages[s].num_copies);
    for (uint32_t i = 0; i < messages[s].num_copies; ++i) {
      const Entry entry = EntryAt(a.received[s], i);
      if (entry.row >= messages[s].num_rows || entry.expert >= a.group_of_expert.size() ||
          a.group_of_expert[entry.expert] < 0) {
        return absl::InternalError(absl::StrCat("dispatch: rank ", s, " sent row ", entry.row,
                                                " of ", messages[s].num_rows, " for expert ",
                                                entry.expert, ", which is not here"));
      }
      ++g.group_rows[a.group_of_expert[entry.expert]];
    }
  }
  g.num_copies = g.source_begin[num_sources];
  g.group_begin.assign(static_cast<size_t>(a.num_groups) + 1, 0);
  for (int i = 0; i < a.num_groups; ++i) {
    g.group_begin[i + 1] =
        g.group_begin[i] + static_cast<int32_t>(RoundUp(g.group_rows[i], kRowBlock));
  }
  a.x->EnsureSize(static_cast<size_t>(g.group_begin[a.num_groups]) * a.row_bytes);

  thread_local std::vector<int32_t> next;
  next.assign(g.group_begin.begin(), g.group_begin.end() - 1);
  g.position.resize(static_cast<size_t>(g.num_copies));
  for (size_t s = 0; s < num_sources; ++s) {
    const std::byte* rows = a.received[s].data() + messages[s].rows_offset();
    for (uint32_t i = 0; i < messages[s].num_copies; ++i) {
      const Entry entry = EntryAt(a.received[s], i);
      const int32_t to = next[a.group_of_expert[entry.expert]]++;
      g.position[static_cast<size_t>(g.source_begin[s]) + i] = to;
      CopyRow(rows + entry.row * a.row_bytes, a.x->data() + static_cast<size_t>(to) * a.row_bytes,
              a.row_bytes);
    }
  }
  return absl::OkStatus();
}

void PackResults(const ReturnArgs& a, Stream) {
  if (a.type == DType::kF32) {
    PackResultsTyped<float>(a);
  } else {
    PackResultsTyped<BFloat16>(a);
  }
}

void Combine(const CombineArgs& a, Stream) {
  if (a.type == DType::kF32) {
    CombineTyped<float>(a);
  } else {
    CombineTyped<BFloat16>(a);
  }
}

}  // namespace ballast::cpu
