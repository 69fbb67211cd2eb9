"""Deterministic weights and images for comparing a model with its reference.

A golden file stores only what the reference model computed. Its weights and its
input are regenerated here from the parameter names, so a full-size model's golden
is a few kilobytes. The names and shapes are those of the reference checkpoint.
"""

from __future__ import annotations

import zlib

import numpy as np


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def value(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return the float32 (or int64) array for one entry of a state dict.

    Args:
        name: The entry's key in the reference checkpoint.
        shape: Its shape.
        seed: Another seed gives another, equally valid, set of weights.
    """
    rng = _rng(name, seed)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    noise = rng.standard_normal(shape).astype(np.float32)
    if leaf == "running_var":
        return 1.0 + 0.2 * np.abs(noise)
    if leaf == "running_mean":
        return 0.1 * noise
    if "A_log" in leaf:  # log(1..N) along the state axis, perturbed
        states = np.arange(1, shape[-1] + 1, dtype=np.float32)
        return np.log(states) + 0.1 * noise
    if leaf in ("D", "Ds", "D_b"):
        return 1.0 + 0.1 * noise
    if "dt_proj" in name and "bias" in leaf:  # softplus(bias) is near 0.01 to 0.1
        return -3.5 + noise
    if len(shape) <= 1 or (all(n == 1 for n in shape[1:]) and "conv" not in name and "proj" not in name):
        if "bias" in leaf:
            return 0.1 * noise
        return 1.0 + 0.1 * noise  # a norm's or a layer scale's weight
    fan_in = int(np.prod(shape[1:])) if len(shape) != 3 else int(np.prod(shape[2:]))
    if leaf == "x_proj_weight" and len(shape) == 3 and shape[-1] == 1:  # SparX keeps (4 * out, in, 1)
        fan_in = shape[1]
    if name.endswith("pos_embed.weight") and len(shape) == 4:  # SparX adds it to x in every block
        noise = 0.1 * noise
    return noise / np.sqrt(max(fan_in, 1)).astype(np.float32)


def image(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a float32 batch (batch, 3, height, width), smooth plus noise, about unit variance."""
    rng = _rng("image", seed)
    ys = np.linspace(0, 2 * np.pi, height, dtype=np.float32)[None, None, :, None]
    xs = np.linspace(0, 2 * np.pi, width, dtype=np.float32)[None, None, None, :]
    phase = rng.uniform(0, 2 * np.pi, (batch, 3, 1, 1)).astype(np.float32)
    freq = rng.integers(1, 4, (batch, 3, 1, 1)).astype(np.float32)
    smooth = np.sin(freq * ys + phase) + np.cos(freq * xs - phase)
    return (smooth + 0.3 * rng.standard_normal((batch, 3, height, width))).astype(np.float32)
