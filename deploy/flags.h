// Configuration of a sub-command: flag, then environment BALLAST_*, then JSON file, then default.
#ifndef BALLAST_DEPLOY_FLAGS_H_
#define BALLAST_DEPLOY_FLAGS_H_

#include <CLI/App.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace ballast {

// Gives every option of the sub-command its environment variable: --max-seqs is BALLAST_MAX_SEQS.
void NameEnvironment(CLI::App* command);

// Takes the values of a JSON file (comments allowed) as defaults: {"max-seqs": 32}.
// ERRORS kInvalidArgument names the file, the key and what is allowed
absl::Status ApplyConfigFile(const std::string& path, CLI::App* command);

// "; did you mean "serve"?" for the name that is nearest to a misspelt one, "" where none is near.
std::string NearestOf(const std::string& word, const std::vector<std::string>& names);

// What the parser says of a flag, with what it leaves out: which values are allowed, that a flag
// was given twice, and the environment variable that the value came from. `command` is the one
// chosen.
std::string Explain(const CLI::ParseError& error, const CLI::App& command, int argc, char** argv);

// The file that --config or BALLAST_CONFIG names, or "".
std::string FindConfigPath(int argc, char** argv);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_FLAGS_H_
