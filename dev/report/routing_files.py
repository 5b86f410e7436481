"""
The files that --eval --stats and --trace write (safetensors; their tensors are listed in dev/doc/log.md),
checked whole before anything is drawn: every count is exact, so one that contradicts another is a damaged or
foreign file.
"""

from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load

from sources import Refused, parse_json, read_bytes, whole

MOST_FILE_BYTES = 8 << 30
STATS_COMMAND = "./train_remoe --load RUN --eval --stats RUN/stats.safetensors"
TRACE_COMMAND = "./train_remoe --load RUN --trace RUN/trace.safetensors --text FILE.txt"


def load_tensors(path, kind, command):
    """-> metadata, {name: array}"""
    data = read_bytes(path, MOST_FILE_BYTES)
    again = f"\n  ---> make it anew: {command}"
    try:
        tensors = load(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise Refused(
            f"{path} is damaged, or no safetensors file ({str(error) or type(error).__name__}){again}"
        ) from None
    metadata = header.get("__metadata__") or {} if isinstance(header, dict) else {}
    if metadata.get("kind") != kind:
        what = f"it is a {metadata['kind']} file" if "kind" in metadata else "its metadata has no 'kind'"
        raise Refused(f"{path} is not a {kind} file: {what}{again}")
    return metadata, tensors


class Checked:
    """what both kinds share: metadata as numbers, tensors of the shape that the metadata says"""

    def __init__(self, path, kind, command):
        self.path = Path(path)
        self.again = f"\n  ---> make it anew: {command}"
        self.metadata, self.tensors = load_tensors(self.path, kind, command)
        self.layers, self.experts, self.vocabulary = (
            self.size(key) for key in ("layers", "experts", "vocab_size")
        )
        self.active = self.size("active")
        self.router = self.metadata.get("router", "")
        self.checkpoint = self.metadata.get("checkpoint", "")
        self.changed = self.path.stat().st_mtime

    def refuse(self, what):
        raise Refused(f"{self.path}: {what}{self.again}")

    def size(self, key):
        text = self.metadata.get(key, "")
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= 1 << 24):
            self.refuse(f"its metadata has no usable '{key}'")
        return int(text)

    def names(self, key):
        value = parse_json(self.metadata.get(key, ""))
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            self.refuse(f"its metadata has no usable '{key}'")
        return value

    def tensor(self, name, shape, kinds="iu"):
        if name not in self.tensors:
            self.refuse(f"it lacks the tensor {name}")
        array = self.tensors[name]
        if array.shape != tuple(shape) or array.dtype.kind not in kinds:
            wanted = ", ".join(map(str, shape))
            self.refuse(f"{name} is {array.dtype}{list(array.shape)}, not [{wanted}] of kind {kinds}")
        if kinds != "f" and array.size and array.min() < 0:
            self.refuse(f"{name} has a negative count")
        return array

    @property
    def share(self):
        """k/E, what an expert would get if all were alike"""
        return self.active / self.experts


class Stats(Checked):
    """
    domains [D] names; tokens [D]; routed [D, L, E]; count [V]; active_sum [V]; used {layer: [V, E]}
    """

    def __init__(self, path):
        super().__init__(path, "stats", STATS_COMMAND)
        self.domains = self.names("domains")
        self.tokens = self.tensor("tokens", [len(self.domains)])
        self.routed = np.stack(
            [self.tensor(f"routed.{name}", [self.layers, self.experts]) for name in self.domains]
        )
        self.count = self.tensor("count", [self.vocabulary])
        self.active_sum = self.tensor("active", [self.vocabulary])
        layers = parse_json(self.metadata.get("used_layers", ""))
        layers = layers if isinstance(layers, list) else [None]
        if any(whole(layer) is None or layer >= self.layers for layer in layers):
            self.refuse("its metadata has no usable 'used_layers'")
        self.used = {layer: self.tensor(f"used.{layer}", [self.vocabulary, self.experts]) for layer in layers}
        self._check_sums()

    def _check_sums(self):
        if self.tokens.sum() == 0:
            self.refuse("it counted no token")
        if (self.routed > self.tokens[:, None, None]).any():
            self.refuse("an expert has more tokens than its domain")
        if self.count.sum() != self.tokens.sum() or self.active_sum.sum() != self.routed.sum():
            self.refuse("its sums by token id and by domain differ")
        if any((used > self.count[:, None]).any() for used in self.used.values()):
            self.refuse("an expert has a token id more often than it occurs")

    @property
    def ratio(self):
        """[D, L, E] the share of a domain's tokens whose layer l activates expert e"""
        return self.routed / np.maximum(self.tokens, 1)[:, None, None]

    @property
    def ratio_all(self):
        """[L, E] the same of all tokens"""
        return self.routed.sum(0) / self.tokens.sum()

    @property
    def mean_active(self):
        """[V] experts per layer and occurrence; NaN for ids that do not occur"""
        count = np.where(self.count > 0, self.count, 1)
        return np.where(self.count > 0, self.active_sum / (self.layers * count), np.nan)


class Trace(Checked):
    """
    sources [S] (name, first token, end); pieces [N] bytes; loss [N]; gates [L, N, E]
    """

    def __init__(self, path):
        super().__init__(path, "trace", TRACE_COMMAND)
        self.ids = self.tensors.get("ids", np.zeros(0))
        n = self.ids.size
        if n == 0:
            self.refuse("it has no token")
        self.ids = self.tensor("ids", [n])
        self.loss = self.tensor("loss", [n], "f")
        self.gates = self.tensor("gates", [self.layers, n, self.experts], "f")
        offsets, data = self.tensor("offsets", [n + 1]), self.tensors.get("bytes", np.zeros(0))
        data = self.tensor("bytes", [data.size], "u")
        if offsets[0] != 0 or offsets[-1] != data.size or (np.diff(offsets) < 0).any():
            self.refuse("its offsets do not cut its bytes into tokens")
        text = data.astype(np.uint8).tobytes()
        self.pieces = [text[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
        self._read_sources(n)

    def _read_sources(self, n):
        names = self.names("sources")
        starts = self.tensor("starts", [len(names)])
        if starts[0] != 0 or starts[-1] > n or (np.diff(starts) < 0).any():
            self.refuse("its sources do not begin in order")
        ends = [*starts[1:].tolist(), n]
        self.sources = [(name, a, b) for name, a, b in zip(names, starts.tolist(), ends) if b > a]
