"""Stage 3, check: every operation stands where spikes can carry it out, or is refused by name."""

from __future__ import annotations

from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.operators import OPERATORS, ConversionError, Role


def check(draft: Draft) -> Draft:
    """Refuse max pooling of signed values, and networks without neurons; log what each module becomes.

    Raises
    ------
    ConversionError
        Naming the module that stands in the way, and what could be done.
    """
    signed_since: str | None = None
    last: Role | None = None
    for node, module in draft.steps():
        path, row = str(node.target), OPERATORS[type(module)]
        if row.role is Role.SYNAPSE:
            signed_since = signed_since or path
        elif row.role is Role.RECTIFIER:
            signed_since = None
        elif row.role is Role.MAX_POOL and signed_since is not None:
            raise ConversionError(
                f"cannot convert {path!r} ({type(module).__name__}): it pools signed values (from {signed_since!r}), "
                "and a first spike says the largest value only of a ReLU's; put a ReLU before or right behind it"
            )
        if row.role is not Role.ROUTE:
            last = row.role
        draft.log(path, exact=row.exact)
        if draft.report[path].get("became") is None:
            moved = draft.report[path].get("moved")
            draft.log(path, became=row.role.value + (", moved behind the ReLU" if moved else ""))
    if last is None:
        raise ConversionError("the network computes nothing: it has no weights and no ReLU")
    if last is Role.MAX_POOL:
        raise ConversionError(
            "the network ends in max pooling, and only neurons can be read out; end it with a linear layer"
        )
    return draft
