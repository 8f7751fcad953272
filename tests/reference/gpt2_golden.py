"""Golden values of a small GPT-2: logits, loss and every gradient, dense and with one banded layer.

`gpt2-tiny` is computed by `transformers`' GPT2LMHeadModel, `gpt2-tiny-banded` by the model written out
below, which must equal transformers' when its window is as long as the sequence. Knows nothing of
Phalanx's code; only the names and layouts of GPT-2 checkpoints are shared, with matrices as [out, in].

Shapes: B rows, T positions, C = n_embd, H heads, V tokens.
"""

import numpy
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_utils import ForCausalLMLoss

import golden

SEED = 20240620
CONFIG = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": 48,
    "vocab_size": 257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Window in keys, self included, of each layer; None is dense.
DENSE = [None, None, None]
BANDED = [None, 7, None]

# What transformers' Conv1D keeps as [in, out].
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def shapes():
    """Name and shape of every parameter, in the order of the forward pass. Matrices are [out, in]."""
    c = CONFIG["n_embd"]
    named = [("wte.weight", [CONFIG["vocab_size"], c]), ("wpe.weight", [CONFIG["n_positions"], c])]
    for i in range(CONFIG["n_layer"]):
        named += [
            (f"h.{i}.ln_1.weight", [c]),
            (f"h.{i}.ln_1.bias", [c]),
            (f"h.{i}.attn.c_attn.weight", [3 * c, c]),
            (f"h.{i}.attn.c_attn.bias", [3 * c]),
            (f"h.{i}.attn.c_proj.weight", [c, c]),
            (f"h.{i}.attn.c_proj.bias", [c]),
            (f"h.{i}.ln_2.weight", [c]),
            (f"h.{i}.ln_2.bias", [c]),
            (f"h.{i}.mlp.c_fc.weight", [4 * c, c]),
            (f"h.{i}.mlp.c_fc.bias", [4 * c]),
            (f"h.{i}.mlp.c_proj.weight", [c, 4 * c]),
            (f"h.{i}.mlp.c_proj.bias", [c]),
        ]
    return named + [("ln_f.weight", [c]), ("ln_f.bias", [c])]


def random_parameters(rng):
    """fp32 parameters of which none is trivial, so that a term left out shows.

    Gains lie around 1, biases around 0, matrices have deviation 0.08 and qkv twice that: attention is
    then far from uniform and the activation is used on both sides of zero.
    """
    parameters = {}
    for name, shape in shapes():
        values = rng.standard_normal(shape)
        if name.endswith(".bias"):
            values = 0.1 * values
        elif ".ln_" in name or name.startswith("ln_"):
            values = 1.0 + 0.2 * values
        elif name.endswith("attn.c_attn.weight"):
            values = 0.16 * values
        else:
            values = 0.08 * values
        parameters[name] = torch.from_numpy(values.astype(numpy.float32))
    return parameters


def random_tokens(rng, rows):
    """[rows, T + 1] token ids. The first and the last id occur both as inputs and as targets."""
    tokens = torch.from_numpy(rng.integers(0, CONFIG["vocab_size"], (rows, CONFIG["n_positions"] + 1)))
    tokens[0, 10], tokens[0, 20] = 0, CONFIG["vocab_size"] - 1
    return tokens


def mean_loss(logits, tokens):
    """Mean nats per target: position t is asked for token t + 1, and every position has a target."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def results(logits, loss, gradients):
    """The results under the names they have in the golden file."""
    named = {f"grad.{name}": gradient for name, gradient in gradients.items()}
    return {"logits": logits.detach(), "loss": loss.detach().reshape(1), **named}


def by_transformers(parameters, tokens, dtype):
    """GPT2LMHeadModel from the same fp32 parameters, computed in `dtype`."""
    config = GPT2Config(**CONFIG, use_cache=False, attn_implementation="eager")
    model = GPT2LMHeadModel(config).to(dtype).train()
    theirs = dict(model.transformer.named_parameters())
    if theirs.keys() != parameters.keys() or model.lm_head.weight is not model.transformer.wte.weight:
        raise golden.Mismatch("GPT2LMHeadModel has other parameters than this script")
    with torch.no_grad():
        for name, tensor in parameters.items():
            theirs[name].copy_(tensor.T if name.endswith(CONV1D) else tensor)

    logits = model(input_ids=tokens[:, :-1]).logits
    loss = mean_loss(logits, tokens)
    if dtype == torch.float32:  # transformers computes its own loss in fp32 whatever the model
        own = ForCausalLMLoss(logits, None, CONFIG["vocab_size"], shift_labels=tokens[:, 1:].contiguous())
        if golden.distance(own, loss) > golden.TRUTH_TOLERANCE:
            raise golden.Mismatch(f"transformers has the loss {own.item()}, this script {loss.item()}")
    loss.backward()
    gradients = {n: p.grad.T if n.endswith(CONV1D) else p.grad for n, p in theirs.items()}
    return results(logits, loss, gradients)


def by_hand(parameters, tokens, windows, dtype):
    """The same model written out, with an explicit [T, T] mask for each layer."""
    p = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in parameters.items()}
    steps = CONFIG["n_positions"]
    x = F.embedding(tokens[:, :-1], p["wte.weight"]) + p["wpe.weight"]  # [B, T, C]
    for i, window in enumerate(windows):
        block = {name.removeprefix(f"h.{i}."): t for name, t in p.items() if name.startswith(f"h.{i}.")}
        x = x + attention(block, layer_norm(x, block, "ln_1"), allowed(steps, window))
        hidden = F.linear(layer_norm(x, block, "ln_2"), block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])
        x = x + F.linear(gelu_tanh(hidden), block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    logits = F.linear(layer_norm(x, p, "ln_f"), p["wte.weight"])  # [B, T, V]
    loss = mean_loss(logits, tokens)
    loss.backward()
    return results(logits, loss, {name: tensor.grad for name, tensor in p.items()})


def allowed(steps, window):
    """[T, T], true where query q (row) sees key k: k <= q, and q - k < window if there is one."""
    q, k = torch.arange(steps)[:, None], torch.arange(steps)[None, :]
    return (k <= q) & (q - k < (window or steps))


def attention(block, x, mask):
    """Multi-head self-attention, [B, T, C] to [B, T, C]. qkv is one matrix: q, then k, then v."""
    b, t, c = x.shape
    heads = CONFIG["n_head"]
    qkv = F.linear(x, block["attn.c_attn.weight"], block["attn.c_attn.bias"])
    q, k, v = (part.view(b, t, heads, c // heads).transpose(1, 2) for part in qkv.split(c, dim=2))
    scores = q @ k.transpose(2, 3) / (c // heads) ** 0.5  # [B, H, T, T]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=3)
    y = (weights @ v).transpose(1, 2).reshape(b, t, c)
    return F.linear(y, block["attn.c_proj.weight"], block["attn.c_proj.bias"])


def layer_norm(x, p, name):
    """Mean and biased variance over C; epsilon is inside the root."""
    centred = x - x.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)
    normal = centred / (variance + CONFIG["layer_norm_epsilon"]).sqrt()
    return normal * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu_tanh(x):
    """GPT-2's approximation of GELU (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def require_equal(ours, theirs):
    """The model written out must be transformers' model before its banded results mean anything."""
    for name in theirs:
        far = golden.distance(ours[name], theirs[name])
        if not far <= 1e-12:
            raise golden.Mismatch(f"{name}: the model written out is {far:.2e} from transformers' in float64")


def make(checking):
    """Both golden files, from one set of parameters."""
    rng = numpy.random.default_rng(SEED)
    parameters = random_parameters(rng)
    few, more = random_tokens(rng, 2), random_tokens(rng, 4)
    named = {f"param.{name}": tensor for name, tensor in parameters.items()}

    single = by_transformers(parameters, few, torch.float32)
    double = by_transformers(parameters, few, torch.float64)
    about = {"seed": SEED, "config": CONFIG, "attention": ["dense"] * 3, "model": "transformers.GPT2LMHeadModel"}
    golden.write_or_check("gpt2-tiny.safetensors", {**named, "tokens": few}, single, double, about, checking)

    wide = [CONFIG["n_positions"]] * 3
    require_equal(by_hand(parameters, few, wide, torch.float64), double)
    require_equal(by_hand(parameters, more, DENSE, torch.float64), by_transformers(parameters, more, torch.float64))
    single = by_hand(parameters, more, BANDED, torch.float32)
    double = by_hand(parameters, more, BANDED, torch.float64)
    about |= {"attention": ["dense", "banded:7", "dense"], "model": "written out in tests/reference/gpt2_golden.py"}
    golden.write_or_check(
        "gpt2-tiny-banded.safetensors", {**named, "tokens": more}, single, double, about, checking
    )


if __name__ == "__main__":
    golden.main(make)
