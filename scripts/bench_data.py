"""The data half against the usual recipe and against its own limits, every ratio from one run.

    ./scripts/bench_data [--write] [--tokenizer FOLDER] [--rounds N]

The text is what lies on any machine that can run this: the source code and the documentation of the
installed Python packages. The tokenizer is GPT-2's own, from a folder, since nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic_core import from_json

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
PROCESSES = 2
SMALL, LARGE = 200_000_000, 2_000_000_000  # bytes of text
CODE, PROSE = {".py", ".pyi"}, {".md", ".rst", ".txt", ""}
BLOCK = 1024
SAMPLE_SECONDS = 0.5  # a look costs the kernel a walk through every page
RECIPE_BATCH = 1000
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One command: seconds, and the most memory its whole process tree held (proportional set size)."""

    seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/data.md")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a folder with GPT-2's tokenizer")
    parser.add_argument("--rounds", type=int, default=3, help="how often each conversion is repeated")
    asked = parser.parse_args()
    if not (asked.tokenizer / "tokenizer.json").is_file():
        sys.exit(f"error: {asked.tokenizer} holds no tokenizer.json\n  hint: name a folder with --tokenizer")
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        text = page(Path(folder), asked.tokenizer, asked.rounds)
    print(text)
    if asked.write:
        (ROOT / "docs/benchmarks/data.md").write_text(text, encoding="utf-8")


def page(work: Path, tokenizer: Path, rounds: int) -> str:
    """Measure everything; the page that says what came out."""
    small, _, prose = write_corpus(work / "small.jsonl", SMALL)
    say(f"{small / 1e6:.0f} MB of text, {prose / 1e6:.0f} MB of it prose")
    recipe = measure_recipe(work, tokenizer)
    say(f"recipe: {recipe.seconds:.0f} s")
    conversions: dict[str, list[Measured]] = {"tiktoken": [], "gigatoken": []}
    alone: dict[str, list[Alone]] = {name: [] for name in conversions}
    for turn in range(rounds):
        for name in conversions:
            conversions[name].append(measure_prepare(work, "small.jsonl", tokenizer, name))
            alone[name].append(measure_alone(work / "small.jsonl", tokenizer, name))
            took, own = conversions[name][-1].seconds, alone[name][-1]
            say(f"round {turn + 1}, {name}: {took:.1f} s, bare {own.encoding:.1f} s, by hand {own.all:.1f} s")
    store = only_store(work)
    tokens, stored = count(store)
    reading = tokens_read_per_second(store)
    say(f"reading: {reading / 1e6:.0f} Mtok/s")
    opening = measure_opening(work / "vast")
    large, distinct, _ = write_corpus(work / "large.jsonl", LARGE)
    after = measure_prepare(work, "large.jsonl", tokenizer, "gigatoken")
    after_alone = measure_alone(work / "large.jsonl", tokenizer, "gigatoken")
    peak = max(each.peak_bytes for each in conversions["gigatoken"])

    rows = []
    for name, least in (("tiktoken", 4), ("gigatoken", 15)):
        seconds = statistics.median(each.seconds for each in conversions[name])
        bare = statistics.median(each.encoding for each in alone[name])
        rows.append(
            (f"`data prepare` with {name} over the recipe", recipe.seconds / seconds, f"{least}x", "x")
        )
        rows.append((f"`data prepare` with {name} over its bare batch rate", bare / seconds, "0.8", ""))
    opened = statistics.median(each["seconds"] for each in opening)
    grown = max(each["resident"] - each["imported"] for each in opening)
    by_hand = statistics.median(each.all for each in alone["gigatoken"])
    quick = statistics.median(each.encoding for each in alone["gigatoken"])
    lines = [f"| {what} | **{ratio:.2f}{unit}** | at least {aim} |" for what, ratio, aim, unit in rows]
    lines += [
        f"| the same, {large / 1e9:.1f} GB | **{after_alone.encoding / after.seconds:.2f}** | at least 0.8 |",
        f"| the same of a loop by hand, {small / 1e6:.0f} MB and {large / 1e9:.1f} GB "
        f"| {quick / by_hand:.2f}, {after_alone.encoding / after_alone.all:.2f} | |",
        f"| peak memory of the process tree, {small / 1e6:.0f} MB | **{peak / 1e9:.2f} GB** | below 1.5 GB |",
        f"| the same, {large / 1e9:.1f} GB, over it | **{after.peak_bytes / peak:.3f}** | within 10 % |",
        f"| bytes in the store a token | **{stored / tokens:.3f}** | at most 2.1 |",
        f"| reading blocks in training order, one process | **{reading / 1e6:.0f} Mtok/s** | at least 50 |",
        f"| opening 1e9 blocks at a random place, to a batch | **{opened * 1e3:.0f} ms** | below 50 ms |",
        f"| memory that this takes | **{grown / 1e6:.0f} MB** | below 100 MB |",
    ]
    seconds_rows = [
        f"| recipe | {recipe.seconds:.1f} | | | {tokens / recipe.seconds / 1e6:.2f} "
        f"| {recipe.peak_bytes / 1e9:.2f} |",
        *(
            f"| {name} | {', '.join(f'{each.seconds:.1f}' for each in conversions[name])} "
            f"| {', '.join(f'{each.encoding:.1f}' for each in alone[name])} "
            f"| {', '.join(f'{each.all:.1f}' for each in alone[name])} "
            f"| {tokens / statistics.median(each.seconds for each in conversions[name]) / 1e6:.2f} "
            f"| {max(each.peak_bytes for each in conversions[name]) / 1e9:.2f} |"
            for name in conversions
        ),
        f"| gigatoken, {large / 1e9:.1f} GB | {after.seconds:.1f} | {after_alone.encoding:.1f} "
        f"| {after_alone.all:.1f} | | {after.peak_bytes / 1e9:.2f} |",
    ]
    packages = ("tokenizers", "tiktoken", "gigatoken", "datasets", "numpy")
    return "\n".join(
        [
            "# The data half",
            "",
            "`./scripts/bench_data --write` wrote this page: all of it in one run, on one machine. Times on",
            "shared machines vary, so the ratios are what counts.",
            "",
            "| what | measured | aim |",
            "|---|---|---|",
            *lines,
            "",
            f"{PROCESSES} processes. The text: {small / 1e6:.0f} MB of source code and documentation "
            f"({prose / 1e6:.0f} MB of it prose), one document a file, as jsonl; {tokens:,} GPT-2 tokens.",
            f"The {large / 1e9:.1f} GB are {distinct / 1e6:.0f} MB of distinct text, repeated.",
            "",
            "The recipe is `datasets.map` with the fast tokenizer of transformers, then `datasets.map` to",
            "join and cut, both batched. The bare batch rate is the library's own call for a batch on the",
            "same documents, already in memory, in as many processes, without starting up. The loop by hand",
            "is the least any program must do: read lines, take the text out of the JSON, that same call,",
            "ids into 16 bits, and into a file that is not synced; without starting up, proof or index.",
            "Opening counts from a process that has imported what a rank imports of launcher's data half,",
            f"to a batch of 8 blocks of {BLOCK} tokens; memory is what the process grows by.",
            "",
            "| | seconds, each round | bare, each round | by hand, each round | M tokens/s | peak GB |",
            "|---|---|---|---|---|---|",
            *seconds_rows,
            "",
            f"Python {platform.python_version()}, "
            + ", ".join(f"{name} {version(name)}" for name in packages)
            + f"; {os.cpu_count()} cores.",
            "",
        ]
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_corpus(file: Path, size: int) -> tuple[int, int, int]:
    """Documents of `size` bytes of text, as jsonl. Returns its bytes, the distinct ones, those of prose."""
    written = distinct = prose = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            for text, is_prose in found_texts():
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                length = len(text.encode())
                written += length
                prose += length * is_prose
                if written >= size:
                    break
            distinct = distinct or written
    return written, distinct, prose


def found_texts() -> Iterator[tuple[str, bool]]:
    """Each different text file of code or prose once, with whether it is prose: a byte of prose to two of
    code while there is both."""
    kinds = {True: distinct(PROSE), False: distinct(CODE)}
    weighed = {True: 0, False: 0}
    while kinds:
        is_prose = min(kinds, key=weighed.__getitem__)
        text = next(kinds[is_prose], None)
        if text is None:
            del kinds[is_prose]
        else:
            weighed[is_prose] += len(text) * (2 if is_prose else 1)
            yield text, is_prose


def distinct(kinds: set[str]) -> Iterator[str]:
    seen = set()
    for root in (Path(sys.prefix, "lib"), Path(sysconfig.get_path("stdlib")), Path("/usr/share")):
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix not in kinds or path.is_symlink() or not (path.suffix or name == "copyright"):
                    continue
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                mark = hashlib.blake2b(text.encode(), digest_size=8).digest()
                if not text.isspace() and text and mark not in seen:
                    seen.add(mark)
                    yield text


def measured(command: Sequence[str | Path], work: Path) -> Measured:
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        sys.exit(f"error: {command} failed:\n{errors}")
    return Measured(seconds, peak[0])


def watch(pid: int, peak: list[int]) -> None:
    """Keep the highest sum of proportional set sizes over the tree below `pid`, until it ends."""
    while psutil.pid_exists(pid):
        total = 0
        try:
            top = psutil.Process(pid)
            if top.status() == psutil.STATUS_ZOMBIE:
                return
            for process in (top, *top.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], total)
        time.sleep(SAMPLE_SECONDS)


def measure_recipe(work: Path, tokenizer: Path) -> Measured:
    command: list[str | Path] = [sys.executable, ROOT / "scripts/bench_data.py", "recipe"]
    try:
        return measured([*command, work / "small.jsonl", tokenizer, work / "recipe"], work)
    finally:
        shutil.rmtree(work / "recipe", ignore_errors=True)


def recipe(file: str, tokenizer: str, cache: str) -> None:
    """Tokenise, join and cut as the well-known example scripts do."""
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    encode.model_max_length = sys.maxsize
    raw = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
    tokenised = raw.map(
        lambda batch: encode(batch["text"]),
        batched=True,
        batch_size=RECIPE_BATCH,
        num_proc=PROCESSES,
        remove_columns=raw.column_names,
    )
    tokenised.map(group, batched=True, batch_size=RECIPE_BATCH, num_proc=PROCESSES)


def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    joined = {name: [each for row in rows for each in row] for name, rows in batch.items()}
    whole = len(joined["input_ids"]) // BLOCK * BLOCK
    blocks = {name: [ids[i : i + BLOCK] for i in range(0, whole, BLOCK)] for name, ids in joined.items()}
    return {**blocks, "labels": blocks["input_ids"].copy()}


def measure_prepare(work: Path, file: str, tokenizer: Path, backend: str) -> Measured:
    shutil.rmtree(work / "stores", ignore_errors=True)
    run = {
        "name": "bench",
        "model": {"name": "gpt2", "tokenizer": str(tokenizer)},
        "data": {"train": [file], "validation": 0.01, "block_size": BLOCK, "cache_dir": "stores"},
        "train": {"batch_size": 8, "steps": 1},
    }
    (work / "run.yaml").write_text(json.dumps(run))
    hide = "" if backend == "gigatoken" else "sys.modules['gigatoken'] = None; "
    program = f"import sys; {hide}sys.argv[0] = 'launcher'; from launcher.cli import main; main()"
    command = [sys.executable, "-c", program, "data", "prepare", "run.yaml", "--workers", str(PROCESSES)]
    return measured(command, work)


def only_store(work: Path) -> Path:
    return next((work / "stores").glob("*/manifest.json")).parent


def count(store: Path) -> tuple[int, int]:
    """Tokens in a store, and the bytes of all its files."""
    from launcher.data.store import open_store

    tokens = sum(shard.tokens for shard in open_store(store).manifest.shards)
    return tokens, sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Alone:
    """Seconds of a loop by hand without starting up: reading and parsing, encoding, and writing the ids."""

    reading: float
    encoding: float
    writing: float

    @property
    def all(self) -> float:
        return self.reading + self.encoding + self.writing


def measure_alone(file: Path, tokenizer: Path, backend: str) -> Alone:
    """The slowest of as many processes, each with its share of the file's lines."""
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        encode = partial(encode_part, file, tokenizer=tokenizer, backend=backend)
        return max(pool.map(encode, range(PROCESSES)), key=lambda each: each.all)


def encode_part(file: Path, part: int, tokenizer: Path, backend: str) -> Alone:
    """One share of the lines, in batches of about BATCH_BYTES characters."""
    encode = bare_encoder(tokenizer, backend)
    encode(["the first call makes its tables"])
    reading = encoding = writing = 0.0
    size = file.stat().st_size
    with file.open("rb") as lines, tempfile.TemporaryFile(dir=file.parent) as ids:
        lines.seek(part * size // PROCESSES)
        if part:
            lines.readline()
        while lines.tell() < (part + 1) * size // PROCESSES:
            began = time.perf_counter()
            texts = [from_json(line, cache_strings=False)["text"] for line in lines.readlines(BATCH_BYTES)]
            read = time.perf_counter()
            encoded = encode(texts)
            done = time.perf_counter()
            ids.write(narrow(encoded, backend).data)
            reading, encoding = reading + read - began, encoding + done - read
            writing += time.perf_counter() - done
    return Alone(reading, encoding, writing)


def narrow(encoded: Any, backend: str) -> NDArray[np.uint16]:
    """All ids of what the library gives for a batch, in a row."""
    if backend == "gigatoken":
        import awkward

        return np.asarray(awkward.flatten(encoded), dtype=np.uint16)
    return np.fromiter(chain.from_iterable(encoded), dtype=np.uint16)


def bare_encoder(tokenizer: Path, backend: str) -> Callable[[list[str]], Any]:
    """The library's own call for a batch, on one thread, without any of launcher's code around it."""
    specification = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    if backend == "gigatoken":
        from gigatoken import Tokenizer

        return partial(Tokenizer.from_json(specification).encode_batch, parallel=False)
    from tiktoken import Encoding

    from launcher.data.backends import read_byte_level

    known = read_byte_level(specification)
    ranks, added = dict(known.ranks), dict(known.added)
    encoding = Encoding("bare", pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=added)
    return partial(encoding.encode_batch, num_threads=1, allowed_special="all")


def measure_opening(folder: Path) -> list[dict[str, Any]]:
    """A store of a billion blocks by its manifest, opened by processes of their own at a random place."""
    sys.path.insert(0, str(ROOT))
    from tests.data.test_opening import first_batch, sparse_shards, write_large_store

    folder.mkdir()
    write_large_store(folder)
    found = []
    for first in random.Random(1337).sample(range(10**9), 5):
        samples = range(first, first + 8)
        sparse_shards(folder, samples)
        found.append(first_batch(folder, samples))
    return found


def tokens_read_per_second(store: Path) -> float:
    """Blocks in training order, in this process; the second pass, when the file lies in memory."""
    from launcher.data.blocks import Blocks
    from launcher.data.order import Order
    from launcher.data.store import open_store

    blocks = Blocks(open_store(store), "train", BLOCK, "concat")
    order = Order([(len(blocks[0]), 1.0)], 1337)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for sample in range(len(blocks[0])):
            place = order[sample]
            blocks.read(place.source, place.block)
        seconds = time.perf_counter() - began
    return len(blocks[0]) * BLOCK / seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["recipe"]:
        recipe(*sys.argv[2:])
    else:
        main()
