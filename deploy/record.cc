// `ballast record`: starts and stops the recording of routing on a running server, and fetches it.
#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "base/file.h"
#include "base/npy.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/http_client.h"
#include "deploy/lab.h"
#include "monitor/trace_recorder.h"

namespace ballast {
namespace {

using nlohmann::json;

constexpr int kAnswerTimeoutMs = 60'000;

struct RecordFlags {
  std::string action;
  std::string url = "http://127.0.0.1:8080";
  std::string what = "counts";
  int64_t max_bytes = TraceRecorder::kDefaultBytes;
  std::string out;
};

struct Address {
  std::string host;
  int port = 0;
};

absl::StatusOr<Address> ParseUrl(const std::string& url) {
  const auto reject = [&] {
    return absl::InvalidArgumentError(absl::StrCat(
        "--url is '", url, "', allowed: http://A.B.C.D:PORT or http://localhost:PORT"));
  };
  const std::string scheme = "http://";
  const size_t colon = url.rfind(':');
  if (!absl::StartsWith(url, scheme) || colon < scheme.size()) return reject();
  Address address{.host = url.substr(scheme.size(), colon - scheme.size())};
  if (address.host == "localhost") address.host = "127.0.0.1";
  const char* end = url.data() + url.size();
  if (end[-1] == '/') --end;
  const auto read = std::from_chars(url.data() + colon + 1, end, address.port);
  if (read.ec != std::errc() || read.ptr != end || address.port < 1 || address.port > 65535) {
    return reject();
  }
  return address;
}

// The body of the server's answer.
// ERRORS kUnavailable: no server there; kInvalidArgument: what the server has to say against it
absl::StatusOr<std::string> Ask(const RecordFlags& flags, const std::string& body) {
  BALLAST_ASSIGN_OR_RETURN(const Address address, ParseUrl(flags.url));
  auto client = HttpClient::Connect(address.host, address.port, kAnswerTimeoutMs);
  if (absl::IsInvalidArgument(client.status())) {
    return absl::InvalidArgumentError(
        absl::StrCat("--url: ", std::string(client.status().message())));
  }
  const absl::StatusOr<HttpResponse> response =
      client.ok() ? client->Request("POST", "/v1/record/" + flags.action, body) : client.status();
  if (!response.ok()) {
    return absl::UnavailableError(absl::StrCat("no server answers at --url ", flags.url, ": ",
                                               std::string(response.status().message())));
  }
  if (response->status == 200) return response->body;
  const json answer = json::parse(response->body, nullptr, /*allow_exceptions=*/false);
  const json::json_pointer at("/error/message");
  return absl::InvalidArgumentError(
      absl::StrCat("record ", flags.action, ": ",
                   answer.is_object() && answer.contains(at) && answer[at].is_string()
                       ? answer[at].get<std::string>()
                       : absl::StrCat("the server answers with status ", response->status)));
}

absl::Status RunRecord(const RecordFlags& flags) {
  if ((flags.action == "dump") == flags.out.empty()) {
    return absl::InvalidArgumentError(flags.out.empty()
                                          ? "record dump: --out is required, the .npy to write"
                                          : "--out: allowed with record dump only");
  }
  BALLAST_RETURN_IF_ERROR(CheckOutputs({{"--out", flags.out}}));
  const json wish = {{"what", flags.what}, {"max_bytes", flags.max_bytes}};
  BALLAST_ASSIGN_OR_RETURN(const std::string answer,
                           Ask(flags, flags.action == "start" ? wish.dump() : ""));
  if (flags.action != "dump") {
    std::cout << answer << "\n";
    return absl::OkStatus();
  }
  // A server of another kind would answer something else.
  BALLAST_ASSIGN_OR_RETURN(const NpyArray array, ParseNpy(flags.url, answer));
  BALLAST_RETURN_IF_ERROR(WriteFile(flags.out, answer));
  std::cout << flags.out << ": " << ShapeText(array.shape) << " of " << NameOf(array.type) << "\n";
  return absl::OkStatus();
}

}  // namespace

RunCommand AddRecordCommand(CLI::App* app) {
  auto flags = std::make_shared<RecordFlags>();
  AddConfigFlag(app);
  app->add_option("action", flags->action,
                  "start: from the next step on; stop: keep what there is; status: how much that "
                  "is; dump: write it, also while recording")
      ->required()
      ->check(CLI::IsMember({"start", "stop", "status", "dump"}));
  app->add_option("--url", flags->url, "The server, on this machine");
  app->add_option("--what", flags->what,
                  "start: counts [steps, 2, layers, experts] (prefill, decode), or ids "
                  "[tokens, layers, top-k]")
      ->check(CLI::IsMember({"counts", "ids"}));
  app->add_option("--max-bytes", flags->max_bytes,
                  "start: memory of the recording, taken at once; full, it ends")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(int64_t{1}, TraceRecorder::kMostBytes));
  app->add_option("--out", flags->out, "dump: the .npy to write, for ballast replay --trace");
  app->footer(
      "Exits 0 when done, 1 when no server answers, 2 when flags or the server's state forbid it.\n"
      "Example: ballast record start && sleep 60 && ballast record stop && \\\n"
      "         ballast record dump --out monday.npy");
  return [flags](int*, char***) {
    const absl::Status status = RunRecord(*flags);
    const int code = Finish(status);
    return absl::IsUnavailable(status) ? int{kExitFailed} : code;
  };
}

}  // namespace ballast
