"""Contractions with constants while a network is traced: torch.einsum, and products from the left, as linear layers."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.operators.modules import Permute
from quartz_plugin.operators.selection import reshaped
from quartz_plugin.operators.tracing import ATTENTION, BATCH, Append, Refusal, Value

MOST_WEIGHTS = 2**26
"""Entries of the matrix that a contraction may become."""


def build_einsum(append: Append, equation: str, *operands: Any) -> Value:
    """Let a linear layer stand for a sum of products of one activation and constants."""
    given = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else list(operands)
    if not isinstance(equation, str):
        raise Refusal("it is written without an equation; write torch.einsum('bn,mn->bm', x, weight)")
    places = [place for place, each in enumerate(given) if isinstance(each, Value)]
    if len(places) != 1:
        raise Refusal(ATTENTION)
    (place,) = places
    value: Value = given.pop(place)
    terms, out = _terms(equation, place, value.tensor.dim())
    own = terms.pop(place)
    return _contracted(append, value, own, list(zip(terms, given, strict=True)), out)


def from_left(append: Append, matrix: Tensor, value: Value) -> Value:
    """Let a linear layer stand for ``matrix @ value``."""
    if value.tensor.dim() < 3:
        raise Refusal(BATCH)
    if matrix.dim() > 2:
        raise Refusal("its matrices differ from sample to sample or channel to channel; multiply by one matrix")
    letters = string.ascii_lowercase[2 : value.tensor.dim() + 1]
    own, row = "a" + letters, "b" if matrix.dim() == 2 else ""
    return _contracted(append, value, own, [(row + own[-2], matrix)], own[:-2] + row + own[-1])


def _terms(equation: str, place: int, rank: int) -> tuple[list[str], str]:
    """Letters of each operand and of the result, an ellipsis of the activation's written out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        raise Refusal("its equation names no result; write it behind '->'")
    terms = left.split(",")
    if "..." in terms[place]:
        free = [letter for letter in string.ascii_letters if letter not in equation]
        letters = "".join(free[: rank - len(terms[place].replace("...", ""))])
        terms[place], out = terms[place].replace("...", letters), out.replace("...", letters)
    if any("." in each for each in (*terms, out)):
        raise Refusal("its constants have an ellipsis; write out their letters")
    if any(len(set(each)) < len(each) for each in terms):
        raise Refusal("it takes a diagonal; write it as one letter for each dimension")
    return terms, out


def _contracted(append: Append, value: Value, own: str, constants: Sequence[tuple[str, Tensor]], out: str) -> Value:
    batch, sizes = own[0], dict(zip(own, value.tensor.shape, strict=True))
    weighted = set("".join(letters for letters, _ in constants))
    if out[:1] != batch or batch in weighted:
        raise Refusal(BATCH)
    free = [letter for letter in own[1:] if letter in out and letter not in weighted]
    mixed = [letter for letter in own[1:] if letter not in free]
    made = [letter for letter in out[1:] if letter not in free]
    inputs = math.prod(sizes[letter] for letter in mixed)
    known = sizes | {name: size for letters, each in constants for name, size in zip(letters, each.shape, strict=True)}
    outputs = math.prod(known[letter] for letter in made)
    if inputs * outputs > MOST_WEIGHTS:
        raise Refusal(f"its matrix has {inputs * outputs} entries, and {MOST_WEIGHTS} are possible; use a convolution")
    units = torch.eye(inputs, dtype=torch.float64).view(inputs, *(sizes[letter] for letter in mixed))
    equation = ",".join([batch + "".join(mixed), *(letters for letters, _ in constants)])
    tensors = [each.detach().double().to(units.device) for _, each in constants]
    columns = torch.einsum(f"{equation}->{batch}{''.join(made)}", units, *tensors)
    order = [0, *(own.index(letter) for letter in (*free, *mixed))]
    rows = [sizes[letter] for letter in free]
    value = reshaped(append, _in_order(append, value, order), [*rows, inputs])
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(columns.reshape(inputs, outputs).t().contiguous(), requires_grad=False)
    value = append(linear, value)
    value = reshaped(append, value, [*rows, *(known[letter] for letter in made)])
    return _in_order(append, value, [0, *(1 + [*free, *made].index(letter) for letter in out[1:])])


def _in_order(append: Append, value: Value, order: list[int]) -> Value:
    return value if order == list(range(len(order))) else append(Permute(order), value)


__all__ = ["build_einsum", "from_left"]
