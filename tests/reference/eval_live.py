#!/usr/bin/env python3
"""The scores of `phalanx eval` beside those of lm-eval, live, on the same model.

    eval_live.py PHALANX

Two small models are trained on the documentation of this repository, one that reads bytes and one that reads a
byte-pair encoding, and exported for `transformers`. lm-eval loads the folders; its tasks read the same files as the
suite. Every score that both have must be the same to the last of the four digits that lm-eval prints.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEQ_LEN = 64
# Half of the last digit of lm-eval's tables; of a value that is larger than fp32 holds so exactly, a share.
LIMIT, SHARE = 5e-5, 2e-6

CONFIG = f"""[run]
name = "NAME"
[model]
n_layer = 2
n_head = 2
n_embd = 64
seq_len = {SEQ_LEN}
[data]
train = "NAME/train"
[batch]
global_batch_tokens = 1024
micro_batch = 16
[optim]
lr = 5e-3
[schedule]
kind = "constant"
max_steps = 500
[parallel]
device = "cpu"
dtype = "fp32"
threads = 1
[eval]
every_steps = 0
"""

SUITE = """[[task]]
name = "words"
kind = "last_word"
data = "words.jsonl"

[[task]]
name = "documents"
kind = "perplexity"
data = "documents.jsonl"

[[task]]
name = "choices"
kind = "multiple_choice"
data = "choices.jsonl"
prompt = "{question}"
"""

# What tokenizers, windows and splitting may do differently.
ODD_WORDS = [
    " one", "a  b", "two  spaces  here", "crème brûlée", "the price is 1,000 €", "naïve “quotes” 😀", "line\nbreak here",
    "here a line\nbreaks", "tab\there now", " begins with a blank", "日本 語", "x" * 100 + " y",
]
ODD_DOCUMENTS = ["a", " ", "x" * SEQ_LEN, "y" * (SEQ_LEN + 1), "é" * 80, "  two  blanks \n\n", "😀 " * 40]

# Which score of lm-eval is which of Phalanx.
SAME = {
    "words": {"acc": "accuracy", "perplexity": "perplexity"},
    "documents": {key: key for key in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    "choices": {"acc": "accuracy", "acc_bytes": "accuracy_per_byte"},
}


def phalanx(program, folder, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")


def rows(file, all_rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in all_rows))


def write_data(folder):
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    rows(folder / "text.jsonl", ({"text": text} for text in texts))
    # Without the one known difference: there, text that spells the end of a document becomes its token.
    lines = [line for text in texts for line in text.splitlines() if "<|endoftext|>" not in line]
    sentences = [line for line in lines if len(line.split(" ")) > 5 and line[-1] != " "]
    words = sentences[::12] + [" ".join(line.split(" ")[:6]) for line in sentences[::7]]
    rows(folder / "words.jsonl", ({"text": text} for text in words + ODD_WORDS if text.split(" ")[-1]))
    rows(folder / "documents.jsonl", ({"text": text} for text in [text[:1500] for text in texts[::3]] + ODD_DOCUMENTS))
    endings = [line.rsplit(" ", 1) for line in sentences[::20]]
    # Where two answers are the same, rounding alone would say which is likelier.
    choices = [{"question": begin, "choices": [end, other, "the", "ünï"], "label": 0}
               for (begin, end), (_, other) in zip(endings, endings[-1:] + endings) if len({end, other, "the"}) == 3]
    rows(folder / "choices.jsonl", choices)


def tasks(folder):
    def task(name, output_type, metrics, **more):
        aggregated = [{"metric": metric, "higher_is_better": True} for metric in metrics]
        return {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test", "output_type": output_type, "metric_list": aggregated, **more,
        }

    return [
        task("words", "loglikelihood", ["acc", "perplexity"], doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
             doc_to_target="{{' ' + text.split(' ')[-1]}}"),
        # A field's name, not a template: templates drop a line break at the end.
        task("documents", "loglikelihood_rolling", SAME["documents"], doc_to_text="", doc_to_target="text"),
        task("choices", "multiple_choice", SAME["choices"], doc_to_text="{{question}}", doc_to_choice="{{choices}}",
             doc_to_target="label"),
    ]


def theirs(folder, exported):
    # Its cache takes windows of the same tokens for one, also where other numbers of them are predicted.
    model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=8, logits_cache=False)
    results = lm_eval.simple_evaluate(model=model, tasks=tasks(folder), bootstrap_iters=0, log_samples=False)["results"]
    return {name: {metric.split(",")[0]: value for metric, value in scores.items()} for name, scores in results.items()}


def ours(program, folder, run):
    phalanx(program, folder, "eval", run, "--suite", "suite.toml", "-n", 1, "--out", "scores.json")
    results = json.loads((folder / "scores.json").read_text())["results"]
    return {result["task"]: {score["name"]: score["value"] for score in result["scores"]} for result in results}


def compare(name, ours, theirs):
    wrong = 0
    for task, scores in SAME.items():
        for their_name, our_name in scores.items():
            our, their = ours[task][our_name], theirs[task][their_name]
            off = abs(our - their)
            wrong += not off <= max(LIMIT, SHARE * their)
            print(f"{name} {task} {our_name}: {our:.4f}, lm-eval's {their_name} {their:.4f}, off by {off:.1e}")
    return wrong


def main(program):
    program, wrong = pathlib.Path(program).resolve(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_data(folder)
        (folder / "suite.toml").write_text(SUITE)
        phalanx(program, folder, "data", "train-tokenizer", "text.jsonl", "--vocab-size", 800, "--out", "own.tiktoken")
        for name, tokenizer in [("bytes", []), ("bpe", ["--tokenizer", "own.tiktoken"])]:
            (folder / f"{name}.toml").write_text(CONFIG.replace("NAME", name))
            phalanx(program, folder, "data", "prepare", "text.jsonl", "--out", name, *tokenizer)
            phalanx(program, folder, "train", f"{name}.toml", "-n", 1)
            phalanx(program, folder, "export", f"runs/{name}", "--format", "hf-gpt2", "--out", f"hf-{name}")
            wrong += compare(name, ours(program, folder, f"runs/{name}"), theirs(folder, folder / f"hf-{name}"))
    if wrong:
        sys.exit(f"{wrong} scores are not lm-eval's")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
