#include "runtime/record_api.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "base/npy.h"

namespace ballast {
namespace {

using nlohmann::json;

TEST_CASE("a recording is started watched dumped and stopped", "[runtime][unit]") {
  TraceRecorder recorder({.num_ranks = 1, .num_layers = 1, .num_experts = 2, .top_k = 1});
  const auto state = [&](const std::string& action, const std::string& body = "") {
    const HttpReply reply = AnswerRecord(&recorder, action, body);
    INFO(reply.body);
    REQUIRE(reply.status == 200);
    return json::parse(reply.body);
  };
  REQUIRE(state("status")["recording"] == false);
  REQUIRE(state("start", R"({"what":"counts","max_bytes":32})") == json{{"recording", true},
                                                                        {"full", false},
                                                                        {"gap", false},
                                                                        {"what", "counts"},
                                                                        {"steps", 0},
                                                                        {"tokens", 0},
                                                                        {"bytes", 0},
                                                                        {"max_bytes", 32}});
  for (int32_t step = 0; step < 3; ++step) {
    recorder.AddStep(std::vector<int32_t>{step, 7, 2, 0});
  }
  const json full = state("status");
  REQUIRE(full["full"] == true);
  REQUIRE(full["recording"] == false);
  REQUIRE(full["steps"] == 2);
  REQUIRE(full["tokens"] == 0 + 7 + 2 + 1 + 7 + 2);
  const HttpReply dump = AnswerRecord(&recorder, "dump", "");
  REQUIRE(dump.status == 200);
  REQUIRE(std::string(dump.type) == "application/octet-stream");
  REQUIRE(*ParseNpy("dump", dump.body) ==
          MakeNpyArray(NpyType::kI32, {2, 2, 1, 2}, std::vector<int64_t>{0, 7, 2, 0, 1, 7, 2, 0}));
  REQUIRE(state("stop")["steps"] == 2);
  REQUIRE(state("start")["max_bytes"] == TraceRecorder::kDefaultBytes);
  state("stop");
  REQUIRE(state("start", R"({"what":"ids"})")["tokens"] == 0);
}

TEST_CASE("what cannot be recorded is refused with what is allowed", "[runtime][unit][errors]") {
  TraceRecorder recorder({.num_ranks = 1, .num_layers = 1, .num_experts = 2, .top_k = 1});
  const auto refused = [&](int status, const std::string& action, const std::string& body,
                           const std::string& part) {
    const HttpReply reply = AnswerRecord(&recorder, action, body);
    INFO(action << " " << body.substr(0, 80) << " -> " << reply.body);
    REQUIRE(reply.status == status);
    const json error = json::parse(reply.body).at("error");
    REQUIRE(error.at("type") == "invalid_request_error");
    REQUIRE(error.at("message").get<std::string>().find(part) != std::string::npos);
  };
  refused(400, "start", "{", "body: ");
  refused(400, "start", "[]", "JSON object");
  refused(400, "start", R"({"what":"all"})", R"(what: "all", allowed: "counts", "ids")");
  refused(400, "start", R"({"what":[["counts"]]})", "what: [[\"counts\"]]");
  refused(400, "start", R"({"max_bytes":"1"})", "max_bytes: \"1\", allowed: 1 to 1073741824");
  refused(400, "start", R"({"max_bytes":1.5})", "max_bytes: 1.5");
  refused(400, "start", R"({"max_bytes":18446744073709551615})", "max_bytes: 184467440737095516");
  refused(400, "start", R"({"max_bytes":7})", "max_bytes: 7, allowed: 16 (one step");
  refused(400, "start", R"({"bytes":7})", "bytes: 7, allowed: the fields what and max_bytes");
  const std::string nest(1 << 20, '[');
  refused(400, "start", R"({"what":)" + nest + std::string(nest.size(), ']') + "}",
          "body: nests deeper than 64");
  refused(409, "stop", "", "start one first");
  refused(409, "dump", "", "start a recording first");
  REQUIRE(AnswerRecord(&recorder, "start", "").status == 200);
  refused(409, "start", "", "stop it first");
  refused(409, "dump", "", "send requests first");
}

}  // namespace
}  // namespace ballast
