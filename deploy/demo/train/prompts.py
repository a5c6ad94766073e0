"""Writes samples of the held-out text as the demo's prompts: OUT/<domain>.txt, about 60 KB each.  prompts.py DATA OUT"""

import os
import sys

from train import DOMAINS

BYTES = 60_000


def main(data, out):
    os.makedirs(out, exist_ok=True)
    for domain in DOMAINS:
        blocks = open(os.path.join(data, f"{domain}.heldout.bin"), "rb").read().strip(b"\0").split(b"\0")
        step = max(1, len(blocks) * 4096 // BYTES)
        text = b"".join(blocks[::step])[:BYTES].decode("utf-8", errors="ignore")
        with open(os.path.join(out, f"{domain}.txt"), "w", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
