"""Trains the demo model on DATA and writes checkpoints to RUN; started again, it goes on from the last one.

  train.py DATA RUN [--steps N] [--threads N]
"""

import argparse
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

from model import Model, Shape

DOMAINS = ("english", "code", "japanese", "structured")
BIAS_RATE = 1e-3  # u of Algorithm 1
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
SAVE_EVERY = 100
LENGTHS = ((0.0, 256), (0.5, 512), (0.88, 1024))  # from this share of the steps on, sequences of this many tokens


def load(data: str, part: str):
    return {d: np.fromfile(os.path.join(data, f"{d}.{part}.bin"), dtype=np.uint8) for d in DOMAINS}


def batch(streams, step: int, tokens: int, length: int):
    """Sequences of one domain each, the domains in equal shares; a function of the step alone."""
    rng = np.random.default_rng((20260, step))
    rows = []
    for i in range(tokens // length):
        stream = streams[DOMAINS[(i + step) % len(DOMAINS)]]
        at = int(rng.integers(0, len(stream) - length - 1))
        rows.append(stream[at : at + length + 1])
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return ids[:, :-1], ids[:, 1:]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("data")
    args.add_argument("run")
    args.add_argument("--steps", type=int, default=4000)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--batch-tokens", type=int, default=4096)
    args = args.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    os.makedirs(args.run, exist_ok=True)
    shape = Shape()
    model = Model(shape)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    path, step = os.path.join(args.run, "checkpoint.pt"), 0
    if os.path.exists(path):
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print("resumed at step", step, flush=True)
    streams = load(args.data, "train")
    began, seen, average = time.time(), 0, None
    while step < args.steps:
        length = max(tokens for share, tokens in LENGTHS if step >= share * args.steps)
        x, y = batch(streams, step, args.batch_tokens, length)
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS)
        rate *= 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update_bias(BIAS_RATE)
        step += 1
        seen += x.numel()
        bits = loss.item() / math.log(2)
        average = bits if average is None else 0.98 * average + 0.02 * bits
        if step % 20 == 0:
            worst = max(float(m.counts.max() / m.counts.mean()) - 1 for m in model.moe_layers())
            print(f"step {step}/{args.steps}  bits per byte {average:.4f}  MaxVio of the batch {worst:.3f}  "
                  f"{seen / (time.time() - began):.0f} tokens/s", flush=True)
        if step % SAVE_EVERY == 0 or step == args.steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                        "shape": vars(shape), "tokens": step * args.batch_tokens}, path + ".new")
            os.replace(path + ".new", path)
    json.dump({"steps": step, "batch_tokens": args.batch_tokens}, open(os.path.join(args.run, "done.json"), "w"))


if __name__ == "__main__":
    main()
