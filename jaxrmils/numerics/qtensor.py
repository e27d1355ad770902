"""A quantized tensor: codes with the grid that gives them meaning."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32, PRNGKeyArray

from jaxrmils.numerics.formats import Rounding
from jaxrmils.numerics.packing import pack_int4, unpack_int4
from jaxrmils.numerics.quant_params import (
    QuantParams,
    dequantize,
    quantize,
    spread_groups,
    weight_params,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "zero_point"],
    meta_fields=["bits", "packed_dim", "group"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """Codes, scale and zero point as one pytree.

    Nothing static depends on the leading axes, so a stack of layers can be indexed by `lax.scan`,
    `vmap` or `tree.map(lambda leaf: leaf[i], ...)`. Only the last axis of a packed tensor cannot
    be sliced that way. Construct with `from_codes` or `quantize_weight`; the constructor itself
    checks nothing, so that leaves may be tracers or shapes.

    Attributes:
        values: int8 codes; or uint8, two int4 codes per byte along the last axis; or jnp.int4.
        scale: float32. Its shape tells the channels: as many axes as the tensor, of size 1 where
            a scale is shared; or no axes at all. With groups, one of its axes counts groups.
        zero_point: int32 in the shape of `scale`, or None for a symmetric format.
        bits: 8 or 4 (static).
        packed_dim: the length of the last axis where `values` is packed, else None (static).
        group: how many neighbours share a scale along the axis where `scale` is shorter than the
            tensor and longer than 1; 0 for none (static).

    Example:
        >>> import jax.numpy as jnp
        >>> q = quantize_weight(jnp.array([[0.7, -0.7, 0.1]]), bits=4, channel_axes=(0,))
        >>> q.shape, q.packed, q.size_bits
        ((1, 3), True, 44)
        >>> print(q.codes(), q.dequantize())
        [[ 7 -7  1]] [[ 0.7 -0.7  0.1]]
    """

    values: Array
    scale: Float32[Array, "..."]
    zero_point: Int32[Array, "..."] | None
    bits: int
    packed_dim: int | None = None
    group: int = 0

    @classmethod
    def from_codes(
        cls, codes: Int8[Array, "..."], qp: QuantParams, pack: bool, group: int = 0
    ) -> "QTensor":
        """Wraps the codes of `quantize`.

        Args:
            codes: int8 codes.
            qp: the grid they were made with.
            pack: whether to store two codes per byte.
            group: as in `weight_params`.

        Returns:
            The quantized tensor, without a zero point where `qp` is symmetric.

        Raises:
            ValueError: `pack` is asked of 8 bits, or of a tensor without axes.

        Example:
            >>> import jax.numpy as jnp
            >>> qp = QuantParams(jnp.float32(0.5), jnp.int32(0), bits=4, symmetric=True)
            >>> QTensor.from_codes(jnp.array([1, 2], jnp.int8), qp, pack=True).values.shape
            (1,)
        """
        if pack and qp.bits != 4:
            raise ValueError(f"pack is True for {qp.bits} bits; only int4 is packed")
        zero_point = None if qp.symmetric else qp.zero_point
        if not pack:
            return cls(codes, qp.scale, zero_point, qp.bits, None, group)
        return cls(pack_int4(codes), qp.scale, zero_point, qp.bits, codes.shape[-1], group)

    @property
    def packed(self) -> bool:
        """Whether `values` holds two codes per byte."""
        return self.packed_dim is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, whatever its storage."""
        if self.packed_dim is None:
            return self.values.shape
        return (*self.values.shape[:-1], self.packed_dim)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim

    @property
    def params(self) -> QuantParams:
        """The grid as `QuantParams`; of groups, in the shape of `scale`."""
        zero_point = self.zero_point
        if zero_point is None:
            zero_point = jnp.zeros(self.scale.shape, jnp.int32)
        return QuantParams(self.scale, zero_point, self.bits, self.zero_point is None)

    @property
    def size_bits(self) -> int:
        """Storage in bits: `bits` per element, 32 per scale, 8 per zero point.

        Counts the format, not the arrays: the padding of an odd packed row is left out, and
        unpacked int4 codes count 4 bits though they fill int8 arrays.
        """
        size = self.bits * math.prod(self.shape) + 32 * math.prod(self.scale.shape)
        if self.zero_point is not None:
            size += 8 * math.prod(self.zero_point.shape)
        return size

    def codes(self) -> Int8[Array, "..."]:
        """The codes as int8, in `.shape`."""
        if self.packed_dim is None:
            return self.values.astype(jnp.int8)
        return unpack_int4(self.values, self.packed_dim)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The real numbers the codes stand for, computed in float32 and cast to `dtype`."""
        qp = self.params
        if self.group:
            qp = dataclasses.replace(qp, **_spread(qp, self.shape, self.group))
        return dequantize(self.codes(), qp, dtype)

    def native_int4(self) -> "QTensor":
        """The same tensor with unpacked `jnp.int4` codes, for hardware that multiplies int4.

        Raises:
            ValueError: the tensor has 8 bits.
        """
        if self.bits != 4:
            raise ValueError(f"the tensor has {self.bits} bits; native_int4 needs 4")
        return dataclasses.replace(self, values=self.codes().astype(jnp.int4), packed_dim=None)

    def unpacked(self) -> "QTensor":
        """The same tensor with a byte for each code; itself if it has that already."""
        if not self.packed:
            return self
        return dataclasses.replace(self, values=self.codes(), packed_dim=None)

    def transpose(self, perm: Sequence[int]) -> "QTensor":
        """Permutes the axes of the codes, and of scale and zero point with them.

        Args:
            perm: as for `jnp.transpose`.

        Returns:
            The permuted tensor in the same storage; a packed one whose last axis moves is
            unpacked and packed again along its new last axis.

        Raises:
            ValueError: `perm` is no permutation of the axes, or `scale` has neither no axes nor
                as many as the tensor.

        Example:
            >>> import jax.numpy as jnp
            >>> q = quantize_weight(jnp.ones((3, 5)), bits=4, channel_axes=(1,)).transpose((1, 0))
            >>> q.shape, q.scale.shape, q.values.shape
            ((5, 3), (5, 1), (5, 2))
        """
        perm = tuple(axis + self.ndim if axis < 0 else axis for axis in perm)
        if sorted(perm) != list(range(self.ndim)):
            raise ValueError(f"perm is {perm} for shape {self.shape}; expected each axis once")
        if self.scale.ndim not in (0, self.ndim):
            raise ValueError(
                f"scale has shape {self.scale.shape} for a tensor of shape {self.shape}; transpose "
                "needs as many axes in both, or a scale without axes"
            )
        scale, zero_point = self.scale, self.zero_point
        if scale.ndim:
            scale = jnp.transpose(scale, perm)
            zero_point = None if zero_point is None else jnp.transpose(zero_point, perm)
        if not self.packed or perm[-1] == self.ndim - 1:
            values, packed_dim = jnp.transpose(self.values, perm), self.packed_dim
        else:
            codes = jnp.transpose(self.codes(), perm)
            values, packed_dim = pack_int4(codes), codes.shape[-1]
        return QTensor(values, scale, zero_point, self.bits, packed_dim, self.group)


def quantize_weight(
    w: Float[Array, "..."],
    *,
    bits: int,
    channel_axes: tuple[int, ...],
    rounding: Rounding = "nearest",
    key: PRNGKeyArray | None = None,
    pack: bool | None = None,
    group: int = 0,
) -> QTensor:
    """Quantizes a weight symmetrically, by the largest magnitude of each channel or group.

    Args:
        w: the weight, any float dtype.
        bits: 8 or 4.
        channel_axes: axes that keep a scale of their own; see `weight_params`.
        rounding: as for `quantize`.
        key: as for `quantize`.
        pack: whether to store two codes per byte; None packs int4.
        group: how many neighbours along the last axis that is no channel share a scale; see
            `weight_params`. 0 for one scale per channel.

    Returns:
        The quantized weight.

    Raises:
        ValueError: as `weight_params`, `quantize` and `QTensor.from_codes`.

    Example:
        >>> import jax.numpy as jnp
        >>> q = quantize_weight(jnp.array([[1.27, -0.5], [0.3, 0.0]]), bits=8, channel_axes=(1,))
        >>> print(q.codes())
        [[ 127 -127]
         [  30    0]]
    """
    qp = weight_params(w, bits=bits, channel_axes=channel_axes, group=group)
    wide = dataclasses.replace(qp, **_spread(qp, w.shape, group)) if group else qp
    codes = quantize(w, wide, rounding, key)
    return QTensor.from_codes(codes, qp, pack=bits == 4 if pack is None else pack, group=group)


def _spread(qp: QuantParams, shape: tuple[int, ...], group: int) -> dict[str, Array]:
    """Scale and zero point of a grid of groups, for every element."""
    return {
        "scale": spread_groups(qp.scale, shape, group),
        "zero_point": spread_groups(qp.zero_point, shape, group),
    }
