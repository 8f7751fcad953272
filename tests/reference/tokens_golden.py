"""GPT-2's ids by OpenAI's tiktoken, for text that is easy to get wrong.

Writes tests/golden/gpt2-tokens.json; with --check compares it with what tiktoken says now. Every code point up
to U+1FFFF stands in three contexts (of their ids the file has checksums, a block of 4096 code points each), and
2,000 odd strings have theirs in full. With --speed FILE.jsonl it measures tiktoken on two threads.
"""

import argparse
import json
import pathlib
import random
import sys
import time
import zlib

import tiktoken

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "dataloader/src/tokenizer/gpt2.vocab.bpe"
GOLDEN = ROOT / "tests/golden/gpt2-tokens.json"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CONTEXTS = ["a%sb", " %s1 ", "%s%s's"]
BLOCK = 4096


def encoding():
    """tiktoken's encoding with the table of this repository: its own would be downloaded."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = shown + [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(order[len(shown):])}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    for line in TABLE.read_text().splitlines()[1:]:
        if line:
            ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    assert len(ranks) == 50256
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def odd_strings():
    """2,000 strings: contractions, runs of spaces, emoji, controls, long runs, literal special tokens."""
    rng = random.Random(7)
    spaces = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\x0b", "\x85", "\x1f", "\u180e"]
    pieces = ["'s", "'t", "'re", "'ll", "'d", "'m", "'ve", "'", "''", "S", "don", "I", "we", "\u2019s", "é", "1",
              "٣", "½", "!", "...", "😀", "👨‍👩‍👧‍👦", "🇬🇧", "\u0301", "<|endoftext|>", "<|endoftext", "|>", "你好", "ﬁ",
              "\u200b", "\u200d", "\ufeff", "\x00", "\u2028", "\ue000", "İ", "ß", "the ", " and", "http://", "_", "\\n"]
    points = [c for c in range(0x20, 0x30000) if not 0xD800 <= c <= 0xDFFF]
    printable = [chr(c) for c in range(32, 127)]
    odd = ["", "a" * 900, "ab" * 500, " " * 900, "\n" * 500, "0" * 300, "!" * 300, "あ" * 200, "😀" * 100, "the " * 200,
           "I'm you're he'd we'll they've it's don't I'M YOU'RE 'S 's'S'll 'LL", "\t \n" * 150, "<|endoftext|>" * 30]
    kinds = [
        lambda: rng.choice(printable),
        lambda: chr(rng.choice(points)),
        lambda: rng.choice(printable + spaces * 4),
        lambda: rng.choice(pieces + spaces),
        lambda: chr(rng.choice(points)) if rng.random() < 0.3 else rng.choice(printable + spaces),
    ]
    while len(odd) < 2000:
        kind = kinds[len(odd) % len(kinds)]
        odd.append("".join(kind() for _ in range(rng.randint(1, 40))))
    return odd


def golden():
    encode = encoding().encode_ordinary
    sums = []
    for context in CONTEXTS:
        for first in range(0, 0x20000, BLOCK):
            checksum = 0
            for point in range(first, first + BLOCK):
                if not 0xD800 <= point <= 0xDFFF:
                    ids = encode(context.replace("%s", chr(point)))
                    checksum = zlib.crc32(b"".join(id.to_bytes(4, "little") for id in ids), checksum)
            sums.append(checksum)
    odd = [[text, encode(text)] for text in odd_strings()]
    return {"contexts": CONTEXTS, "block": BLOCK, "checksums": sums, "odd": odd}


def speed(file):
    texts = [json.loads(line)["text"] for line in open(file)]
    size = sum(len(text.encode()) for text in texts)
    table = encoding()
    table.encode_ordinary_batch(texts[:100], num_threads=2)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        ids = table.encode_ordinary_batch(texts, num_threads=2)
        best = min(best, time.perf_counter() - start)
    print(f"tiktoken {tiktoken.__version__}: {size / best / 1e6:.2f} MB/s, {sum(map(len, ids))} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--speed", metavar="FILE.jsonl", help="measure on this text")
    args = parser.parse_args()
    if args.speed:
        return speed(args.speed)
    text = json.dumps(golden(), separators=(",", ":")) + "\n"
    if not args.check:
        GOLDEN.write_text(text)
    elif GOLDEN.read_text() != text:
        sys.exit(f"{GOLDEN} is not what tiktoken {tiktoken.__version__} says")


if __name__ == "__main__":
    main()
