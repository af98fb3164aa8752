"""Numbers that depend on every bit of what they are of: of tensors, and of the structure of networks."""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

BLOCK = 1024
"""Words that are weighed by multipliers of their own; whole blocks are then weighed by powers of :data:`BASE`."""

BASE = 0x9E3779B97F4A7C15 - 2**64
"""Odd, as a signed 64-bit number."""

CHUNK = 1024 * BLOCK
"""Words that are widened to 64 bits together where there are no compiled loops."""


def _multipliers() -> np.ndarray[Any, Any]:
    """Odd numbers of 31 bits, all different, so that two words of a block that change places change the sum."""
    hashed = [hashlib.blake2b(index.to_bytes(4, "big"), digest_size=4).digest() for index in range(BLOCK)]
    return np.array([int.from_bytes(each, "big") >> 1 | 1 for each in hashed], np.int32)


MULTIPLIERS = _multipliers()
"""Without any pattern of their own: sums of some of them are those of others by chance alone."""


def new_number() -> int:
    """A number that no other network has, in no process; random, without a random generator of others."""
    return secrets.randbits(62) + 1


def digest(tensor: Tensor) -> int:
    """64 bits that depend on every bit of a tensor and its place: its words of 32 bits, weighed and summed.

    A change of one word is always seen, any other but for a share of about 2^-32. Equal on all devices.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0, -3.0])
    >>> digest(x) == digest(x.clone()), digest(x) == digest(x.flip(0)), digest(x) == digest(-x)
    (True, False, False)
    """
    if tensor.device.type == "cpu" and _compiles():
        from quartz_plugin.graph.kernels import digest_words

        if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous():
            # Most tensors; numpy's views take less time than torch's.
            words = tensor.detach().numpy().reshape(-1).view(np.int32)
        else:
            words = _words(tensor).numpy()
        return int(digest_words(words, MULTIPLIERS, BASE))
    return digest_in_torch(_words(tensor))


def digests(tensors: Iterable[Tensor]) -> int:
    """One number for several tensors in this order, from each one's :func:`digest`."""
    total = 0
    for tensor in tensors:
        total = (total * BASE + digest(tensor)) % 2**64
    return total - 2**63


@functools.cache
def _compiles() -> bool:
    return find_spec("numba") is not None


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bits as a vector of int32."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.element_size() >= 4:
        return flat.view(torch.int32)
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.uint8).to(torch.int32)


def digest_in_torch(words: Tensor) -> int:
    """:func:`digest` of a vector of words without compiled loops, or on another device."""
    multipliers = torch.from_numpy(MULTIPLIERS).to(words.device, torch.int64)
    powers = torch.full((CHUNK // BLOCK,), BASE, dtype=torch.int64, device=words.device).cumprod(0)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(CHUNK) if len(words) else ():
        padded = torch.nn.functional.pad(chunk.to(torch.int64), (0, -len(chunk) % BLOCK))
        sums = (padded.view(-1, BLOCK) * multipliers).sum(dim=1)
        falling = powers[: len(sums)].flip(0)
        total = total * falling[0] + (sums[:-1] * falling[1:]).sum() + sums[-1]
    return int(total)


class Structure:
    """A network apart from the values of its weights, as it was at one moment.

    Its network keeps it, and replaces it by another when it has been edited; so what stands in `memo` lives as long as
    it holds, and keeps no other network alive.

    Attributes
    ----------
    number : int
        64 bits that are the same for every network of this structure, in every process.
    memo : dict
        What readers have found out about the structure, for one another.
    """

    def __init__(self, description: Any, nodes: list[fx.Node], modules: list[nn.Module]) -> None:
        self._description, self._nodes, self._modules = description, nodes, modules
        written = hashlib.blake2b(repr(description).encode(), digest_size=8).digest()
        self.number = int.from_bytes(written, "big", signed=True)
        self.memo: dict[Any, Any] = {}

    def is_still(self, description: Any, nodes: list[fx.Node], modules: list[nn.Module]) -> bool:
        """Check that a network of this description is made of the very same nodes and modules."""
        # Lists compare by identity first: neither nodes nor modules have an equality of their own.
        return self._description == description and self._nodes == nodes and self._modules == modules
