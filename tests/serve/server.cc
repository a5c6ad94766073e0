#include "tests/serve/server.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

namespace ballast::testing {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kReadyTimeoutMs = 120'000;
constexpr int kAnswerTimeoutMs = 120'000;
constexpr int kStopTimeoutMs = 120'000;
constexpr int kEndTimeoutMs = 60'000;
constexpr int kMetricTimeoutMs = 10'000;
constexpr milliseconds kPause(20);

Answer ToAnswer(const absl::StatusOr<HttpResponse>& response) {
  Answer answer;
  if (!response.ok()) return answer;
  answer.status = response->status;
  answer.headers = response->headers;
  answer.body = response->body;
  answer.json = json::parse(answer.body, nullptr, /*allow_exceptions=*/false);
  return answer;
}

}  // namespace

// ---- files -------------------------------------------------------------------------------------

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "ballast-serve-XXXXXX").string();
  REQUIRE(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return std::move(text).str();
}

void PutText(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string DemoModel() {
  return BALLAST_SOURCE_DIR "/deploy/demo/model";
}

// ---- processes ---------------------------------------------------------------------------------

Process::Process(const std::vector<std::string>& command, const Environment& environment,
                 const std::string& out, const std::string& err) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  pid_ = fork();
  REQUIRE(pid_ >= 0);
  if (pid_ > 0) return;
  for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
  dup2(open("/dev/null", O_RDONLY), 0);
  dup2(open(out.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), 1);
  dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), 2);
  execvp(arguments[0], arguments.data());
  _exit(127);
}

Process::~Process() {
  if (code_.has_value()) return;
  // mpirun's ranks first: it would wait for them.
  for (const pid_t child : Children()) kill(child, SIGKILL);
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::optional<int> Process::Wait(int timeout_ms) {
  const auto until = Clock::now() + milliseconds(timeout_ms);
  while (!code_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (Clock::now() >= until) {
      return std::nullopt;
    } else {
      std::this_thread::sleep_for(kPause);
    }
  }
  return code_;
}

std::vector<pid_t> Process::Children() const {
  std::vector<pid_t> children;
  const std::string id = std::to_string(pid_);
  std::istringstream list(ReadText("/proc/" + id + "/task/" + id + "/children"));
  for (pid_t child; list >> child;) children.push_back(child);
  return children;
}

std::vector<std::string> MpirunBallast(int ranks, const std::vector<std::string>& arguments) {
  std::vector<std::string> command = {"bash",
                                      "-c",
                                      ". " BALLAST_SOURCE_DIR
                                      "/deploy/environment.sh; "
                                      "[ -z \"${BALLAST_TEST_SIGKILL_TIMEOUT:-}\" ] || export "
                                      "OMPI_MCA_odls_base_sigkill_timeout="
                                      "$BALLAST_TEST_SIGKILL_TIMEOUT; exec \"$@\"",
                                      "bash",
                                      "mpirun",
                                      "-n",
                                      std::to_string(ranks),
                                      "--oversubscribe",
                                      "--bind-to",
                                      "none",
                                      BALLAST_COMMAND};
  command.insert(command.end(), arguments.begin(), arguments.end());
  return command;
}

Ended RunBallast(int ranks, const std::vector<std::string>& arguments,
                 const Environment& environment) {
  TempDir dir;
  Environment all = environment;
  // Open MPI 4.1 waits this long, once or twice, after a rank exits with another code than 0, even
  // when all have ended; deploy/environment.sh sets it for the sake of a drain.
  all.emplace_back("BALLAST_TEST_SIGKILL_TIMEOUT", "1");
  Process process(MpirunBallast(ranks, arguments), all, dir / "out", dir / "err");
  const std::optional<int> code = process.Wait(kEndTimeoutMs);
  return {code, ReadText(dir / "out"), ReadText(dir / "err")};
}

// ---- answers -----------------------------------------------------------------------------------

std::vector<int32_t> Answer::ids() const {
  if (status != 200) return {};
  return json.at("choices").at(0).at("token_ids").get<std::vector<int32_t>>();
}
std::string Answer::text() const {
  return status == 200 ? json.at("choices").at(0).at("text").get<std::string>() : "";
}
std::string Answer::finish() const {
  return status == 200 ? json.at("choices").at(0).at("finish_reason").get<std::string>() : "";
}

Scrape::Scrape(const std::string& exposition) : text(exposition) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    const size_t brace = std::min(line.find('{'), space);
    char* end = nullptr;
    const double value =
        space == std::string::npos ? 0 : std::strtod(line.c_str() + space + 1, &end);
    if (end == nullptr || end == line.c_str() + space + 1 || *end != 0) {
      valid = false;
      continue;
    }
    samples_.emplace(line.substr(0, brace), std::pair(line.substr(brace, space - brace), value));
  }
  valid = valid && !samples_.empty();
}

double Scrape::Sum(const std::string& name, const std::vector<std::string>& labels) const {
  double sum = 0;
  const auto [begin, end] = samples_.equal_range(name);
  for (auto it = begin; it != end; ++it) {
    bool matches = true;
    for (const std::string& label : labels) {
      matches = matches && it->second.first.find(label) != std::string::npos;
    }
    if (matches) sum += it->second.second;
  }
  return sum;
}

int Scrape::Count(const std::string& name) const {
  return static_cast<int>(samples_.count(name));
}

// ---- the server --------------------------------------------------------------------------------

Server::Server(int ranks, const std::vector<std::string>& flags, const Environment& environment)
    : ranks_(ranks) {
  const std::string ready = ready_path();
  std::vector<std::string> arguments = {"serve", "--port",       "0",  "--metrics-port",
                                        "0",     "--ready-file", ready};
  if (std::ranges::find(flags, "--model") == flags.end()) {
    arguments.insert(arguments.end(), {"--model", DemoModel()});
  }
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  process_ = std::make_unique<Process>(MpirunBallast(ranks, arguments), environment, dir_ / "log",
                                       dir_ / "log");
  const auto until = Clock::now() + milliseconds(kReadyTimeoutMs);
  while (!std::filesystem::exists(ready) && Clock::now() < until && !process_->Wait(0)) {
    std::this_thread::sleep_for(kPause);
  }
  INFO(Log());
  const json ports = json::parse(ReadText(ready), nullptr, /*allow_exceptions=*/false);
  REQUIRE(ports.is_object());
  port_ = ports.at("port").get<int>();
  metrics_ports_ = ports.at("metrics_ports").get<std::vector<int>>();
  leader_pid_ = ports.at("pid").get<pid_t>();
  REQUIRE(static_cast<int>(metrics_ports_.size()) == ranks);
}

Server::~Server() {
  if (process_ == nullptr || process_->Wait(0).has_value()) return;
  kill(leader_pid_, SIGTERM);
  process_->Wait(5'000);
}

Answer Server::Request(const std::string& method, const std::string& path, const std::string& body,
                       const std::string& headers) const {
  auto client = HttpClient::Connect("127.0.0.1", port_, kAnswerTimeoutMs);
  if (!client.ok()) return {};
  return ToAnswer(client->Request(method, path, body, headers));
}

Answer Server::Complete(const json& body) const {
  return Request("POST", "/v1/completions", body.dump());
}

Scrape Server::Metrics(int rank) const {
  auto client =
      HttpClient::Connect("127.0.0.1", metrics_ports_[static_cast<size_t>(rank)], kAnswerTimeoutMs);
  return Scrape(client.ok() ? ToAnswer(client->Request("GET", "/metrics")).body : "");
}

double Server::MetricSum(const std::string& name, const std::vector<std::string>& labels) const {
  double sum = 0;
  for (int rank = 0; rank < ranks_; ++rank) sum += Metrics(rank).Sum(name, labels);
  return sum;
}

bool Server::AwaitMetric(const std::string& name, double value,
                         const std::vector<std::string>& labels) const {
  const auto until = Clock::now() + milliseconds(kMetricTimeoutMs);
  while (MetricSum(name, labels) != value) {
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(kPause);
  }
  return true;
}

int64_t Server::Epoch() const {
  const Answer answer = Request("GET", "/v1/placement");
  return answer.status == 200 ? answer.json.at("epoch").get<int64_t>() : -1;
}

bool Server::AwaitState(int rank, const std::string& state) const {
  for (int i = 0; i < 500; ++i) {
    const Answer answer = Request("GET", "/v1/ranks");
    if (answer.status == 200 && answer.json.at("ranks").at(rank).at("state") == state) return true;
    std::this_thread::sleep_for(milliseconds(20));
  }
  return false;
}

std::vector<int64_t> Server::ResidentBytes() const {
  std::vector<int64_t> bytes;
  for (const pid_t child : process_->Children()) {
    std::istringstream status(ReadText("/proc/" + std::to_string(child) + "/status"));
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("VmRSS:", 0) == 0) bytes.push_back(std::atoll(line.c_str() + 6) * 1024);
    }
  }
  return bytes;
}

pid_t Server::RankPid(int rank) const {
  const std::string wanted = "OMPI_COMM_WORLD_RANK=" + std::to_string(rank);
  for (const pid_t child : process_->Children()) {
    const std::string environment = ReadText("/proc/" + std::to_string(child) + "/environ");
    if (environment.find(wanted + std::string(1, 0)) != std::string::npos) return child;
  }
  return -1;
}

std::optional<int> Server::Stop() {
  kill(leader_pid_, SIGTERM);
  return process_->Wait(kStopTimeoutMs);
}

// ---- streams -----------------------------------------------------------------------------------

Stream::Stream(const Server& server, json body) {
  body["stream"] = true;
  body["return_token_ids"] = true;
  auto client = HttpClient::Connect("127.0.0.1", server.port(), kAnswerTimeoutMs);
  if (!client.ok()) return;
  client_ = *std::move(client);
  if (!client_->Send(FormatRequest("POST", "/v1/completions", body.dump(), "")).ok()) return;
  const auto head = client_->ReceiveHead();
  if (head.ok()) status_ = head->status;
}

json Stream::Next() {
  const json none(json::value_t::discarded);
  while (status_ == 200 && !done_) {
    if (const size_t end = received_.find("\n\n"); end != std::string::npos) {
      const std::string data = received_.substr(6, end - 6);  // after "data: "
      received_.erase(0, end + 2);
      if (data == "[DONE]") {
        done_ = true;
        return none;
      }
      json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
      if (event.is_object() && event.contains("choices")) {
        const json& choice = event["choices"][0];
        for (const json& id : choice["token_ids"]) ids_.push_back(id.get<int32_t>());
        text_ += choice["text"].get<std::string>();
        if (choice["finish_reason"].is_string()) finish_ = choice["finish_reason"];
      }
      return event;
    }
    const auto chunk = client_->ReceiveChunk();
    if (!chunk.ok() || chunk->empty()) return none;
    received_ += *chunk;
  }
  return none;
}

void Stream::ReadAll() {
  while (!Next().is_discarded()) {
  }
}

std::vector<Answer> CompleteAll(const Server& server, const std::vector<json>& bodies,
                                int concurrency) {
  std::vector<Answer> answers(bodies.size());
  std::atomic<size_t> next = 0;
  std::vector<std::jthread> clients;
  for (int i = 0; i < concurrency; ++i) {
    clients.emplace_back([&] {
      for (size_t at; (at = next++) < bodies.size();) answers[at] = server.Complete(bodies[at]);
    });
  }
  clients.clear();
  return answers;
}

}  // namespace ballast::testing
