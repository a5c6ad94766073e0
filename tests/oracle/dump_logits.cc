// Writes the logits of a file of bytes, for comparison with another implementation.
//   dump_logits MODEL fp32|bf16 TOKENS OUT SEQUENCE_LENGTH CHUNK
// TOKENS: one byte per token, cut into sequences. OUT: fp32 [tokens, vocab].
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "tests/support/single_rank_model.h"

int main(int argc, char** argv) {
  using namespace ballast;
  if (argc != 7) {
    std::fprintf(stderr, "usage: dump_logits MODEL fp32|bf16 TOKENS OUT SEQUENCE_LENGTH CHUNK\n");
    return 2;
  }
  const DType dtype = std::string(argv[2]) == "bf16" ? DType::kBF16 : DType::kF32;
  auto model = testing::SingleRankModel::Load(argv[1], dtype, DefaultCpuKernels());
  auto text = ReadFile(argv[3], size_t{1} << 30);
  if (!model.ok() || !text.ok()) {
    const absl::Status status = model.ok() ? text.status() : model.status();
    std::fprintf(stderr, "dump_logits: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  std::ofstream out(argv[4], std::ios::binary);
  const size_t length = std::strtoul(argv[5], nullptr, 10);
  for (size_t begin = 0; begin < text->size(); begin += length) {
    std::vector<int32_t> tokens;
    for (size_t i = begin; i < std::min(begin + length, text->size()); ++i) {
      tokens.push_back(static_cast<unsigned char>((*text)[i]));
    }
    const auto logits = (*model)->Logits(tokens, std::atoi(argv[6]));
    if (!logits.ok()) {
      std::fprintf(stderr, "dump_logits: %s\n", std::string(logits.status().message()).c_str());
      return 1;
    }
    out.write(reinterpret_cast<const char*>(logits->data()),
              static_cast<std::streamsize>(logits->size() * sizeof(float)));
  }
  return out.good() ? 0 : 1;
}
