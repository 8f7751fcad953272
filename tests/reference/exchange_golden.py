"""Small models as `transformers` saves them, and their logits: what import and export are tested against.

Writes tests/golden/{hf-gpt2,hf-gpt-neo,openai-gpt,hf-bert}/, each a folder for `from_pretrained` with `logits.safetensors`
beside it. With --check the stored folders are loaded and their logits computed anew. Knows nothing of Phalanx.
"""

import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

import golden

SEED = 20240621
# A vocabulary that is no multiple of 128, and heads of 8, whose root is no power of two.
V, T, C, LAYERS, HEADS = 131, 20, 24, 3, 3
TOKENS = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None}
GPT = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": C, "n_positions": T, **TOKENS}
NEO = {
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "hidden_size": C,
    "max_position_embeddings": T,
    # Dense, banded, banded: what no cycle of two gives.
    "attention_types": [[["global", "local", "local"], 1]],
    "window_size": 5,
    **TOKENS,
}
BERT = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": C,
    "intermediate_size": 4 * C,
    "max_position_embeddings": T,
    "vocab_size": V,
}
MODELS = {
    "hf-gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "hf-gpt-neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**NEO)),
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**GPT)),
    "hf-bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
}


def randomise(model):
    """Parameters of which none is trivial: gains around 1, biases around 0, attention far from uniform."""
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape)
        with torch.no_grad():
            if ("ln_" in name or "LayerNorm" in name) and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * values)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * values)
            else:
                parameter.copy_((0.3 if "att" in name else 0.15) * values)


def logits(model, tokens, dtype):
    with torch.no_grad():
        return model.to(dtype).eval()(tokens).logits


def check(name, folder):
    stored = load_file(folder / "logits.safetensors")
    kind = AutoModelForMaskedLM if name == "hf-bert" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager")
    for dtype in (torch.float32, torch.float64):
        far = golden.distance(logits(model, stored["tokens"], dtype), stored["logits"])
        if not far <= golden.TEST_TOLERANCE:
            raise golden.Mismatch(f"{name}: logits are {far:.2e} from {dtype}, limit {golden.TEST_TOLERANCE:.0e}")
    print(f"{name}: ok")


def make(checking):
    for number, (name, build) in enumerate(MODELS.items()):
        folder = golden.FOLDER / name
        if checking:
            check(name, folder)
            continue
        torch.manual_seed(SEED + number)
        model = build()
        randomise(model)
        tokens = torch.randint(V, (2, T))
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        values = {"tokens": tokens, "logits": logits(model, tokens, torch.float32).contiguous()}
        save_file(values, folder / "logits.safetensors")
        print(f"{name}: written")


if __name__ == "__main__":
    golden.main(make)
