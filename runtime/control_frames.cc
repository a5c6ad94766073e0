#include "runtime/control_frames.h"

#include <utility>

#include "base/bytes.h"
#include "base/status.h"

namespace ballast {
namespace {

enum class FrameKind : uint8_t {
  kSubmit,
  kCancel,
  kWake,
  kPlan,
  kStop,
  kEvents,
  kRankStatus,
  kRouting,
  kHalt,
  kResume,
  kHalted,
  kTrouble,
  kVerify,
  kVerified
};

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};

absl::Status Malformed(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("control frame: malformed ", what));
}

// A list is its length and its items, each as `put` or `get` has it.
template <class T, class Put>
void PutList(const std::vector<T>& list, ByteWriter& out, Put put) {
  out.Put(static_cast<uint32_t>(list.size()));
  for (const T& item : list) put(item);
}

template <class T, class Get>
std::vector<T> GetList(ByteReader& in, Get get) {
  std::vector<T> list;
  const auto count = in.Get<uint32_t>();
  // The count is not believed: the loop ends with the bytes.
  for (uint32_t i = 0; i < count && in.ok(); ++i) list.push_back(get());
  return list;
}

void PutRequest(const GenerationRequest& request, ByteWriter& out) {
  out.Put(request.id);
  out.PutArray(request.prompt);
  out.PutArray(request.generated);
  out.Put(request.max_tokens);
  out.Put(request.sampling.temperature);
  out.Put(request.sampling.top_p);
  out.Put(request.sampling.seed);
}

GenerationRequest GetRequest(ByteReader& in) {
  GenerationRequest request;
  request.id = in.Get<uint64_t>();
  request.prompt = in.GetArray<int32_t>();
  request.generated = in.GetArray<int32_t>();
  request.max_tokens = in.Get<int32_t>();
  request.sampling.temperature = in.Get<double>();
  request.sampling.top_p = in.Get<double>();
  request.sampling.seed = in.Get<uint64_t>();
  return request;
}

void PutEvents(const EventsFrame& frame, ByteWriter& out) {
  PutList(frame.events, out, [&](const TokenEvent& event) {
    out.Put(event.request_id);
    out.Put(event.token);
    out.Put(event.finish);
    out.Put(event.index);
  });
}

absl::StatusOr<EventsFrame> GetEvents(ByteReader& in) {
  EventsFrame frame;
  bool known = true;
  frame.events = GetList<TokenEvent>(in, [&] {
    TokenEvent event;
    event.request_id = in.Get<uint64_t>();
    event.token = in.Get<int32_t>();
    const auto finish = in.Get<uint8_t>();
    known &= finish <= static_cast<uint8_t>(FinishReason::kFailed);
    event.finish = static_cast<FinishReason>(finish);
    event.index = in.Get<int32_t>();
    return event;
  });
  if (!known) return Malformed("finish reason");
  return frame;
}

void PutResume(const ResumeFrame& frame, ByteWriter& out) {
  out.Put(frame.generation);
  PutList(frame.members, out, [&](const ResumeFrame::Member& member) {
    out.Put(member.rank);
    out.Put(member.old_rank);
    out.Put(member.slots);
    out.Put(member.node);
  });
  out.Put(frame.commit_plan_id);
  out.Put(frame.step);
  out.Put(frame.epoch);
  out.PutArray(frame.placement);
}

ResumeFrame GetResume(ByteReader& in) {
  ResumeFrame frame;
  frame.generation = in.Get<int64_t>();
  frame.members = GetList<ResumeFrame::Member>(in, [&] {
    ResumeFrame::Member member;
    member.rank = in.Get<int32_t>();
    member.old_rank = in.Get<int32_t>();
    member.slots = in.Get<int32_t>();
    member.node = in.Get<int32_t>();
    return member;
  });
  frame.commit_plan_id = in.Get<int64_t>();
  frame.step = in.Get<int64_t>();
  frame.epoch = in.Get<int64_t>();
  frame.placement = in.GetArray<std::byte>();
  return frame;
}

void PutVerified(const VerifiedFrame& frame, ByteWriter& out) {
  out.Put(frame.id);
  out.Put(frame.step);
  out.Put(frame.epoch);
  out.Put(frame.fingerprint);
  out.PutArray(frame.fault);
  PutList(frame.copies, out, [&](const VerifiedCopy& copy) {
    out.Put(copy.layer);
    out.Put(copy.expert);
    out.Put(copy.found);
    out.Put(copy.expected);
  });
}

VerifiedFrame GetVerified(ByteReader& in) {
  VerifiedFrame frame;
  frame.id = in.Get<uint64_t>();
  frame.step = in.Get<int64_t>();
  frame.epoch = in.Get<int64_t>();
  frame.fingerprint = in.Get<uint64_t>();
  frame.fault = in.GetArray<std::byte>();
  frame.copies = GetList<VerifiedCopy>(in, [&] {
    VerifiedCopy copy;
    copy.layer = in.Get<int32_t>();
    copy.expert = in.Get<int32_t>();
    copy.found = in.Get<uint64_t>();
    copy.expected = in.Get<uint64_t>();
    return copy;
  });
  return frame;
}

}  // namespace

std::vector<std::byte> Serialize(const LeaderFrame& frame) {
  ByteWriter out;
  out.Put(frame.wake_seq);
  std::visit(Overloaded{[&](const SubmitFrame& body) {
                          out.Put(FrameKind::kSubmit);
                          PutRequest(body.request, out);
                        },
                        [&](const CancelFrame& body) {
                          out.Put(FrameKind::kCancel);
                          out.Put(body.request_id);
                        },
                        [&](const WakeFrame&) { out.Put(FrameKind::kWake); },
                        [&](const PlanFrame& body) {
                          out.Put(FrameKind::kPlan);
                          out.PutArray(body.plan);
                        },
                        [&](const StopFrame& body) {
                          out.Put(FrameKind::kStop);
                          out.Put(static_cast<uint8_t>(body.complete));
                        },
                        [&](const HaltFrame& body) {
                          out.Put(FrameKind::kHalt);
                          out.Put(body.generation);
                          out.Put(static_cast<uint8_t>(body.want_placement));
                        },
                        [&](const ResumeFrame& body) {
                          out.Put(FrameKind::kResume);
                          PutResume(body, out);
                        },
                        [&](const VerifyFrame& body) {
                          out.Put(FrameKind::kVerify);
                          out.Put(body.id);
                        }},
             frame.body);
  return out.Take();
}

std::vector<std::byte> Serialize(const RankFrame& frame) {
  ByteWriter out;
  std::visit(Overloaded{[&](const EventsFrame& body) {
                          out.Put(FrameKind::kEvents);
                          PutEvents(body, out);
                        },
                        [&](const RankStatusFrame& body) {
                          out.Put(FrameKind::kRankStatus);
                          out.Put(body.running);
                          out.Put(body.waiting);
                          out.Put(body.kv_bytes_used);
                        },
                        [&](const RoutingFrame& body) {
                          out.Put(FrameKind::kRouting);
                          out.Put(body.recording);
                          out.Put(body.step_begin);
                          out.Put(body.step_end);
                          out.Put(body.first);
                          out.PutArray(body.ids);
                        },
                        [&](const HaltedFrame& body) {
                          out.Put(FrameKind::kHalted);
                          out.Put(body.generation);
                          out.Put(body.step);
                          out.Put(body.epoch);
                          out.Put(body.staged_plan_id);
                          out.PutArray(body.placement);
                          out.PutArray(body.staged_placement);
                        },
                        [&](const TroubleFrame& body) {
                          out.Put(FrameKind::kTrouble);
                          out.Put(body.generation);
                          out.PutArray(body.missing);
                        },
                        [&](const VerifiedFrame& body) {
                          out.Put(FrameKind::kVerified);
                          PutVerified(body, out);
                        }},
             frame.body);
  return out.Take();
}

absl::StatusOr<LeaderFrame> ParseLeaderFrame(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  LeaderFrame frame;
  frame.wake_seq = in.Get<uint64_t>();
  switch (static_cast<FrameKind>(in.Get<uint8_t>())) {
    case FrameKind::kSubmit:
      frame.body = SubmitFrame{GetRequest(in)};
      break;
    case FrameKind::kCancel:
      frame.body = CancelFrame{in.Get<uint64_t>()};
      break;
    case FrameKind::kWake:
      frame.body = WakeFrame{};
      break;
    case FrameKind::kPlan:
      frame.body = PlanFrame{in.GetArray<std::byte>()};
      break;
    case FrameKind::kStop: {
      const auto complete = in.Get<uint8_t>();
      if (complete > 1) return Malformed("stop frame");
      frame.body = StopFrame{complete == 1};
      break;
    }
    case FrameKind::kHalt: {
      HaltFrame body;
      body.generation = in.Get<int64_t>();
      const auto want = in.Get<uint8_t>();
      if (want > 1) return Malformed("halt frame");
      body.want_placement = want == 1;
      frame.body = body;
      break;
    }
    case FrameKind::kResume:
      frame.body = GetResume(in);
      break;
    case FrameKind::kVerify:
      frame.body = VerifyFrame{in.Get<uint64_t>()};
      break;
    default:
      return Malformed("kind from the leader");
  }
  if (!in.AtEnd()) return Malformed("length of a frame from the leader");
  return frame;
}

absl::StatusOr<RankFrame> ParseRankFrame(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  RankFrame frame;
  switch (static_cast<FrameKind>(in.Get<uint8_t>())) {
    case FrameKind::kEvents: {
      BALLAST_ASSIGN_OR_RETURN(frame.body, GetEvents(in));
      break;
    }
    case FrameKind::kRankStatus: {
      RankStatusFrame body;
      body.running = in.Get<int32_t>();
      body.waiting = in.Get<int32_t>();
      body.kv_bytes_used = in.Get<int64_t>();
      frame.body = body;
      break;
    }
    case FrameKind::kRouting: {
      RoutingFrame body;
      body.recording = in.Get<uint32_t>();
      body.step_begin = in.Get<int64_t>();
      body.step_end = in.Get<int64_t>();
      body.first = in.Get<int64_t>();
      body.ids = in.GetArray<std::byte>();
      frame.body = std::move(body);
      break;
    }
    case FrameKind::kHalted: {
      HaltedFrame body;
      body.generation = in.Get<int64_t>();
      body.step = in.Get<int64_t>();
      body.epoch = in.Get<int64_t>();
      body.staged_plan_id = in.Get<int64_t>();
      body.placement = in.GetArray<std::byte>();
      body.staged_placement = in.GetArray<std::byte>();
      frame.body = std::move(body);
      break;
    }
    case FrameKind::kTrouble: {
      TroubleFrame body;
      body.generation = in.Get<int64_t>();
      body.missing = in.GetArray<int32_t>();
      frame.body = std::move(body);
      break;
    }
    case FrameKind::kVerified:
      frame.body = GetVerified(in);
      break;
    default:
      return Malformed("kind from a rank");
  }
  if (!in.AtEnd()) return Malformed("length of a frame from a rank");
  return frame;
}

}  // namespace ballast
