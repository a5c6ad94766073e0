#include "deploy/flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/file.h"
#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

// Number of single-letter edits between two words.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::string NearestOption(const std::string& key, const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    names.insert(names.end(), option->get_lnames().begin(), option->get_lnames().end());
  }
  return NearestOf(key, names);
}

// Whether the text has the flag as a word: "--port" is not in "--port-range".
bool Names(const std::string& text, const std::string& flag) {
  for (size_t at = text.find(flag); at != std::string::npos; at = text.find(flag, at + 1)) {
    const char next = at + flag.size() < text.size() ? text[at + flag.size()] : ' ';
    if (next != '-' && std::isalnum(static_cast<unsigned char>(next)) == 0) return true;
  }
  return false;
}

bool IsGiven(const std::string& flag, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == flag || argument.rfind(flag + "=", 0) == 0) return true;
  }
  return false;
}

}  // namespace

std::string NearestOf(const std::string& word, const std::vector<std::string>& names) {
  std::string nearest;
  size_t best = 4;
  for (const std::string& name : names) {
    const size_t distance = EditDistance(word, name);
    if (distance < best) best = distance, nearest = name;
  }
  return nearest.empty() ? "" : absl::StrCat("; did you mean \"", nearest, "\"?");
}

std::string Explain(const CLI::ParseError& error, const CLI::App& command, int argc, char** argv) {
  std::string text = error.what();
  const std::string once = ": At Most 1 required but received ";
  if (const size_t at = text.find(once); at != std::string::npos) {
    text = absl::StrCat(text.substr(0, at), " is given ", text.substr(at + once.size()),
                        " times, allowed: once");
  }
  for (const CLI::Option* option : command.get_options()) {
    if (option->get_lnames().empty()) continue;
    const std::string flag = "--" + option->get_lnames()[0];
    if (!Names(text, flag)) continue;
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::ConversionError)) {
      const bool takes_no_value = option->get_expected_max() == 0;
      absl::StrAppend(&text,
                      ", allowed: ", takes_no_value ? "true or false" : option->get_type_name());
    }
    const char* value = std::getenv(option->get_envname().c_str());
    if (value != nullptr && !IsGiven(flag, argc, argv)) {
      absl::StrAppend(&text, " (from ", option->get_envname(), ")");
    }
    return text;
  }
  if (error.get_exit_code() != static_cast<int>(CLI::ExitCodes::ExtrasError)) return text;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = std::string(argv[i]).substr(0, std::string(argv[i]).find('='));
    if (flag.rfind("--", 0) != 0 || command.get_option_no_throw(flag) != nullptr) continue;
    absl::StrAppend(&text, NearestOption(flag.substr(2), command));
  }
  return text;
}

void NameEnvironment(CLI::App* command) {
  for (CLI::Option* option : command->get_options()) {
    if (option->get_lnames().empty() || option->get_lnames()[0] == "help") continue;
    std::string name = "BALLAST_" + option->get_lnames()[0];
    for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(c));
    option->envname(name);
  }
}

absl::Status ApplyConfigFile(const std::string& path, CLI::App* command) {
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return absl::InvalidArgumentError(absl::StrCat("--config: cannot read ", path));
  if (JsonNestsTooDeep(*text)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--config: ", path, " nests deeper than ", kMostJsonDepth));
  }
  const auto json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false,
                                          /*ignore_comments=*/true);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat("--config: ", path, " is not a JSON object"));
  }
  for (const auto& [key, value] : json.items()) {
    CLI::Option* option =
        key == "config" || key == "help" ? nullptr : command->get_option_no_throw("--" + key);
    if (option == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": unknown key \"", key, "\"", NearestOption(key, *command)));
    }
    if (value.is_structured() || value.is_null()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": \"", key, "\" is ", value.dump(),
                                                     ", allowed: a text, a number, true or false"));
    }
    const bool takes_no_value = option->get_expected_max() == 0;
    if (takes_no_value && !value.is_boolean()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": \"", key, "\" is ", value.dump(), ", allowed: true or false"));
    }
    try {
      // What the file gives need not be given again.
      option->required(false);
      option->default_val(value.is_string() ? value.get<std::string>() : value.dump());
      option->required(false);  // it has its value
    } catch (const CLI::Error& error) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.what()));
    }
  }
  return absl::OkStatus();
}

std::string FindConfigPath(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--config" && i + 1 < argc) return argv[i + 1];
    if (argument.rfind("--config=", 0) == 0) return argument.substr(9);
  }
  const char* from_environment = std::getenv("BALLAST_CONFIG");
  return from_environment != nullptr ? from_environment : "";
}

}  // namespace ballast
