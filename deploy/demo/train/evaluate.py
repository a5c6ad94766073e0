"""Exports the trained model and writes its card: held-out bits per byte, balance, and whether its text is of its domain.

  evaluate.py DATA RUN OUT
"""

import json
import os
import sys
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from model import Model, Shape, export
from train import BIAS_RATE, DOMAINS, load

HELDOUT_TOKENS = 65_536
ORDER_TOKENS = 65_536  # of training text per domain, to learn which domain uses an expert most
LENGTH = 1024
RANKS = 4
SAMPLES_PER_DOMAIN = 25
SAMPLE_PROMPT_BYTES, SAMPLE_BYTES = 128, 192


@torch.no_grad()
def measure(model, stream, tokens):
    """Bits per byte, and tokens per (MoE layer, expert)."""
    count = min(tokens, len(stream) - 1) // LENGTH
    counts = [torch.zeros(model.s.experts) for _ in model.moe_layers()]
    total = 0.0
    for i in range(count):
        piece = torch.from_numpy(stream[i * LENGTH : (i + 1) * LENGTH + 1].astype(np.int64))
        logits = model(piece[None, :-1])
        total += F.cross_entropy(logits[0].float(), piece[1:], reduction="sum").item()
        for layer, moe in enumerate(model.moe_layers()):
            counts[layer] += moe.counts
    return total / (count * LENGTH) / np.log(2), torch.stack(counts)


def max_violation(counts):
    return (counts.max(1).values / counts.mean(1) - 1).mean().item()


def rank_imbalance(counts):
    """Largest over mean rank load with the experts in order on RANKS ranks, mean over layers."""
    load = counts.view(counts.shape[0], RANKS, -1).sum(2)
    return (load.max(1).values / load.mean(1)).mean().item()


@torch.no_grad()
def generate(model, prompts, count, generator):
    """Continues prompts of one length, all at once."""
    ids = torch.tensor(prompts)
    for _ in range(count):
        logits = model(ids)[:, -1].float() / 0.8
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return [bytes(row[len(prompts[0]):].tolist()) for row in ids]


def order_experts(model, train):
    """Renumbers the experts of each layer by the domain that uses them most: the function stays the same.

    The order in which training leaves the experts is arbitrary. In this one, neighbours are busy at the same time, as
    in models with expert groups, and the contiguous placement that every engine starts from feels a change of domain.
    """
    share = torch.stack([measure(model, train[d], ORDER_TOKENS)[1] for d in DOMAINS])  # [domain, layer, expert]
    for layer, moe in enumerate(model.moe_layers()):
        order = share[:, layer].argmax(0).argsort(stable=True)
        moe.bias = moe.bias[order]
        for p in (moe.router, moe.gate_up, moe.down):
            p.data = p.data[order]


def trigrams(data):
    return Counter(data[i : i + 3] for i in range(len(data) - 2))


class TrigramClassifier:
    """Names the domain whose training text makes the byte trigrams of a sample most probable."""

    def __init__(self, texts):
        self.counts = {d: trigrams(t) for d, t in texts.items()}
        self.totals = {d: sum(c.values()) for d, c in self.counts.items()}

    def __call__(self, sample):
        def score(d):
            return sum(n * np.log((self.counts[d][t] + 0.1) / self.totals[d]) for t, n in trigrams(sample).items())
        return max(self.counts, key=score)


def main(data, run, out):
    torch.manual_seed(1)
    state = torch.load(os.path.join(run, "checkpoint.pt"))
    model = Model(Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    heldout, train = load(data, "heldout"), load(data, "train")
    order_experts(model, train)
    export(model, out)
    # What is measured is what is shipped: parameters rounded to bf16, biases in fp32.
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    results, total = {}, 0
    for d in DOMAINS:
        bits, counts = measure(model, heldout[d], HELDOUT_TOKENS)
        total = total + counts / counts.sum()
        results[d] = {"bits_per_byte": round(bits, 3), "max_violation": round(max_violation(counts), 3),
                      "static_imbalance_4_ranks": round(rank_imbalance(counts), 3)}
    results["mix"] = {"max_violation": round(max_violation(total), 3),
                      "static_imbalance_4_ranks": round(rank_imbalance(total), 3)}
    classify = TrigramClassifier({d: bytes(train[d][:1_000_000]) for d in DOMAINS})
    generator = torch.Generator().manual_seed(7)
    right = 0
    for d in DOMAINS:
        step = (len(heldout[d]) - SAMPLE_PROMPT_BYTES) // SAMPLES_PER_DOMAIN
        prompts = [heldout[d][i * step : i * step + SAMPLE_PROMPT_BYTES].tolist() for i in range(SAMPLES_PER_DOMAIN)]
        right += sum(classify(text) == d for text in generate(model, prompts, SAMPLE_BYTES, generator))
    write_card(data, out, state, results, right)
    print(json.dumps(results, indent=1), "domain recognised:", right)


def write_card(data, out, state, results, right):
    sources = json.load(open(os.path.join(data, "sources.json")))
    shape = state["shape"]
    lines = [
        "# The demo model", "",
        f"A byte-level Mixture-of-Experts language model in the `glm4_moe` architecture: {shape['layers']} layers "
        f"({shape['layers'] - shape['dense_layers']} of them MoE), hidden {shape['hidden']}, {shape['experts']} routed "
        f"experts of {shape['moe_inter']}, top-{shape['top_k']}, {shape['shared_experts']} shared expert, "
        f"{shape['heads']} query and {shape['kv_heads']} key-value heads of {shape['head_dim']}, context "
        f"{shape['context']}. A token is a byte; 0 starts and ends a document.", "",
        "It exists to be served in the demonstration and the tests. It writes text that looks like its training text, "
        "and knows nothing.", "",
        f"**Training.** {state['step']} steps of {state['tokens'] // state['step']} tokens, the four domains in equal "
        f"shares, AdamW, cosine schedule. Balanced without an auxiliary loss: Algorithm 1 of arXiv 2408.15664, a bias "
        f"per expert, `b += u * sign(mean - load)` with u = {BIAS_RATE:g} after every step, for selection only. "
        "Parameters are bf16, the correction biases fp32. The export numbers the experts of a layer by the domain that "
        "uses them most; the order that training leaves is arbitrary, and the function does not depend on it.", "",
        "## Data", "", "| domain | Debian package | version | licence | training bytes | held-out bytes |",
        "|---|---|---|---|---|---|"]
    for d, s in sources.items():
        lines.append(f"| {d} | {s['package']} | {s['version']} | {s['licence']} | {s['train_bytes']:,} | "
                     f"{s['heldout_bytes']:,} |")
    lines += ["", "Every 20th block of about 4 KiB is held out. `deploy/demo/prompts/` holds samples of the held-out "
              "blocks.", "", "## Measured on held-out text", "",
              f"Up to {HELDOUT_TOKENS:,} tokens a domain, sequences of {LENGTH}. MaxVio is (largest - mean) / mean of the "
              f"experts' loads, mean over layers; imbalance is largest over mean rank load with the experts in order on "
              f"{RANKS} ranks.", "", "| text | bits per byte | MaxVio | imbalance at 4 ranks, static |", "|---|---|---|---|"]
    for d, r in results.items():
        lines.append(f"| {d} | {r.get('bits_per_byte', '')} | {r['max_violation']} | {r['static_imbalance_4_ranks']} |")
    lines += ["", f"A byte-trigram classifier names the right domain for {right} of {4 * SAMPLES_PER_DOMAIN} samples of "
              f"{SAMPLE_BYTES} bytes at temperature 0.8, each prompted with {SAMPLE_PROMPT_BYTES} held-out bytes.", "",
              "## Again from nothing", "", "`deploy/demo/train/train.sh` installs the packages and a Python environment, "
              "and runs corpus, training and this evaluation.", ""]
    with open(os.path.join(out, "README.md"), "w") as f:
        f.write("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
