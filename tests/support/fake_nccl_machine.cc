#include "tests/support/fake_nccl_machine.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"

namespace ballast::testing::fake_nccl {

absl::Status Result(NcclResult result, const char* call, const std::string& text) {
  return NcclStatus(result, {call, "fake_nccl.cc", 1}, text);
}

namespace {

// What needs nobody else: a copy, or an event.
void Do(const Op& op) {
  if (op.event != nullptr) {
    --op.event->pending;
  } else {
    std::memcpy(op.parts[0].to, op.parts[0].from, op.parts[0].bytes);
  }
}

}  // namespace

Comm* FakeMachine::Join(const std::string& name, int size, int rank, int process) {
  Clique& clique = cliques_[name];
  clique.name = name;
  clique.members.resize(static_cast<size_t>(size));
  comms.push_back(std::make_unique<Comm>());
  Comm* const comm = comms.back().get();
  comm->process = process;
  comm->rank = rank;
  comm->clique = &clique;
  clique.members[static_cast<size_t>(rank)] = comm;
  ++clique.num_joined;
  Begin(
      comm, [&clique] { return clique.num_joined == clique.members.size(); },
      [this, &clique] { CheckDevices(clique); });
  return comm;
}

void FakeMachine::Begin(Comm* comm, std::function<bool()> ready, std::function<void()> finish) {
  comm->busy = true;
  comm->polls = polls_in_progress;
  comm->ready = std::move(ready);
  comm->finish = std::move(finish);
}

absl::Status FakeMachine::CheckReady(Comm* comm, const char* call) {
  if (comm == nullptr || comm->freed) {
    ++uses_after_free;
    return Result(NcclResult::kInvalidArgument, call, "the communicator is freed");
  }
  if (comm->error != NcclResult::kSuccess) return Result(comm->error, call, comm->error_text);
  if (!comm->busy) return absl::OkStatus();
  return Result(NcclResult::kInvalidArgument, call, "the last call has not settled");
}

Stream& FakeMachine::StreamOf(GpuStream handle) {
  for (const auto& stream : streams) {
    if (stream->handle == handle) return *stream;
  }
  streams.push_back(std::make_unique<Stream>(Stream{handle}));
  return *streams.back();
}

void FakeMachine::Put(GpuStream stream, std::shared_ptr<Op> op) {
  if (device.run == nullptr) {
    StreamOf(stream).ops.push_back(std::move(op));
  } else if (op->comm == nullptr) {
    device.run(stream, [op] { Do(*op); });
  } else {
    op->reached = false;
    device.run(stream, [op] { op->reached = true; });
    device.hold(stream, [op] { return op->done.load(); });
    StreamOf(stream).ops.push_back(std::move(op));
  }
}

bool FakeMachine::Running(const Comm* comm) const {
  for (const auto& stream : streams) {
    for (const auto& op : stream->ops) {
      if (op->comm == comm) return true;
    }
  }
  return false;
}

void FakeMachine::Drop(Comm* comm) {
  for (auto& stream : streams) {
    std::erase_if(stream->ops, [&](const auto& op) {
      if (op->comm == comm) op->done = true;
      return op->comm == comm;
    });
  }
  const auto is_of = [&](const Box::Entry& entry) { return entry.op->comm == comm; };
  for (auto& [pair, box] : comm->clique->boxes) {
    std::erase_if(box.sends, is_of);
    std::erase_if(box.recvs, is_of);
  }
  comm->busy = false;
  comm->error = NcclResult::kSuccess;
}

void FakeMachine::Post(const std::shared_ptr<Op>& op) {
  op->posted = true;
  op->open = op->parts.size();
  for (const Part& part : op->parts) {
    const int me = op->comm->rank;
    auto& boxes = op->comm->clique->boxes;
    if (part.is_send) {
      boxes[{me, part.peer}].sends.push_back({op, part});
    } else {
      boxes[{part.peer, me}].recvs.push_back({op, part});
    }
  }
}

// Lets messages meet; whether any did.
bool FakeMachine::Match(Clique& clique) {
  bool met = false;
  for (auto& [pair, box] : clique.boxes) {
    while (!box.sends.empty() && !box.recvs.empty()) {
      Box::Entry &send = box.sends.front(), &recv = box.recvs.front();
      if (send.part.bytes != recv.part.bytes) {
        for (Comm* comm : {send.op->comm, recv.op->comm}) {
          comm->error = NcclResult::kInvalidUsage;
          comm->error_text =
              absl::StrCat("rank ", pair.first, " sends ", send.part.bytes, " bytes and rank ",
                           pair.second, " receives ", recv.part.bytes);
        }
        break;
      }
      std::memcpy(recv.part.to, send.part.from, send.part.bytes);
      --send.op->open;
      --recv.op->open;
      box.sends.pop_front();
      box.recvs.pop_front();
      met = true;
    }
  }
  return met;
}

void FakeMachine::Advance() {
  if (device.advance != nullptr) device.advance();
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& stream : streams) {
      while (!stream->ops.empty()) {
        const std::shared_ptr<Op> op = stream->ops.front();
        if (!op->reached) break;
        if (op->comm != nullptr) {
          if (!op->posted) {
            Post(op);
            moved = true;
          }
          if (op->open > 0) break;
          op->done = true;
        } else {
          Do(*op);
        }
        stream->ops.pop_front();
        moved = true;
      }
    }
    for (auto& [name, clique] : cliques_) moved = Match(clique) || moved;
  }
}

void FakeMachine::CheckDevices(Clique& clique) {
  for (const Comm* a : clique.members) {
    for (const Comm* b : clique.members) {
      const GpuIdentity &first = gpus[static_cast<size_t>(a->process)],
                        &second = gpus[static_cast<size_t>(b->process)];
      if (a->rank >= b->rank || first.pci_bus_id != second.pci_bus_id ||
          first.host != second.host) {
        continue;
      }
      for (Comm* comm : clique.members) {
        comm->error = NcclResult::kInvalidUsage;
        comm->error_text = absl::StrCat("Duplicate GPU detected : rank ", a->rank, " and rank ",
                                        b->rank, " both on CUDA device ", first.pci_bus_id);
      }
    }
  }
}

}  // namespace ballast::testing::fake_nccl
