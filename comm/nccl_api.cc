#include "comm/nccl_api.h"

#include "base/status.h"

namespace ballast {
namespace {

const char* NameOf(NcclResult result) {
  switch (result) {
    case NcclResult::kSuccess:
      return "ncclSuccess";
    case NcclResult::kUnhandledCudaError:
      return "ncclUnhandledCudaError";
    case NcclResult::kSystemError:
      return "ncclSystemError";
    case NcclResult::kInternalError:
      return "ncclInternalError";
    case NcclResult::kInvalidArgument:
      return "ncclInvalidArgument";
    case NcclResult::kInvalidUsage:
      return "ncclInvalidUsage";
    case NcclResult::kRemoteError:
      return "ncclRemoteError";
    case NcclResult::kInProgress:
      return "ncclInProgress";
  }
  return "an unknown result";
}

}  // namespace

absl::Status NcclStatus(NcclResult result, const CallSite& site, const std::string& last_error) {
  const auto text = [&] {
    return absl::StrCat(site.call, ": ", NameOf(result), " (", static_cast<int>(result), ")",
                        last_error.empty() ? "" : ": ", last_error);
  };
  switch (result) {
    case NcclResult::kSuccess:
    case NcclResult::kInProgress:
      return absl::OkStatus();
    case NcclResult::kRemoteError:
      return absl::UnavailableError(absl::StrCat("a peer or a link is lost: ", text()));
    case NcclResult::kInvalidArgument:
    case NcclResult::kInvalidUsage: {
      const size_t at = last_error.find("Duplicate GPU");
      if (at == std::string::npos) return absl::InvalidArgumentError(text());
      return absl::InvalidArgumentError(absl::StrCat(
          "two ranks stand on one GPU, and NCCL wants one for each: ", last_error.substr(at)));
    }
    default:
      return absl::InternalError(absl::StrCat(text(), " at ", site.file, ":", site.line));
  }
}

}  // namespace ballast
