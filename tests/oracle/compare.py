"""Compares Ballast's logits with those of `transformers` on the same checkpoint.

  compare.py DUMP_LOGITS MODEL PROMPTS_DIR [--write-sample FILE]

DUMP_LOGITS is the program build/cpu/dump_logits. Needs the packages of deploy/demo/train/requirements.txt in a virtual
environment; nothing else of Ballast does. Prints one line per check and exits 1 if a bound is broken.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import Glm4MoeForCausalLM

LENGTH, SEQUENCES_PER_DOMAIN, CHUNK = 640, 1, 100
SAMPLE_EVERY = 40


def main():
    args = argparse.ArgumentParser()
    args.add_argument("dump_logits")
    args.add_argument("model")
    args.add_argument("prompts")
    args.add_argument("--write-sample")
    args = args.parse_args()

    tokens = b""
    for name in sorted(os.listdir(args.prompts)):
        text = open(os.path.join(args.prompts, name), "rb").read()
        for i in range(SEQUENCES_PER_DOMAIN):
            tokens += (b"\0" + text[i * LENGTH :])[:LENGTH]
    ids = torch.tensor(list(tokens)).view(-1, LENGTH)
    oracle_model = Glm4MoeForCausalLM.from_pretrained(args.model, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        oracle = torch.cat([oracle_model(row[None]).logits[0] for row in ids]).numpy()

    failed = False

    def check(name, value, bound, good):
        nonlocal failed
        failed = failed or not good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {value} (bound {bound})")

    def bits_per_byte(logits):
        logp = torch.log_softmax(torch.from_numpy(logits).double().view(len(ids), LENGTH, -1), -1)
        return -logp[:, :-1].gather(2, ids[:, 1:, None]).mean().item() / np.log(2)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens")
        open(path, "wb").write(tokens)

        def ours(dtype):
            out = os.path.join(folder, dtype)
            subprocess.run([args.dump_logits, args.model, dtype, path, out, str(LENGTH), str(CHUNK)], check=True)
            return np.fromfile(out, dtype=np.float32).reshape(oracle.shape)

        fp32, bf16 = ours("fp32"), ours("bf16")
    print(f"{len(oracle)} positions, oracle {bits_per_byte(oracle):.4f} bits per byte")
    difference = np.abs(fp32 - oracle).max()
    check("fp32: largest difference of a logit", f"{difference:.2e}", 1e-3, difference < 1e-3)
    top, top_ours = oracle.argmax(1), bf16.argmax(1)
    same = (top == top_ours).mean()
    check("bf16: same top-1", f"{same:.4f}", 0.98, same >= 0.98)
    rows = np.nonzero(top != top_ours)[0]
    gap = (oracle[rows, top[rows]] - oracle[rows, top_ours[rows]]).max() if len(rows) else 0.0
    check("bf16: largest fp32 gap where top-1 differs", f"{gap:.4f}", 0.25, gap <= 0.25)
    ratio = abs(bits_per_byte(bf16) / bits_per_byte(oracle) - 1)
    check("bf16: bits per byte, relative difference", f"{ratio:.5f}", 0.005, ratio <= 0.005)

    if args.write_sample:
        # [number of tokens, vocab, sequence length, every n-th position] int32, tokens u8, logits fp32
        with open(args.write_sample, "wb") as f:
            np.array([len(tokens), oracle.shape[1], LENGTH, SAMPLE_EVERY], dtype=np.int32).tofile(f)
            f.write(tokens)
            oracle[::SAMPLE_EVERY].astype(np.float32).tofile(f)
    sys.exit(failed)


if __name__ == "__main__":
    main()
