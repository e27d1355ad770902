"""What a plan uses of everything that a budget can limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxrmils.graph import LayerRow, ModelTable
from jaxrmils.policies.budget.limits import LatencyTable
from jaxrmils.policies.formats import FLOAT_BITS, PlanError
from jaxrmils.policies.plan import LayerPlan

Amount = Callable[[LayerRow, LayerPlan], float]


@dataclass(frozen=True)
class Resource:
    """One thing that a plan uses, as a sum over its layers.

    Attributes:
      name: of its limit.
      base: what is used whatever the plan.
      total: what base and sum are divided by.
      amount: what a layer uses. Of the size, without float leaves that other layers read too.
      is_exact: True where all amounts are integers.
      shared_leaves: of the size, leaves that several layers read: bits, and those layers. Such a
        leaf is stored if at least one of them keeps its weight in float.
    """

    name: str
    base: float
    total: float
    amount: Amount
    is_exact: bool = True
    shared_leaves: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def used(self, table: ModelTable, layers: Mapping[str, LayerPlan]) -> float:
        """What a plan's layers use, in the limit's unit."""
        used = self.base + sum(self.amount(table.layer[n], p) for n, p in layers.items())
        for bits, names in self.shared_leaves:
            used += bits * any(layers[n].weight_bits == FLOAT_BITS for n in names)
        return used / self.total


def resource(table: ModelTable, name: str, latency: LatencyTable | None = None) -> Resource:
    """The resource behind a limit.

    Args:
      table: the model's layers.
      name: a field of `Limits`.
      latency: for `latency`.

    Raises:
      PlanError: latency without a table, or nothing in the model that could be limited.
    """
    if name == "latency":
        if latency is None:
            raise PlanError("a limit on latency needs a table of seconds; pass a LatencyTable")
        return Resource(name, latency.overhead, 1, lambda r, p: latency.of(r.name, p), False)
    if name == "size_bytes" or (name == "size_share" and table.float_bits):
        return _size(table, name)
    amounts: Mapping[str, Amount] = {
        "weight_bits": lambda r, p: p.weight_bits * r.weight_size,
        "activation_bits": lambda r, p: p.activation_bits * _elements(r),
        "bops": _bit_operations,
        "bops_share": _bit_operations,
    }
    totals: Mapping[str, float] = {
        "size_share": 0,
        "weight_bits": sum(r.weight_size for r in table.layers),
        "activation_bits": sum(_elements(r) for r in table.layers),
        "bops": 1,
        "bops_share": sum(r.macs for r in table.layers) * FLOAT_BITS**2,
    }
    if not totals[name]:
        raise PlanError(f"the limit {name} limits nothing: no layer of the model has any such")
    return Resource(name, 0, totals[name], amounts[name])


def usage(
    table: ModelTable, layers: Mapping[str, LayerPlan], latency: LatencyTable | None = None
) -> dict[str, float]:
    """What a plan uses of everything that can be limited.

    Args:
      table: the model's layers.
      layers: `Plan.layers`.
      latency: to predict seconds.

    Returns:
      By the names of `Limits`, in their units; without those that the model has nothing of, and
      without latency where there is no table.

    Raises:
      PlanError: a layer or a format that the latency table lacks.

    >>> import jax.numpy as jnp
    >>> from jaxrmils import tabulate, trace
    >>> table = tabulate(trace(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, jnp.ones((1, 8))))
    >>> found = usage(table, {"w": LayerPlan(4, 8, ("nearest",))})
    >>> found["size_bytes"], found["bops_share"]  # 32 / 2 weights, 4 scales, 1 grid
    (37.0, 0.03125)
    """
    rows = table.layers
    names = ["size_bytes", *["size_share"] * bool(table.float_bits)]
    names += ["weight_bits"] * any(r.has_weight for r in rows)
    names += ["activation_bits"] * any(_elements(r) for r in rows)
    names += ["bops", "bops_share"] * any(r.macs for r in rows)
    names += ["latency"] * (latency is not None)
    return {name: float(resource(table, name, latency).used(table, layers)) for name in names}


def _size(table: ModelTable, name: str) -> Resource:
    """Size in bits; `ModelTable.size_bits` of each layer alone says what it adds."""
    readers: dict[int, list[str]] = {}
    for row in table.layers:
        for leaf in set(row.weight_leaves) - set(table.float_leaves):
            readers.setdefault(leaf, []).append(row.name)
    own = [b if len(readers.get(i, ())) == 1 else 0 for i, b in enumerate(table.leaf_bits)]
    alone = {
        row.name: dataclasses.replace(table, layers=(row,), leaf_bits=tuple(own), float_leaves=())
        for row in table.layers
    }

    def amount(row: LayerRow, layer: LayerPlan) -> float:
        return alone[row.name].size_bits({row.name: layer.bits})

    return Resource(
        name,
        base=sum(table.leaf_bits[i] for i in table.float_leaves),
        total=8 if name == "size_bytes" else table.float_bits,
        amount=amount,
        shared_leaves=tuple(
            (table.leaf_bits[leaf], tuple(names))
            for leaf, names in sorted(readers.items())
            if len(names) > 1
        ),
    )


def _elements(row: LayerRow) -> int:
    """Activation elements that enter the layer's sites for one example."""
    return sum(a.size * a.iterations for a in row.activations)


def _bit_operations(row: LayerRow, layer: LayerPlan) -> float:
    """MACs x the bits of both operands; of a product of activations, both are activations."""
    first = layer.weight_bits if row.has_weight else layer.activation_bits
    return row.macs * first * layer.activation_bits
