#!/usr/bin/env python3
"""tokenizer.h against tiktoken's encode_ordinary: one thread, a document at a time, in turns, best CPU time.

    make build/bench_tokenizer && pip install tiktoken
    python3 dev/bench/bench_tokenizer.py --gpt2 data/gpt2 TEXT.jsonl.zst ...

--gpt2: a folder with vocab.json, merges.txt and gpt2.tiktoken. The ids of both are compared, too.
"""
import argparse
import base64
import hashlib
import json
import os
import struct
import subprocess
import time

os.environ["RAYON_NUM_THREADS"] = "1"
import tiktoken  # noqa: E402

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def load_tiktoken(path):
    with open(path, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def read_documents(path):
    if path.endswith(".zst"):
        data = subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
    else:
        with open(path, "rb") as file:
            data = file.read()
    if ".txt" in path:
        return [data.decode()]
    return [json.loads(line)["text"] for line in data.split(b"\n") if line.strip()]


def time_tiktoken(encoding, documents):
    start = time.process_time()
    ids = [encoding.encode_ordinary(document) for document in documents]
    return time.process_time() - start, ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpt2", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    encoding = load_tiktoken(os.path.join(args.gpt2, "gpt2.tiktoken"))
    documents = {path: read_documents(path) for path in args.files}
    best = {path: [1e30, 1e30] for path in args.files}
    rows, hashes = {}, {}
    for _ in range(args.rounds):
        for path in args.files:
            seconds, ids = time_tiktoken(encoding, documents[path])
            best[path][0] = min(best[path][0], seconds)
            if path not in hashes:
                flat = [i for document in ids for i in document]
                hashes[path] = hashlib.sha256(struct.pack(f"<{len(flat)}H", *flat)).hexdigest()
        command = ["build/bench_tokenizer", args.gpt2, *args.files]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            path, size, count, seconds, digest = line.split()
            best[path][1] = min(best[path][1], float(seconds))
            rows[path] = (int(size), int(count), digest)
    print(f"{'file':24} {'MB':>6} {'ids':>9} {'equal':>6} {'tiktoken MB/s':>14} {'ours':>10} {'ratio':>6}")
    total = [0, 0.0, 0.0]
    for path in args.files:
        size, count, digest = rows[path]
        theirs, ours = best[path]
        equal = "yes" if digest == hashes[path] else "NO"
        name = os.path.basename(path)
        print(f"{name:24} {size / 1e6:6.2f} {count:9d} {equal:>6} {size / theirs / 1e6:14.1f} "
              f"{size / ours / 1e6:10.1f} {theirs / ours:6.1f}")
        total = [total[0] + size, total[1] + theirs, total[2] + ours]
    print(f"{'all':24} {total[0] / 1e6:6.2f} {'':9} {'':6} {total[0] / total[1] / 1e6:14.1f} "
          f"{total[0] / total[2] / 1e6:10.1f} {total[1] / total[2]:6.1f}")


if __name__ == "__main__":
    main()
