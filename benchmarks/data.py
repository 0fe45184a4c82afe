"""How fast data goes in and comes out.

    python benchmarks/data.py preprocess --input A.jsonl ... TOKENIZER FLAGS
                                        tools/preprocess_data.py against the tokenizer library alone
    python benchmarks/data.py open      a dataset of 10 million documents and 10^12 tokens; a blend of 1,000 datasets
    python benchmarks/data.py loader    reading at sequence 4096, and how long a training step waits for it

`preprocess` runs each side in processes of their own, in turns, on the same text, and takes the best of the rounds. The
library gets the texts from memory, a thousand in a call, and a thread for each worker; the tool reads JSONL, writes
.bin, .idx and sidecar, and starts its workers, all of it counted. MB are 10^6 bytes of UTF-8 text, for both. Beside the
time on the clock stands the time on the cores, of all processes of a side: it tells what the work costs where others
use the machine as well.
"""

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megazero.settings import commands, option, run

LIBRARY = """
import json, os, sys, time
words, threads, paths = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
from megazero.data.tokenizers import build_tokenizer
tokenizer = build_tokenizer(**words)
os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = \
("true" if threads > 1 else "false"), str(threads)
texts = [json.loads(line)["text"] for path in paths for line in open(path, encoding="utf-8")]
kind, tokens = words["tokenizer_type"], 0
start, cpu = time.perf_counter(), time.process_time()
for low in range(0, len(texts), 1000):
    part = texts[low:low + 1000]
    if kind in ("GPT2BPETokenizer", "HuggingFaceTokenizer"):
        ids = [encoding.ids for encoding in tokenizer._inner.encode_batch_fast(part, add_special_tokens=False)]
    elif kind == "TiktokenTokenizer":
        ids = tokenizer._inner.encode_batch(part, num_threads=threads, allowed_special="all")
    else:
        ids = tokenizer._model.encode(part, num_threads=threads)
    tokens += sum(map(len, ids))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps([seconds, cpu, tokens, sum(len(text.encode()) for text in texts)]))
"""


@dataclass(frozen=True)
class Preprocess:
    """Times preprocessing against the tokenizer library alone."""

    input: tuple[str, ...] = option(help="JSONL files with the key text", unit="path")
    tokenizer_type: str = option("GPT2BPETokenizer", "the tokenizer")
    tokenizer_model: str | None = option(None, "its file", unit="path")
    vocab_file: str | None = option(None, "GPT-2's vocab.json", unit="path")
    merge_file: str | None = option(None, "GPT-2's merges.txt", unit="path")
    rounds: int = option(3, "runs of each")


def preprocess(s: Preprocess) -> None:
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    words = {name: getattr(s, name) for name in names if getattr(s, name) is not None}
    best: dict[tuple[str, int, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [word for name, value in words.items() for word in ("--" + name.replace("_", "-"), value)]
        for _ in range(s.rounds):
            for workers in (1, 2):
                seconds, cpu, tokens, size = json.loads(_ran("-c", LIBRARY, json.dumps(words), str(workers), *s.input))
                _keep(best, "library", workers, seconds, cpu)
                start, before = time.perf_counter(), _cores()
                _ran("tools/preprocess_data.py", "--input", *s.input, "--output-prefix", f"{folder}/d", *flags,
                     "--workers", str(workers))
                _keep(best, "tool", workers, time.perf_counter() - start, _cores() - before)
    print(f"{s.tokenizer_type}: {size / 1e6:.1f} MB, {tokens:,} tokens, best of {s.rounds}")
    for (side, workers, of), seconds in best.items():
        ratio = f", {best['library', workers, of] / seconds:.2f} of the library" if side == "tool" else ""
        print(f"  {side:<8}{workers} worker{'s' if workers > 1 else ' '} {of:<6}{seconds:7.2f} s "
              f"{size / 1e6 / seconds:7.2f} MB/s{ratio}")
    for side in ("tool", "library"):
        print(f"  {side}: 2 workers are {best[side, 1, 'clock'] / best[side, 2, 'clock']:.2f} times 1; "
              f"by the time on the cores they could be {2 * best[side, 1, 'cores'] / best[side, 2, 'cores']:.2f}")


def _keep(best: dict[tuple[str, int, str], float], side: str, workers: int, clock: float, cores: float) -> None:
    for of, seconds in (("clock", clock), ("cores", cores)):
        best[side, workers, of] = min(seconds, best.get((side, workers, of), seconds))


def _cores() -> float:
    """Seconds on the cores of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ran(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *words],
                          check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


# ---- opening


@dataclass(frozen=True)
class Open:
    """Times the opening of a very large dataset and of a blend of many."""

    documents: int = option(10_000_000, "of the large one")
    tokens: int = option(10**12, "of the large one")
    datasets: int = option(1000, "of the blend")


def opening(s: Open) -> None:
    from megazero.data import IndexedWriter, best_dtype, open_split
    with tempfile.TemporaryDirectory() as folder:
        large = f"{folder}/large"
        _sparse(large, s.documents, s.tokens // s.documents)
        # imports, page tables of the interpreter
        open_split([large], "969,30,1", "train", 4096, 1, shuffle=True).sample(0)
        numbers = np.random.default_rng(0).integers(0, s.tokens // 5000, 5).tolist()
        for k in numbers:
            before = _resident()
            seconds = _timed(lambda k=k:                        # type: ignore[misc]
                             open_split([large], "969,30,1", "train", 4096, 1, shuffle=True).sample(k))
            print(f"open {s.documents:,} documents, {s.tokens:,} tokens and read sample {k:,}: {seconds * 1e3:.2f} ms, "
                  f"{(_resident() - before) / 1e6:.1f} MB more")
        words = []
        for i in range(s.datasets):
            with IndexedWriter(f"{folder}/d{i}", best_dtype(100)) as writer:
                writer.add_document([np.arange(9000 + i) % 100])
            words += [f"{1 + i * 7919 % 97 / 10}", f"{folder}/d{i}"]
        for _ in range(3):
            seconds = _timed(lambda: open_split(words, None, "train", 1024, 1, shuffle=True).sample(0))
            print(f"open a blend of {s.datasets:,} datasets and read its first sample: {seconds * 1e3:.0f} ms")


def _sparse(prefix: str, documents: int, length: int) -> None:
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        index.write(np.full(documents, length, "<i4").tobytes()
                    + (np.arange(documents, dtype="<i8") * length * 2).tobytes())
        index.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(2 * documents * length)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _timed(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


# ---- reading


@dataclass(frozen=True)
class Loading:
    """Times reading, and the wait of a training step."""

    seq: int = option(4096, "tokens of a sample")
    layers: int = option(2, "blocks of the model that trains")
    hidden: int = option(128, "its channels")
    steps: int = option(12, "its steps")


def loader(s: Loading) -> None:
    import torch

    from megazero.comm import connect
    from megazero.data import IndexedWriter, best_dtype, open_split
    from megazero.plan import Mesh, Progress, loss_scale, resolve
    from megazero.run import Feed, Run, Step, open_splits
    from megazero.settings import from_command_line
    with tempfile.TemporaryDirectory() as folder:
        for part in ("a", "b", "c"):
            with IndexedWriter(f"{folder}/{part}", best_dtype(50_000)) as writer:
                for i in range(200):
                    writer.add_document([np.random.default_rng(i).integers(0, 50_000, 200_000).astype(np.uint16)])
        source = open_split(["0.5", f"{folder}/a", "0.3", f"{folder}/b", "0.2", f"{folder}/c"],
                            None, "train", s.seq, 1, shuffle=True)
        count = 5000
        seconds = _timed(lambda: [source.sample(k) for k in range(count)])
        print(f"read {count} samples of {s.seq} tokens from a blend of 3: {count * s.seq / seconds / 1e6:.0f} million "
              f"tokens/s, {seconds / count * 1e6:.0f} us a sample, one thread")
        words = (f"--num-layers {s.layers} --hidden-size {s.hidden} --num-attention-heads 4 --seq-length {s.seq} "
                 f"--vocab-size 50000 --lr 1e-3 --train-iters {s.steps + 2} --eval-iters 0 "
                 f"--train-data-path 0.5 {folder}/a 0.3 {folder}/b 0.2 {folder}/c")
        c = from_command_line(words.split())
        run = Run(resolve(c, 1, 50_000), torch.device("cpu"), connect(Mesh.of(), 0, "gloo", 60))
        run.initialise()
        feed = Feed(run, open_splits(run.plan, None), None)
        _wait(feed, Step(run, feed.batches, Progress(loss_scale(c))), s)


def _wait(feed: Any, step: Any, s: Loading) -> None:
    """Runs steps; prints how long they were and how much of that they waited for their samples."""
    take, waits = feed.loader.take, []

    def timed(*a: object) -> object:
        start = time.perf_counter()
        out = take(*a)
        waits.append(time.perf_counter() - start)
        return out

    feed.loader.take = timed
    step.start()
    waits.clear()
    seconds = _timed(lambda: [step.start() for _ in range(s.steps)])
    feed.loader.close()
    print(f"{s.steps} training steps of one sample of {s.seq} tokens: {seconds / s.steps * 1e3:.1f} ms each, "
          f"of which {sum(waits) / s.steps * 1e6:.0f} us waiting for samples: {sum(waits) / seconds:.4%}; "
          f"longest wait {max(waits) * 1e6:.0f} us")


if __name__ == "__main__":
    run(lambda: commands("data.py", __doc__ or "", {"preprocess": (Preprocess, preprocess), "open": (Open, opening),
                                                    "loader": (Loading, loader)}))
