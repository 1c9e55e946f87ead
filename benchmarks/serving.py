"""The server of docs/serving.md under load: how long answers take, whether all come, and whether its memory grows.

    python benchmarks/serving.py --clients 32 --seconds 60 --requests 10000 --output results

Each client asks, waits for the answer, and asks again. Measure on a machine that does nothing else: clients and server
share it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from polyrep.cli import main as polyrep
from polyrep.data import load_retrieval_dataset
from polyrep.hub import fetch, fingerprint
from polyrep.report import provenance, write_results

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Start the server, load it for some time, then with many requests, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--dataset", default="python_docs")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=10_000, help="for the memory; 0 leaves it out")
    parser.add_argument("--output", type=Path, help="folder for serving.json and .md")
    args = parser.parse_args()
    dataset, model = load_retrieval_dataset(args.dataset), fetch(args.model)
    queries = list(dataset.queries.values())
    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch), model, dataset.corpus, args) as server:
        process, port = server
        ended = time.perf_counter() + args.seconds
        load(port, queries, args.clients, iter(lambda: time.perf_counter() < ended, False))  # warms it up
        ended = time.perf_counter() + args.seconds
        taken, errors = load(port, queries, args.clients, iter(lambda: time.perf_counter() < ended, False))
        before = resident(process.pid)
        more, failed = load(port, queries, args.clients, iter(range(args.requests)))
        after = resident(process.pid)
    p50, p95, p99 = (1000 * float(np.percentile(taken, q)) for q in (50, 95, 99))
    numbers = {
        "p50 in ms": p50,
        "p95 in ms": p95,
        "p99 in ms": p99,
        "p99 / p50": p99 / p50,
        "requests per second": len(taken) / args.seconds,
        "requests": len(taken) + len(more),
        "errors": errors + failed,
        "MiB before": before / 2**20,
        "MiB after": after / 2**20,
        "memory after / before": after / before,
    }
    for name, number in numbers.items():
        print(f"{name:<24}{number:12,.2f}")
    row = {"system": f"{args.clients} clients", "dataset": args.dataset, "split": "test"}
    results = {
        "name": "serving",
        **provenance(shlex.join(["python", *sys.argv])),
        "seeds": [],
        "settings_tried": 1,
        "models": {args.model: fingerprint(model)},
        "rows": [row | {"metric": name, "value": float(number)} for name, number in numbers.items()],
        "claims": [
            {"claim": "p99 / p50", "value": p99 / p50, "target": 2.0, "met": p99 < 2 * p50},
            {"claim": "errors", "value": float(errors + failed), "target": 0.0, "met": not errors + failed},
            {"claim": "memory after / before", "value": after / before, "target": 1.1, "met": after < 1.1 * before},
        ],
    }
    write_results(results, args.output)


@contextmanager
def served(
    folder: Path, model: Path, corpus: dict[str, str], args: argparse.Namespace
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The page's server over some documents of a corpus: its process and port. It has to end well, too."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)[:1]
    (folder / "server.py").write_text(example, encoding="utf-8")
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as lines:
        for identifier, text in itertools.islice(corpus.items(), args.documents):
            lines.write(json.dumps({"_id": identifier, "text": text}) + "\n")
    encode = ["encode", str(model), "--input", str(folder / "corpus.jsonl"), "--output", str(folder / "shards")]
    if polyrep(encode):
        raise SystemExit("the corpus could not be encoded")
    named = {"POLYREP_MODEL": str(model), "POLYREP_INDEX": "memory:", "POLYREP_CORPUS": str(folder / "shards")}
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", "0", "--no-access-log"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | named, stdout=output, stderr=output)
    try:
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise SystemExit(log.read_text(encoding="utf-8"))
            time.sleep(0.1)
        yield process, int(found[1])
        process.send_signal(signal.SIGTERM)
        print(f"ended with status {process.wait(60)} on SIGTERM")
    finally:
        process.kill()


def load(port: int, queries: list[str], clients: int, turns: Iterator[object]) -> tuple[list[float], int]:
    """Ask from all clients, a request a turn: the seconds of each answer, and how many answers were none."""
    texts, taken, errors = itertools.cycle(queries), [], []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for _ in turns:
            started = time.perf_counter()
            try:
                body = json.dumps({"query": next(texts)[:10_000]})
                connection.request("POST", "/search", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                found = json.load(answer)
                if answer.status != 200 or not found["hits"]:
                    raise ValueError(answer.status)
            except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
                errors.append(error)
                connection.close()
                continue
            taken.append(time.perf_counter() - started)

    together(clients, ask)
    for error in errors[:3]:
        print(f"error: {error!r}")
    return taken, len(errors)


def together(count: int, call: Callable[[], None]) -> None:
    """Call in so many threads; an error in one is raised here."""
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(call) for _ in range(count)]:
            future.result()


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main()
