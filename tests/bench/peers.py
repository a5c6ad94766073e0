"""Measures the work of `ballast bench gpu` in PyTorch, on the same device, and sets the two side by side.

  peers.py [--device cuda] [--small] >peers.json
  peers.py --merge gpu-results.json peers.json        prints a table

A layer is what deploy/gpu/bench_layer.cc launches for one rank: logits in fp32, sigmoid scores with groups, experts in
bf16, sums in fp32 in the order of the choices. `loop` goes over the experts one by one, as most model code does;
`grouped` sorts the rows by expert and has one grouped product for all, where this PyTorch has one for the device. A
grouped layer is replayed as a CUDA graph where it can be captured; the loop asks the device how many rows each expert
has, so it cannot. Beside them one large bf16 product, as what the device can do at most.

Needs PyTorch, which nothing else of Ballast does; --merge needs Python alone. --small: shapes for a processor.
"""

import argparse
import json
import re
import statistics
import sys
import time

# As in deploy/gpu/bench_layer.cc: hidden, inter, experts, top_k, groups, top_groups, scale.
MODELS = {
    "DeepSeek-V3": (7168, 2048, 256, 8, 8, 4, 2.5),
    "Qwen3-30B-A3B": (2048, 768, 128, 8, 1, 1, 1.0),
    "OLMoE": (2048, 1024, 64, 8, 1, 1, 1.0),
}
TOKENS = (128, 4096)
SMALL_MODELS = {"small": (64, 32, 8, 2, 4, 2, 1.0)}
SMALL_TOKENS = (12,)
WARM_UP, REPEAT = 3, 30


class Layer:
    """Random parameters and tokens of one layer, and the two ways to compute it."""

    def __init__(self, torch, shape, tokens, device):
        self.torch = torch
        hidden, inter, self.experts, self.top_k, self.groups, self.top_groups, self.scale = shape
        generator = torch.Generator(device=device).manual_seed(20260801)

        def noise(most, *size, dtype):
            values = torch.empty(size, dtype=dtype, device=device)
            return values.uniform_(-most, most, generator=generator)

        self.router = noise(3 / hidden**0.5, self.experts, hidden, dtype=torch.float32)
        self.bias = torch.zeros(self.experts, device=device)
        self.gate_up = noise(1 / 32, self.experts, 2 * inter, hidden, dtype=torch.bfloat16)
        self.down = noise(1 / 32, self.experts, hidden, inter, dtype=torch.bfloat16)
        self.x32 = noise(1.0, tokens, hidden, dtype=torch.float32)
        self.x16 = self.x32.to(torch.bfloat16)
        self.base = torch.zeros(tokens, hidden, device=device)

    def route(self):
        """ids and weights [T, K]"""
        scores = (self.x32 @ self.router.T).sigmoid()
        choice = scores + self.bias
        if self.groups > 1:
            by_group = choice.view(len(choice), self.groups, -1)
            best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            taken = self.torch.zeros_like(by_group[..., 0], dtype=self.torch.bool).scatter(1, best, True)
            choice = by_group.masked_fill(~taken[..., None], float("-inf")).view_as(choice)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale

    def activate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.torch.nn.functional.silu(gate) * up

    def loop(self):
        ids, weights = self.route()
        out = self.base.clone()
        for expert in range(self.experts):
            token, k = (ids == expert).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            y = self.activate(self.x16[token] @ self.gate_up[expert].T) @ self.down[expert].T
            out.index_add_(0, token, y.float() * weights[token, k, None])
        return out

    def grouped(self):
        ids, weights = self.route()
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = self.torch.zeros(self.experts, dtype=self.torch.int32, device=flat.device)
        counts.scatter_add_(0, flat, self.torch.ones_like(flat, dtype=self.torch.int32))
        ends = counts.cumsum(0, dtype=self.torch.int32)
        product = getattr(self.torch.nn.functional, "grouped_mm", None) or self.torch._grouped_mm
        rows = self.x16[order // self.top_k]
        rows = self.activate(product(rows, self.gate_up.transpose(1, 2), offs=ends))
        rows = product(rows, self.down.transpose(1, 2), offs=ends)
        back = self.torch.empty_like(order).scatter_(0, order, self.torch.arange(len(order), device=order.device))
        copies = rows[back].view(*ids.shape, -1).float()
        return self.base + (copies * weights[..., None]).sum(1)


def captured(torch, work, device):
    """The work as a replay of a CUDA graph, or itself where it cannot be captured; and whether it is."""
    if device != "cuda":
        return work, False
    try:
        for _ in range(WARM_UP):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
        return work, False


def measure(torch, work, device):
    """Median and spread (p90 - p10) in microseconds."""
    times = []
    for i in range(-WARM_UP, REPEAT):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            us = begin.elapsed_time(end) * 1e3
        else:
            begin = time.perf_counter()
            work()
            us = (time.perf_counter() - begin) * 1e6
        if i >= 0:
            times.append(us)
    times.sort()
    return statistics.median(times), times[len(times) * 9 // 10] - times[len(times) // 10]


def measure_layer(torch, model, shape, tokens, device):
    layer = Layer(torch, shape, tokens, device)
    expected = layer.loop()
    rows = []
    for name, work in (("loop", layer.loop), ("grouped", layer.grouped)):
        row = {"name": name, "model": model, "tokens": tokens}
        rows.append(row)
        try:
            out = work()
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            row["absent"] = re.split(r"\.\s|\n", str(error))[0]
            continue
        # The two round alike but for the order of a product's sums.
        worst = ((out - expected).abs().max() / expected.abs().max()).item()
        if not worst < 0.02:
            raise SystemExit(f"peers.py: {name} of {model} differs from the loop by {worst} of the largest sum")
        if name == "grouped":
            work, row["graph"] = captured(torch, work, device)
        row["median_us"], row["spread_us"] = measure(torch, work, device)
    return rows


def measure_all(device, small):
    import torch

    torch.set_grad_enabled(False)
    n = 256 if small else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) / 8 for _ in range(2))
    median_us, spread_us = measure(torch, lambda: a @ b, device)
    rows = []
    for model, shape in (SMALL_MODELS if small else MODELS).items():
        for tokens in SMALL_TOKENS if small else TOKENS:
            rows += measure_layer(torch, model, shape, tokens, device)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "matmul": {"n": n, "median_us": median_us, "spread_us": spread_us, "flops": 2 * n**3},
        "rows": rows,
    }


def table(ours, peers):
    """Markdown: every row of ours that computes, over what PyTorch needs for the same."""
    matmul = peers["matmul"]
    ceiling = matmul["flops"] / matmul["median_us"]
    theirs = {(row["model"], row["tokens"], row["name"]): row for row in peers["rows"]}
    lines = [
        f"PyTorch {peers['torch']} on {peers['device']}: a bf16 product of {matmul['n']}^3 at "
        f"{ceiling / 1e6:.1f} TFLOP/s; in brackets, how many times as long as ours",
        "| row | shape | ours us | of the large product | loop us | grouped us |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ours["rows"]:
        if row["flops"] == 0:
            continue
        cells = [row["name"], row["shape"], f"{row['median_us']:.2f}"]
        cells.append(f"{row['flops'] / row['median_us'] / ceiling:.3f}")
        layer = re.fullmatch(r"(\S+) (\d+) ranks? x (\d+) tokens", row["shape"])
        for name in ("loop", "grouped"):
            peer = None
            if row["name"] == "layer" and layer:
                peer = theirs.get((layer[1], int(layer[2]) * int(layer[3]), name))
            if peer is None:
                cells.append("")
            elif "absent" in peer:
                cells.append("absent")
            else:
                ratio = peer["median_us"] / row["median_us"]
                eager = ", no graph" if peer.get("graph") is False else ""
                cells.append(f"{peer['median_us']:.2f} ({ratio:.2f}{eager})")
        lines.append("| " + " | ".join(cells) + " |")
    for why in sorted({f"{row['name']}: {row['absent']}" for row in peers["rows"] if "absent" in row}):
        lines += ["", f"Absent: {why}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--merge", nargs=2, metavar=("OURS", "PEERS"))
    args = parser.parse_args()
    if args.merge:
        ours, peers = (json.load(open(path, encoding="utf-8")) for path in args.merge)
        print(table(ours, peers))
    else:
        json.dump(measure_all(args.device, args.small), sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
