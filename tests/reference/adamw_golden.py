"""Golden values of AdamW: ten steps of `torch.optim.AdamW` on given gradients.

A matrix with weight decay and a bias without, as in GPT training. Knows nothing of models.
"""

import numpy
import torch

import golden

SEED = 20240621
STEPS = 10
SHAPES = {"matrix": [13, 7], "bias": [13]}
DECAY = {"matrix": 0.1, "bias": 0.0}
OPTIM = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}


def random_inputs(rng):
    """Parameters before the first step, and a gradient of each for every step.

    Row r of a gradient is about 10^-r, so that some rows are ruled by the moments, some by eps, and
    the last is exactly zero: there nothing moves but the decay.
    """
    inputs = {}
    for name, shape in SHAPES.items():
        scale = 10.0 ** -numpy.arange(shape[0])
        scale[-1] = 0.0
        scale = scale.reshape([-1] + [1] * (len(shape) - 1))
        inputs[f"param.{name}"] = rng.standard_normal(shape)
        inputs[f"grads.{name}"] = rng.standard_normal([STEPS, *shape]) * scale
    return {name: torch.from_numpy(values.astype(numpy.float32)) for name, values in inputs.items()}


def by_torch(inputs, dtype):
    """Parameters and both moments after each step, stacked: [STEPS, ...]."""
    tensors = {name: inputs[f"param.{name}"].to(dtype, copy=True).requires_grad_() for name in SHAPES}
    groups = [{"params": [tensors[name]], "weight_decay": DECAY[name]} for name in SHAPES]
    betas = tuple(OPTIM["betas"])
    optim = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=betas, eps=OPTIM["eps"], fused=False, foreach=False)
    after = {f"{kind}.{name}": [] for kind in ("params", "exp_avg", "exp_avg_sq") for name in SHAPES}
    for step in range(STEPS):
        for name, tensor in tensors.items():
            tensor.grad = inputs[f"grads.{name}"][step].to(dtype)
        optim.step()
        for name, tensor in tensors.items():
            after[f"params.{name}"].append(tensor.detach().clone())
            after[f"exp_avg.{name}"].append(optim.state[tensor]["exp_avg"].clone())
            after[f"exp_avg_sq.{name}"].append(optim.state[tensor]["exp_avg_sq"].clone())
    return {name: torch.stack(values) for name, values in after.items()}


def make(checking):
    """The one golden file."""
    inputs = random_inputs(numpy.random.default_rng(SEED))
    single, double = by_torch(inputs, torch.float32), by_torch(inputs, torch.float64)
    about = {"seed": SEED, "optim": OPTIM, "weight_decay": DECAY, "model": "torch.optim.AdamW(fused=False)"}
    golden.write_or_check("adamw.safetensors", inputs, single, double, about, checking)


if __name__ == "__main__":
    golden.main(make)
