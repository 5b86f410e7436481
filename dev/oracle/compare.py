"""
How tensors are compared: ||got - want|| / ||want|| a tensor, never an absolute difference; what should be
exactly zero must be.
"""
import torch

LOSSES, LIMIT = 1e-6, 1e-5  # the bars of the design


def relative(got, want):
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return float("inf")
    off, size = float((got - want).norm()), float(want.norm())
    return off / size if size > 0 else (0.0 if off == 0 else float("inf"))


def compare(got, want):
    """-> [(name, error, limit)], the worst first; a tensor missing or too many is infinitely wrong"""
    rows = []
    for name in want.keys() | got.keys():
        limit = LOSSES if "loss" in name else LIMIT
        if name not in want or name not in got:
            error, name = float("inf"), name + (" (missing)" if name in want else " (unknown)")
        elif name.startswith("gates.") and not torch.equal(got[name] != 0, want[name] != 0):
            error, name = float("inf"), name + " (active set)"
        else:
            error = relative(got[name], want[name])
        rows.append((name, float("inf") if error != error else error, limit))  # NaN is as wrong as can be
    return sorted(rows, key=lambda row: (-row[1] / row[2], row[0]))


def well_posed(compute, params, want, draws=4):
    """Whether half the tolerance is enough for compute(params) in float32, and for weights moved by as little
    as float32's rounding. A gate that is all but 0, or ten steps that amplify, can ask for more than that."""
    rng = torch.Generator().manual_seed(0)
    noise = lambda t: 2.0**-24 * torch.randn(t.shape, generator=rng, dtype=t.dtype)
    variants = [{n: t.float() for n, t in params.items()}]
    variants += [{n: t * (1 + noise(t)) for n, t in params.items()} for _ in range(draws)]
    return all(error <= limit / 2 for p in variants for _, error, limit in compare(compute(p), want))
