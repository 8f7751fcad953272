#!/usr/bin/env python3
"""Times a plain PyTorch training step of a GPT: what Phalanx's speed is measured against.

    step.py --shape 124m --micro-batch 16 --device cuda --dtype bf16 --compile [--out FILE]
    step.py --shape 124m --dtype bf16 --threads 1 --ranks 2             # on CPUs, DDP over gloo

A decoder as in GPT-2 and 3 (learned positions, pre-LN, tanh-GELU, tied head) as one would write it:
fused attention, autocast, clipping, torch's fused AdamW, random tokens. Prints one line, and writes
the JSON that `scripts/gpu-check` reads. Needs torch alone; on a CPU, threads are --threads.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import statistics
import sys
import time

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F

# n_layer, n_head, n_embd, seq_len, vocab_size
SHAPES = {
    "tiny": (2, 2, 64, 64, 257),
    "small": (6, 6, 384, 256, 257),
    "124m": (12, 12, 768, 1024, 50257),
    "350m": (24, 16, 1024, 2048, 50257),
    "1.3b": (24, 16, 2048, 2048, 50257),
    "2.7b": (32, 32, 2560, 2048, 50257),
}


class Block(nn.Module):
    def __init__(self, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.attn_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.mlp_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):  # [B, T, C]
        b, t, c = x.shape
        heads = self.c_attn(self.ln_1(x)).view(b, t, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)  # [B, H, T, D]
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, seq_len, vocab_size):
        super().__init__()
        padded = math.ceil(vocab_size / 128) * 128
        self.wte, self.wpe = nn.Embedding(padded, n_embd), nn.Embedding(seq_len, n_embd)
        self.blocks = nn.ModuleList(Block(n_head, n_embd) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * n_layer) if "proj" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, targets):  # [B, T] each
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


def step_seconds(args):
    n_layer, n_head, n_embd, seq_len, vocab_size = SHAPES[args.shape]
    torch.manual_seed(1337)
    with torch.device(args.device):
        model = Gpt(n_layer, n_head, n_embd, seq_len, vocab_size)
        tokens = torch.randint(vocab_size, (args.micro_batch, seq_len + 1))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if args.compile else model
    if args.ranks > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seconds = []
    for turn in range(args.warmup + args.steps):
        synchronize()
        started = time.perf_counter()
        loss = step()
        synchronize()
        if turn >= args.warmup:
            seconds.append(time.perf_counter() - started)
    if not math.isfinite(loss):
        sys.exit(f"step.py: the loss is {loss}")
    return seconds, args.micro_batch * seq_len, seq_len


def rank(number, args):
    """One of several: a process on a core of its own, rank 0 of which tells."""
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[number]])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.distributed.init_process_group("gloo", rank=number, world_size=args.ranks)
    tell(args, quiet=number > 0)
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description="Time a plain PyTorch training step of a GPT")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--threads", type=int, help="on a CPU; default: as torch has it")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--out", type=pathlib.Path, help="file for the result")
    parser.add_argument("--ranks", type=int, default=1, help="processes under DDP, each with a core of its own")
    parser.add_argument("--port", type=int, default=29533, help="where they meet")
    args = parser.parse_args()
    if args.ranks > 1:
        torch.multiprocessing.spawn(rank, (args,), nprocs=args.ranks)
    else:
        tell(args)


def tell(args, quiet=False):
    if args.threads:
        torch.set_num_threads(args.threads)

    seconds, tokens, seq_len = step_seconds(args)
    median = statistics.median(seconds)
    if quiet:
        return
    tokens *= args.ranks
    speed = {
        "system": "pytorch",
        "shape": args.shape,
        "micro_batch": args.micro_batch,
        "seq_len": seq_len,
        "dtype": args.dtype,
        "step_ms": 1e3 * median,
        "tokens_per_second": tokens / median,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "note": "torch.compile" if args.compile else "eager",
    }
    print(f"{args.shape} {args.dtype} {speed['note']}: {speed['step_ms']:.1f} ms a step,"
          f" {speed['tokens_per_second']:.0f} tokens/s")
    if args.out:
        args.out.write_text(json.dumps({"about": {"pytorch": torch.__version__}, "speeds": [speed]}))


if __name__ == "__main__":
    main()
