"""Golden files: how they are written, read back and compared.

Knows safetensors and one measure of distance. Knows nothing of models or optimizers.
"""

import json
import sys
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent.parent / "golden"

# The tests of Phalanx allow this much per tensor, ||a - b|| / ||b||.
TEST_TOLERANCE = 1e-5
# What is stored must be this close to the float64 result, so that the test's tolerance is the test's own.
TRUTH_TOLERANCE = 1e-6


class Mismatch(Exception):
    """A recomputed value is not the stored one."""


def distance(a, b):
    """||a - b|| / ||b|| in float64; the absolute norm where b is zero."""
    a, b = a.double(), b.double()
    norm = b.norm()
    return ((a - b).norm() / (norm if norm > 0 else 1.0)).item()


def closest_to_truth(single, double):
    """What to store for each tensor, and what to call it in `precision`.

    `single` was computed in fp32 and `double` in float64 from the same fp32 inputs. The fp32 results
    are stored, unless one of them is further than TRUTH_TOLERANCE from float64: then float64's,
    rounded once.
    """
    worst = max(distance(single[name], double[name]) for name in double)
    if worst <= TRUTH_TOLERANCE:
        return dict(single), "float32"
    return {name: tensor.float() for name, tensor in double.items()}, "float64 rounded to float32"


def print_distances(file, single, double):
    """One line per tensor: how far fp32 is from float64."""
    print(f"{file}: fp32 against float64, ||a - b|| / ||b||")
    for name in sorted(double):
        print(f"  {distance(single[name], double[name]):.2e}  {name}")


def save(file, tensors, about):
    """Writes tests/golden/FILE. The same results give the same bytes.

    The description is one JSON string under the metadata key `about`: safetensors writes several keys
    in an order that changes from run to run.
    """
    about = {
        **about,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }
    FOLDER.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, FOLDER / file, metadata={"about": json.dumps(about, sort_keys=True)})
    print(f"{file}: written, {len(tensors)} tensors, {(FOLDER / file).stat().st_size:,} bytes")


def load(file):
    """The tensors of tests/golden/FILE and its description."""
    tensors = load_file(FOLDER / file)
    with safetensors.safe_open(FOLDER / file, "pt") as opened:
        return tensors, json.loads(opened.metadata()["about"])


def check(file, inputs, single, double, about):
    """Compares tests/golden/FILE with values computed just now.

    Inputs and description must be equal, results within TRUTH_TOLERANCE of float64 and within
    TEST_TOLERANCE of this machine's fp32, whose sums may run in another order than the file's.
    """
    stored, stored_about = load(file)
    for key, value in about.items():
        if stored_about.get(key) != value:
            raise Mismatch(f"{file}: {key} is {stored_about.get(key)!r}, the script has {value!r}")
    expected = inputs.keys() | double.keys()
    if stored.keys() != expected:
        raise Mismatch(f"{file}: tensors on one side only: {sorted(stored.keys() ^ expected)}")
    for name, tensor in inputs.items():
        if not torch.equal(stored[name], tensor):
            raise Mismatch(f"{file}: {name} is not what the seed gives")
    for name in double:
        for kind, fresh, limit in (
            ("float64", double[name], TRUTH_TOLERANCE),
            ("fp32", single[name], TEST_TOLERANCE),
        ):
            if stored[name].shape != fresh.shape:
                raise Mismatch(f"{file}: {name} is {list(stored[name].shape)}, expected {list(fresh.shape)}")
            far = distance(stored[name], fresh)
            if not far <= limit:  # written so that NaN fails
                raise Mismatch(f"{file}: {name} is {far:.2e} from {kind}, limit {limit:.0e}")
    truth = max(distance(stored[name], double[name]) for name in double)
    live = max(distance(stored[name], single[name]) for name in double)
    print(f"{file}: ok, {len(double)} results, at most {truth:.1e} from float64 and {live:.1e} from fp32")


def write_or_check(file, inputs, single, double, about, checking):
    """What every script here does with its results: `check` them, or print distances and `save`."""
    if checking:
        check(file, inputs, single, double, about)
        return
    print_distances(file, single, double)
    results, precision = closest_to_truth(single, double)
    save(file, {**inputs, **results}, {**about, "precision": precision})


def main(make):
    """Runs `make(checking)` for a script that knows one flag, `--check`."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        sys.exit(f"usage: {sys.argv[0]} [--check]")
    torch.set_num_threads(1)
    try:
        make(checking=bool(arguments))
    except Mismatch as wrong:
        sys.exit(f"{wrong}\nhint: versions are pinned in tests/reference/requirements.txt; see README.md beside it")
    except FileNotFoundError as missing:
        sys.exit(f"{missing}\nhint: run without --check to write the file")
