// A mutation fuzzer for what people and other ranks hand to Ballast. The same seed tries the same
// inputs on every machine. As a test it makes a bounded number of runs; --runs makes more.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "tests/fuzz/targets.h"
#include "tests/support/temp_folder.h"

namespace ballast::fuzz {
namespace {

struct Flags {
  uint64_t runs = 2'000;
  uint64_t seed = 1;
  std::string target;
};

// Printable, for a report.
std::string Escape(const std::string& input) {
  constexpr size_t kLongest = 4'000;
  std::string text;
  for (const char c : input.substr(0, kLongest)) {
    char code[8];
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= ' ' && byte < 0x7f && c != '\\') {
      text += c;
    } else {
      std::snprintf(code, sizeof code, "\\x%02x", byte);
      text += code;
    }
  }
  return text + (input.size() > kLongest ? "..." : "");
}

// Tries `runs` inputs; false when one of them is taken or refused in a wrong way.
bool Fuzz(const Target& target, const Flags& flags) {
  for (uint64_t run = 0; run < flags.runs + target.seeds.size(); ++run) {
    // Every run has random numbers of its own: one can be repeated without those before it.
    Random random(RandomBits(flags.seed, run));
    const auto pick = [&] {
      return target.seeds[random.Below(static_cast<uint32_t>(target.seeds.size()))];
    };
    const bool whole = run < target.seeds.size();  // the seeds themselves come first
    std::string input = whole ? target.seeds[run] : pick();
    if (!whole) input = Mutate(input, pick(), random);
    const std::string wrong = target.check(input, random);
    if (wrong.empty()) continue;
    std::printf("%s: run %llu of seed %llu: %s\ninput: %s\n", target.name.c_str(),
                static_cast<unsigned long long>(run), static_cast<unsigned long long>(flags.seed),
                wrong.c_str(), Escape(input).c_str());
    return false;
  }
  std::printf("%s: %llu runs\n", target.name.c_str(), static_cast<unsigned long long>(flags.runs));
  return true;
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Feeds broken input to the parsers of Ballast");
  app.option_defaults()->always_capture_default();
  app.add_option("--runs", flags.runs, "Inputs for each parser");
  app.add_option("--seed", flags.seed, "Of the random numbers");
  app.add_option("--target", flags.target, "Only this parser");
  CLI11_PARSE(app, argc, argv);
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // a crash keeps what was said before it
  const ballast::testing::TempFolder folder;
  bool good = true, any = false;
  for (const Target& target : MakeTargets(folder.path())) {
    if (!flags.target.empty() && target.name != flags.target) continue;
    any = true;
    good = Fuzz(target, flags) && good;
  }
  return good && any ? 0 : 1;
}

}  // namespace
}  // namespace ballast::fuzz

int main(int argc, char** argv) {
  return ballast::fuzz::Main(argc, argv);
}
