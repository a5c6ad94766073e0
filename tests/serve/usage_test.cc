// What an operator reads when the server cannot start: once, with the name, the value and what is
// allowed; exit code 2.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <functional>

#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;
using Arguments = std::vector<std::string>;

int CountOf(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++count;
  return count;
}

// `ballast serve` says each of `parts` in its one message and exits 2, alone and on two ranks.
void RequireRefusal(const Arguments& arguments, const std::vector<std::string>& parts,
                    const Environment& environment = {}) {
  for (const int ranks : {1, 2}) {
    Arguments all = {"serve"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Ended ended = RunBallast(ranks, all, environment);
    INFO(ranks << " ranks: " << ended.err);
    REQUIRE(ended.code == 2);
    REQUIRE(CountOf(ended.err, "ballast: ") == 1);
    const size_t begin = ended.err.find("ballast: ");
    const std::string message = ended.err.substr(begin, ended.err.find('\n', begin) - begin);
    for (const std::string& part : parts) {
      INFO("wanted: " << part);
      REQUIRE(message.find(part) != std::string::npos);
    }
  }
}

Arguments OnFreePorts(const std::string& model, const Arguments& more = {}) {
  Arguments arguments = {"--model", model, "--port", "0", "--metrics-port", "0"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

// A listening socket on a port that the system chose.
class TakenPort {
 public:
  TakenPort() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    REQUIRE(bind(fd_, reinterpret_cast<sockaddr*>(&address), length) == 0);
    REQUIRE(listen(fd_, 1) == 0);
    REQUIRE(getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    port_ = std::to_string(ntohs(address.sin_port));
  }
  ~TakenPort() { close(fd_); }
  const std::string& port() const { return port_; }

 private:
  int fd_;
  std::string port_;
};

// A copy of the demo model that a test may break.
class ModelCopy {
 public:
  ModelCopy() {
    std::filesystem::copy(DemoModel(), dir_.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
    const std::string file = ReadText(weights_path());
    uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof length);
    header = json::parse(file.substr(8, length));
    data = file.substr(8 + length);
  }
  const std::string& path() const { return dir_.path(); }
  std::string weights_path() const { return dir_ / "model.safetensors"; }
  void EditConfig(const std::function<void(json&)>& edit) {
    json config = json::parse(ReadText(dir_ / "config.json"));
    edit(config);
    PutText(dir_ / "config.json", config.dump());
  }
  void WriteWeights() {
    const std::string text = header.dump();
    const uint64_t length = text.size();
    PutText(weights_path(),
              std::string(reinterpret_cast<const char*>(&length), sizeof length) + text + data);
  }

  json header;
  std::string data;

 private:
  TempDir dir_;
};

constexpr char kExpertTensor[] = "model.layers.2.mlp.experts.5.up_proj.weight";

TEST_CASE("a bad flag is named with its value and what is allowed", "[serve]") {
  RequireRefusal({"--model", DemoModel(), "--bogus=3"}, {"--bogus"});
  RequireRefusal({"--model", DemoModel(), "--split", "cost"},
                 {"--split is cost", "allowed in serve"});
  // Without CUDA, or without a device.
  RequireRefusal(OnFreePorts(DemoModel(), {"--device", "cuda"}),
                 {"--device is cuda, allowed", "cpu"});
  RequireRefusal({"--port", "0"}, {"--model"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--max-seqs", "0"}), {"--max-seqs", "0", "1 to 65536"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--dtype", "int3"}), {"--dtype", "int3", "bf16"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--when", "in-step"}),
                 {"--when: in-step is for `ballast replay` only, allowed: after-step"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--when", "never"}), {"--when: 'never'", "after-step"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--kv-bytes", "lots"}), {"--kv-bytes", "lots"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--kv-bytes", "10"}),
                 {"--kv-bytes is 10", "allowed: 1310720", "whole context"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--ready-file", "/nowhere/ready"}),
                 {"--ready-file: /nowhere/ready: cannot be written: No such file"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--state-file", "/nowhere/state"}),
                 {"--state-file: /nowhere/state: cannot be written: No such file"});
  // Reading this one would never end.
  RequireRefusal(OnFreePorts(DemoModel(), {"--state-file", "/dev/full"}),
                 {"--state-file: /dev/full: ", "not a regular file"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--state-file", "/tmp"}),
                 {"--state-file: /tmp: ", "it is a folder"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--slots-per-rank", "33"}),
                 {"--slots-per-rank is 33, allowed: at most 32, the experts of a layer"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--rho", ".1", "--rho", ".2"}),
                 {"--rho is given 2 times, allowed: once"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--polcy", "eplb"}), {"--polcy", "\"policy\"?"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--host", "300.1.1.1"}), {"--host is 300.1.1.1: "});
  // Of the net that is kept for documentation: nobody's address.
  RequireRefusal(OnFreePorts(DemoModel(), {"--host", "192.0.2.1"}),
                 {"--host is 192.0.2.1: ", "allowed: an address of this machine"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--slots-per-rank", "3"}),
                 {"--slots-per-rank", "3", "at least"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--staging-experts", "3"}),
                 {"--staging-experts is 3", "allowed: 0, or at least"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--migration-bandwidth", "-1"}),
                 {"--migration-bandwidth", "-1", "0.000000 to 1000000000.000000"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--migration-share", "0"}),
                 {"--migration-share", "0", "0.001000 to 1.000000"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--layers-per-plan", "-2"}),
                 {"--layers-per-plan", "-2", "0 to 1048576"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--step-log", "/nowhere/steps"}),
                 {"--step-log", "/nowhere/steps"});
}

TEST_CASE("a bad environment variable is refused like its flag", "[serve]") {
  RequireRefusal(OnFreePorts(DemoModel()), {"--max-seqs", "lots", "(from BALLAST_MAX_SEQS)"},
                 {{"BALLAST_MAX_SEQS", "lots"}});
  RequireRefusal(OnFreePorts(DemoModel()), {"--no-metrics", "maybe", "true or false"},
                 {{"BALLAST_NO_METRICS", "maybe"}});
  // The flag is to blame where both are given.
  const Ended ended = RunBallast(1, {"serve", "--model", DemoModel(), "--max-seqs", "0"},
                                 {{"BALLAST_MAX_SEQS", "4"}});
  INFO(ended.err);
  REQUIRE(ended.code == 2);
  REQUIRE(CountOf(ended.err, "BALLAST_MAX_SEQS") == 0);
  RequireRefusal(OnFreePorts(DemoModel()), {"--policy", "best", "eplb"},
                 {{"BALLAST_POLICY", "best"}});
  RequireRefusal(OnFreePorts(DemoModel()), {"--max-queue", "0"}, {{"BALLAST_MAX_QUEUE", "0"}});
}

TEST_CASE("a bad configuration file is named with the key and the value", "[serve]") {
  TempDir dir;
  const std::string path = dir / "ballast.json";
  const auto refused = [&](const std::string& text, std::vector<std::string> parts) {
    PutText(path, text);
    parts.push_back(path);
    RequireRefusal(OnFreePorts(DemoModel(), {"--config", path}), parts);
  };
  refused(R"({"max-seqz": 3})", {"max-seqz", "max-seqs"});
  refused(R"({"max-seqs": "many"})", {"max-seqs", "many", "1 to 65536"});
  refused(R"({"max-seqs": [3]})", {"max-seqs", "[3]"});
  refused(R"({"no-metrics": 7})", {"no-metrics", "7"});
  refused(R"({"max-seqs": 0})", {"max-seqs", "0", "1 to 65536"});
  refused(R"({"when": "in-step"})", {"when", "in-step is for `ballast replay` only"});
  refused(R"({"max-seqs": 3)", {"JSON"});
  RequireRefusal(OnFreePorts(DemoModel(), {"--config", dir / "absent.json"}),
                 {"--config", dir / "absent.json"});
}

TEST_CASE("a flag wins over the environment over the file over the default", "[serve]") {
  TempDir dir;
  const std::string path = dir / "ballast.json";
  PutText(
      path,
      json{{"model", DemoModel()}, {"policy", "static"}, {"split", "even"}, {"slots-per-rank", 20}}
          .dump());
  // The model itself comes from the file here; where a value won shows in the line at start.
  Server server(2, {"--config", path, "--policy", "never"},
                {{"BALLAST_POLICY", "eplb"}, {"BALLAST_SPLIT", "hash"}});
  INFO(server.Log());
  REQUIRE(server.Log().find("20 slots per rank, policy never, split hash") != std::string::npos);
  REQUIRE(server.Stop() == 0);

  PutText(path, json{{"model", DemoModel()}, {"max-seqs", 0}}.dump());
  RequireRefusal({"--config", path}, {"max-seqs", "0"});
  PutText(path, json{{"model", "/nowhere/of-the-file"}}.dump());
  RequireRefusal({"--config", path}, {"/nowhere/of-the-file"});
}

TEST_CASE("help shows the defaults and exits 0", "[serve]") {
  for (const int ranks : {1, 2}) {
    const Ended ended = RunBallast(ranks, {"serve", "--help"});
    INFO(ended.out);
    REQUIRE(ended.code == 0);
    REQUIRE(ended.err.find("ballast: ") == std::string::npos);
    for (const char* part : {"--model", "--port", "=8080", "--metrics-port", "=9420", "=regret",
                             "=exact", "BALLAST_PORT", "=300000"}) {
      INFO(part);
      REQUIRE(ended.out.find(part) != std::string::npos);
    }
    REQUIRE(CountOf(ended.out, "--prefill-chunk") == 1);
  }
}

// SOURCE TRT-LLM#18800: gigabytes were asked for before anybody had looked whether they fit.
TEST_CASE("memory that a machine has not got is refused before it is taken", "[serve]") {
  RequireRefusal(OnFreePorts(DemoModel(), {"--kv-bytes", "100TiB"}),
                 {"of the machine of rank 0 need", "allowed: up to", "which it has"});
}

TEST_CASE("a dry run says what a rank takes and binds no port", "[serve]") {
  const TakenPort taken;
  for (const int ranks : {1, 2}) {
    const Ended ended =
        RunBallast(ranks, {"serve", "--model", DemoModel(), "--dry-run", "--metrics-port",
                           taken.port(), "--policy", "eplb", "--rho", "0.5", "--kv-bytes", "64mb"});
    INFO(ended.out << ended.err);
    REQUIRE(ended.code == 0);
    for (const char* part : {"parameters that every rank holds", "experts in its slots",
                             "copies on their way", "key-value cache", "in all"}) {
      REQUIRE(CountOf(ended.out, part) == 1);
    }
    REQUIRE(CountOf(ended.err, "--rho has no effect with --policy eplb") == 1);
  }
}

TEST_CASE("a port in use is named", "[serve]") {
  const TakenPort taken;
  RequireRefusal({"--model", DemoModel(), "--port", taken.port(), "--metrics-port", "0"},
                 {"--port", taken.port(), "in use", "allowed: a free port"});
  RequireRefusal({"--model", DemoModel(), "--port", "0", "--metrics-port", taken.port()},
                 {"--metrics-port", taken.port(), "in use", "--no-metrics"});
}

// mpirun kills all ranks when the first one leaves.
TEST_CASE("a rank that is late says nevertheless why the job cannot start", "[serve]") {
  TempDir dir;
  Process process({"bash", "-c",
                   ". " BALLAST_SOURCE_DIR
                   "/deploy/environment.sh; exec mpirun -n 2 --oversubscribe --bind-to none "
                   "bash -c '[ $OMPI_COMM_WORLD_RANK != 0 ] || sleep 2; exec \"$@\"' bash \"$@\"",
                   "bash", BALLAST_COMMAND, "serve", "--model", DemoModel(), "--max-seqs", "0"},
                  {}, dir / "out", dir / "err");
  REQUIRE(process.Wait(60'000) == 2);
  const std::string said = ReadText(dir / "err");
  INFO(said);
  REQUIRE(CountOf(said, "ballast: --max-seqs") == 1);
}

TEST_CASE("ranks that read different checkpoints do not start to serve", "[serve]") {
  ModelCopy other;
  const size_t at = other.header.at(kExpertTensor).at("data_offsets").at(0).get<size_t>();
  other.data[at] = static_cast<char>(other.data[at] ^ 4);
  other.WriteWeights();
  TempDir dir;
  // Rank 1 has the other one; both hold every expert.
  Process process({"bash", "-c",
                   ". " BALLAST_SOURCE_DIR
                   "/deploy/environment.sh; exec mpirun -n 2 --oversubscribe --bind-to none "
                   "bash -c 'model=$1; [ $OMPI_COMM_WORLD_RANK = 0 ] || model=$2; "
                   "exec \"$3\" serve --model \"$model\" --port 0 --metrics-port 0 "
                   "--slots-per-rank 32' bash \"$@\"",
                   "bash", DemoModel(), other.path(), BALLAST_COMMAND},
                  {}, dir / "out", dir / "err");
  REQUIRE(process.Wait(60'000) == 2);
  const std::string said = ReadText(dir / "err");
  INFO(said);
  REQUIRE(CountOf(said, "they read different checkpoints") == 1);
  REQUIRE(said.find("--model: layer 1, expert 5") != std::string::npos);
  REQUIRE(said.find("ready: http") == std::string::npos);
}

TEST_CASE("the file of an earlier server's readiness goes away at a start only", "[serve]") {
  const TakenPort taken;
  TempDir dir;
  const std::string ready = dir / "ready";
  const auto refused = [&](const Arguments& more) {
    Arguments all = {"serve", "--model", DemoModel(), "--ready-file", ready};
    all.insert(all.end(), more.begin(), more.end());
    const Ended ended = RunBallast(2, all);
    INFO(ended.err);
    return ended.code;
  };
  PutText(ready, "{}");
  // Another server may be running, and it may be its file.
  REQUIRE(refused({"--port", "0", "--metrics-port", taken.port()}) == 2);
  REQUIRE(refused({"--port", "0", "--metrics-port", "0", "--dry-run"}) == 0);
  REQUIRE(std::filesystem::exists(ready));
  REQUIRE(refused({"--port", taken.port(), "--metrics-port", "0"}) == 2);
  REQUIRE_FALSE(std::filesystem::exists(ready));
}

TEST_CASE("a state file that can be neither used nor put aside is refused and left", "[serve]") {
  TempDir dir;
  const std::string state = dir / "state";
  PutText(state, "no state");
  std::filesystem::create_directory(state + ".rejected");
  RequireRefusal(OnFreePorts(DemoModel(), {"--state-file", state}),
                 {"--state-file: " + state, "state: JSON: allowed: an object",
                  "cannot be renamed to " + state + ".rejected: "});
  REQUIRE(ReadText(state) == "no state");
}

TEST_CASE("sub-commands and the version are named", "[serve]") {
  const Ended bogus = RunBallast(2, {"srve", "--port", "0"});
  INFO(bogus.err);
  REQUIRE(bogus.code == 2);
  REQUIRE(CountOf(bogus.err, "ballast: sub-command srve is unknown") == 1);
  REQUIRE(CountOf(bogus.err, "did you mean \"serve\"?") == 1);
  const Ended version = RunBallast(1, {"--version"});
  REQUIRE(version.code == 0);
  REQUIRE(version.out == RunBallast(1, {"version"}).out);
  REQUIRE(CountOf(version.out, "ballast ") == 1);
}

TEST_CASE("a model that cannot be used is refused with the tensor or key", "[serve][sanitized]") {
  RequireRefusal(OnFreePorts("/nowhere/model"), {"/nowhere/model", "No such file"});
  ModelCopy model;
  SECTION("architecture") {
    model.EditConfig([](json& c) { c["architectures"] = {"LlamaForCausalLM"}; });
    RequireRefusal(OnFreePorts(model.path()), {"LlamaForCausalLM", "Glm4MoeForCausalLM"});
  }
  SECTION("key of config.json out of range") {
    model.EditConfig([](json& c) { c["num_experts_per_tok"] = 99; });
    RequireRefusal(OnFreePorts(model.path()), {"num_experts_per_tok", "99", "1 to 32"});
  }
  SECTION("truncated file") {
    std::filesystem::resize_file(model.weights_path(), 1'000'000);
    RequireRefusal(OnFreePorts(model.path()), {model.weights_path(), "truncated"});
  }
  SECTION("unsupported dtype") {
    model.header[kExpertTensor]["dtype"] = "F16";
    model.WriteWeights();
    RequireRefusal(OnFreePorts(model.path()), {kExpertTensor, "F16", "BF16"});
  }
  SECTION("wrong shape") {
    const json shape = model.header[kExpertTensor]["shape"];
    model.header[kExpertTensor]["shape"] = {shape[1], shape[0]};
    model.WriteWeights();
    RequireRefusal(OnFreePorts(model.path()), {kExpertTensor, "[128, 64]", "[64, 128]"});
  }
  SECTION("NaN in an expert") {
    const json& entry = model.header[kExpertTensor];
    const size_t at = entry["data_offsets"][0].get<size_t>() + 10;
    REQUIRE(entry["dtype"] == "BF16");
    model.data[at] = '\xc0';
    model.data[at + 1] = '\x7f';
    model.WriteWeights();
    RequireRefusal(OnFreePorts(model.path()), {kExpertTensor, "NaN"});
  }
  SECTION("NaN in what every rank loads") {
    const json& entry = model.header["model.embed_tokens.weight"];
    const size_t at = entry["data_offsets"][0].get<size_t>();
    REQUIRE(entry["dtype"] == "BF16");
    model.data[at] = '\xc0';
    model.data[at + 1] = '\x7f';
    model.WriteWeights();
    RequireRefusal(OnFreePorts(model.path()), {"model.embed_tokens.weight", "NaN"});
  }
}

}  // namespace
}  // namespace ballast::testing
