"""Make tests/golden/data, the small set of vectors, from ../shared/golden.

`python -m tests.golden.make_small`.

It has the form of the full set, with archives as gzipped safetensors: an npz spends 300 bytes on
each of 4,000 arrays. Of every kind it takes the fewest and smallest cases that show all words,
flags and Nones of the settings, and all arrays. Of the networks it takes one of each class and
block. Their weights are too large to keep, but they were drawn from a seed: the manifest says how,
and every bit is compared with the full set's here.
"""

import argparse
import gzip
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from torch import Tensor

from tests.golden.manifests import FULL_SET, SMALL_SET, Record, digest, drawn, read_arrays, records, shaped


LIMIT_BYTES = 1_000_000
# seeds of the weights; the manifest of ddgan_models states its own
SEEDS = {"adm_small-unet": 4100, "adm_small-classifier": 4101, "iddpm_small-classifier": 4111}
NETWORKS = {*SEEDS, "generator_skip_cat", "generator_oneadagn_fourier", "discriminator_small_gray16"}
NETWORKS |= {"discriminator_large_gray80"}
# one whole training run; the others differ by settings that the replays of single steps show, too
LEFT_OUT = {"train_pB.npz", "train_pC.npz"}
# OpenAI's order of definition, which is that of the draws
ORDER = (
    "time_embed label_emb input_blocks middle_block output_blocks out in_layers emb_layers out_layers skip_connection"
)
ORDER += " norm op conv positional_embedding qkv qkv_proj proj_out c_proj weight bias"


def shown(record: Record) -> set[tuple[str, Any]]:
    """What a case shows.

    The words, flags and Nones of its settings, and the names of its arrays.
    """
    settings = {(key, value) for key, value in record.settings.items() if isinstance(value, str | bool | None)}
    # s0_p1 and s1_p0 are the same array of another step
    return settings - {("id", record.name)} | {("array", re.sub(r"\d+", "", name)) for name in record.arrays}


def smallest_cover(cases: list[Record]) -> list[Record]:
    """Greedily the cases that show most new for their size, until everything is shown."""
    left, chosen = set().union(*map(shown, cases)), []
    while left:
        best = max(cases, key=lambda case: len(shown(case) & left) / sum(a.nbytes for a in case.arrays.values()))
        chosen.append(best)
        left -= shown(best)
    return [case for case in cases if case in chosen]


def take_cases(folder: Path, target: Path) -> None:
    """A system whose archives hold several cases."""
    manifest = json.loads((folder / "manifest.json").read_text())
    by_kind: dict[str, list[Record]] = {}
    for record in records(folder):
        if record.file not in LEFT_OUT:
            by_kind.setdefault(record.kind, []).append(record)
    by_file: dict[str, list[str]] = {}
    for record in itertools.chain(*map(smallest_cover, by_kind.values())):
        by_file.setdefault(record.file, []).append(record.name)
    files = {}
    for file, chosen in by_file.items():
        entry, packed = manifest["files"][file], file.replace(".npz", ".safetensors.gz")
        arrays, named = read_arrays(folder / file), tuple(f"{name}{mark}" for name in chosen for mark in ("__", "/"))
        arrays = {key: arrays[key] for key in arrays if key.startswith(named)} or arrays
        (target / packed).write_bytes(gzip.compress(save(arrays), mtime=0))
        cases = entry["cases"]
        if isinstance(cases, dict):
            kept = {name: without_meanings(cases[name]) for name in chosen}
        else:
            kept = [case for case in cases if (case if isinstance(case, str) else case["id"]) in chosen]
        files[packed] = {key: value for key, value in entry.items() if key not in ("bytes", "sha256", "keys")}
        files[packed]["cases"] = kept
    write_manifest(target, manifest | {"files": files})


def without_meanings(case: dict[str, Any]) -> dict[str, Any]:
    """A case of a manifest without what its "keys" say of the arrays but their tolerances."""
    keys = case.get("keys", {})
    tolerances = {key: {"tolerance": about["tolerance"]} for key, about in keys.items() if "tolerance" in about}
    rest = {key: value for key, value in case.items() if key != "keys"}
    return rest | ({"keys": tolerances} if tolerances else {})


def take_networks(folder: Path, target: Path) -> None:
    """A system of networks: their arrays and flags, and how their weights are drawn."""
    manifest = json.loads((folder / "manifest.json").read_text())
    cases = [record for record in records(folder) if record.name in NETWORKS]
    for record in cases:
        shutil.copy(folder / record.file, target / record.file)
        # the entry is the manifest's own, which is written below
        entry = record.entry
        entry["drawn"] = recipe(record)
        for key in ("weights", "safetensors_bytes", "safetensors_sha256", "keys"):
            entry.pop(key, None)
        if "files" in entry:
            entry["files"] = [file for file in entry["files"] if not file.endswith(".safetensors")]
            shutil.copy(folder / f"{record.name}.json", target)
    if "models" in manifest:
        manifest["models"] = {record.name: record.entry for record in cases}
    else:
        manifest["configs"] = {}
        for record in cases:
            config, network = record.name.split("-")
            manifest["configs"].setdefault(config, {})[network] = record.entry
    write_manifest(target, manifest)


def recipe(record: Record) -> dict[str, Any]:
    """The seed, and how each tensor comes from its draw, found by trying."""
    weights = record.read_weights()
    seed = SEEDS.get(record.name, record.entry.get("seed"))
    order = record.entry.get("grad_param_norms") or record.entry.get("r1_param_grad_norms")
    order = list(order or sorted(weights, key=place))
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name in order:
        tensor = weights[name]
        noise = torch.randn(tensor.shape, generator=generator)
        tensors.append([name, list(tensor.shape), *rule(record, name, tensor, noise)])
    dtype = str(weights[order[0]].dtype).removeprefix("torch.")
    found = {"seed": seed, "dtype": dtype, "tensors": tensors, "sha256": digest(weights)}
    assert digest(drawn(found)) == digest(weights)
    return found


def place(name: str) -> list[tuple[int, int]]:
    return [(0, int(part)) if part.isdigit() else (1, ORDER.split().index(part)) for part in name.split(".")]


def rule(record: Record, name: str, tensor: Tensor, noise: Tensor) -> tuple[float | list[float], float, float]:
    """Location, scale and divisor that make the noise this tensor, to the last bit."""
    root = math.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 1.0
    scales = [(scale, 1.0) for scale in (0.1, 0.2, 0.3, 0.5, 1.0, 0.9 / root)]
    scales += [(gain, root) for gain in (1.0, 1.4, 1.9)]
    locations: list[float | list[float]] = [0.0, 1.0]
    if tensor.ndim == 1 and len(tensor) % 2 == 0:
        # scale and shift of an adaptive norm, in one bias
        locations.append([1.0, 0.0])
    for location, (scale, divisor) in itertools.product(locations, scales):
        recipe = {"dtype": str(tensor.dtype).removeprefix("torch.")}
        if torch.equal(shaped(noise, location, scale, divisor, **recipe), tensor):
            return location, scale, divisor
    raise AssertionError(f"{record}: {name} is no draw of the seed that this script knows")


def write_manifest(target: Path, manifest: dict[str, Any]) -> None:
    (target / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=Path, default=FULL_SET)
    parser.add_argument("--small", type=Path, default=SMALL_SET)
    args = parser.parse_args()
    for system, take in {
        "openai": take_cases,
        "ddgan": take_cases,
        "openai_models": take_networks,
        "ddgan_models": take_networks,
    }.items():
        shutil.rmtree(args.small / system, ignore_errors=True)
        (args.small / system).mkdir(parents=True)
        take(args.full / system, args.small / system)
    size = sum(path.stat().st_size for path in args.small.rglob("*") if path.is_file())
    assert size < LIMIT_BYTES, f"{args.small} takes {size} bytes; at most {LIMIT_BYTES} belong into a repository"
    print(f"{args.small}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
