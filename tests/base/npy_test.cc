#include "base/npy.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/random.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;

std::string MessageOf(const std::string& bytes) {
  const auto array = ParseNpy("trace.npy", bytes);
  REQUIRE_FALSE(array.ok());
  REQUIRE(array.status().code() == absl::StatusCode::kInvalidArgument);
  const std::string message(array.status().message());
  REQUIRE_THAT(message, Catch::Matchers::StartsWith("trace.npy: "));
  return message;
}

std::string WithHeader(const std::string& header, size_t data_bytes, char major = 1) {
  std::string bytes = "\x93NUMPY";
  bytes += major;
  bytes += '\0';
  bytes += static_cast<char>(header.size() & 0xff);
  bytes += static_cast<char>(header.size() >> 8);
  if (major == 2) bytes.append(2, '\0');
  return bytes + header + std::string(data_bytes, '\x01');
}

TEST_CASE("an array with a zero extent has no elements whatever the others are", "[base][unit]") {
  NpyArray array;
  array.shape = {int64_t{1} << 62, int64_t{1} << 62, 0};
  REQUIRE(array.num_elements() == 0);
}

TEST_CASE("what is written as npy is read back", "[base][npy]") {
  const std::vector<int64_t> values = {0, 1, 2, 3, 100, 255};
  for (NpyType type :
       {NpyType::kU8, NpyType::kU16, NpyType::kI32, NpyType::kI64, NpyType::kF32, NpyType::kF64}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{6}, std::vector<int64_t>{2, 3}, std::vector<int64_t>{1, 3, 2}}) {
      const NpyArray array = MakeNpyArray(type, shape, values);
      const std::string bytes = SerializeNpy(array);
      REQUIRE((bytes.size() - array.data.size()) % 64 == 0);
      const auto back = ParseNpy("x", bytes);
      REQUIRE(back.ok());
      REQUIRE(*back == array);
      for (size_t i = 0; i < values.size(); ++i) {
        REQUIRE(back->NumberAt(static_cast<int64_t>(i)) == static_cast<double>(values[i]));
        if (back->is_integer()) REQUIRE(back->IntegerAt(static_cast<int64_t>(i)) == values[i]);
      }
    }
  }
  const NpyArray scalar = MakeNpyArray(NpyType::kI64, {}, std::vector<int64_t>{-7});
  REQUIRE(ParseNpy("x", SerializeNpy(scalar))->IntegerAt(0) == -7);
  const NpyArray nothing = MakeNpyArray(NpyType::kU16, {0, 5}, {});
  REQUIRE(ParseNpy("x", SerializeNpy(nothing))->shape == std::vector<int64_t>{0, 5});
}

TEST_CASE("an npy file begins with the bytes that NumPy writes", "[base][npy][golden]") {
  const std::string bytes =
      SerializeNpy(MakeNpyArray(NpyType::kU16, {3, 1}, std::vector<int64_t>{1, 2, 258}));
  const std::string header = "{'descr': '<u2', 'fortran_order': False, 'shape': (3, 1), }";
  REQUIRE(bytes == std::string("\x93NUMPY\x01\x00\x76\x00", 10) + header +
                       std::string(118 - header.size() - 1, ' ') + "\n" +
                       std::string("\x01\x00\x02\x00\x02\x01", 6));
}

TEST_CASE("both npy versions and any order of keys are read", "[base][npy]") {
  const std::string header = "{\"shape\": (2,2) ,'fortran_order':False, 'descr':'<u1'}\n";
  for (char version : {'\1', '\2'}) {
    const auto array = ParseNpy("x", WithHeader(header, 4, version));
    REQUIRE(array.ok());
    REQUIRE(array->shape == std::vector<int64_t>{2, 2});
  }
}

TEST_CASE("a broken npy file is refused with a message that says what is wrong",
          "[base][npy][errors]") {
  const auto with = [](const std::string& descr, const std::string& order,
                       const std::string& shape) {
    return "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
  };
  REQUIRE_THAT(MessageOf(""), Contains("not a .npy file"));
  REQUIRE_THAT(MessageOf("layer,expert\n"), Contains("not a .npy file: it begins with 'layer,ex'"));
  REQUIRE_THAT(MessageOf(std::string("\x93NUMPY", 6)), Contains("cut off in the version"));
  REQUIRE_THAT(MessageOf(WithHeader("{}", 0, 3)), Contains("version 3.0, allowed: 1.0 and 2.0"));
  REQUIRE_THAT(MessageOf(WithHeader("{}", 0)), Contains("lacks descr"));
  REQUIRE_THAT(MessageOf(WithHeader(with(">u2", "False", "(2,)"), 4)), Contains("'>u2', allowed"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "True", "(2,)"), 4)), Contains("Fortran order"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(-2,)"), 4)), Contains("no number"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(99999999999999999999,)"), 4)),
               Contains("overflows"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<i8", "False", "(4294967296, 4294967296)"), 4)),
               Contains("overflows"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(1,1,1,1,1,1,1,1,1)"), 2)),
               Contains("more than 8 dimensions"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(2, 3)"), 11)),
               Contains("has 11 bytes of data; the shape [2, 3] of u16 needs 12 (cut off)"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(2, 3)"), 13)), Contains("left over"));
  REQUIRE_THAT(MessageOf(WithHeader(with("<u2", "False", "(2,)") + "x", 4)), Contains("no end"));
}

TEST_CASE("a file that is not there or cannot be written is named", "[base][npy][errors]") {
  REQUIRE_THAT(std::string(ReadNpy("/nowhere/x.npy").status().message()),
               Contains("/nowhere/x.npy: cannot be read"));
  REQUIRE_THAT(std::string(ReadNpy("/").status().message()), Contains("/: cannot be read"));
  REQUIRE_THAT(std::string(WriteFile("/nowhere/x", "text").message()),
               Contains("/nowhere/x: cannot be written"));
}

TEST_CASE("no mutation of an npy file is read outside its bytes", "[base][npy][property]") {
  const std::vector<int64_t> values(60, 17);
  const std::string good = SerializeNpy(MakeNpyArray(NpyType::kU16, {5, 4, 3}, values));
  Random random(20260801);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = good;
    const uint32_t edits = 1 + random.Below(3);
    for (uint32_t i = 0; i < edits; ++i) {
      const uint32_t size = static_cast<uint32_t>(bytes.size());
      switch (size == 0 ? 3 : random.Below(4)) {
        case 0:
          bytes[random.Below(size)] = static_cast<char>(random.Below(256));
          break;
        case 1:
          bytes.resize(random.Below(size));
          break;
        case 2:
          bytes.erase(random.Below(size), 1 + random.Below(4));
          break;
        default:
          bytes.insert(random.Below(size + 1), 1, "0123456789(),'{}<u"[random.Below(18)]);
      }
    }
    const auto array = ParseNpy("x", bytes);
    if (!array.ok()) continue;
    ++accepted;
    REQUIRE(array->data.size() == static_cast<size_t>(array->num_elements()) * SizeOf(array->type));
    REQUIRE(array->data.size() <= bytes.size());
  }
  REQUIRE(accepted > 0);  // a changed element is still an array
}

}  // namespace
}  // namespace ballast
