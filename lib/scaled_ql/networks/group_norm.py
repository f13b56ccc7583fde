"""Group normalisation, and one kernel for it each way on an NVIDIA GPU.

XLA sums a feature map over its places apart from normalising it, and slowly where places are few and channels many. The
kernels hold an image's channels in registers: each is read once and written once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from scaled_ql.networks.parts import Dtype

TILE = 8_192  # of a kernel's program: places, rounded up to a power of two, times channels


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He, 2018) over space and `group_size` channels, in float32 at least.

    Space is summed first, channel by channel, and only [B, C] numbers are grouped: whole images take only two sums and
    one multiply-add, forwards and backwards. Grouping the channels of the image, as `nnx.GroupNorm` does, took three
    times as long on a CPU. On a single GPU `fused_norm` takes its place.
    """

    def __init__(self, features: int, *, group_size: int, dtype: Dtype, epsilon: float = 1e-6):
        if features % group_size:
            raise ValueError(f"{features} channels cannot be divided into groups of group_size = {group_size}.")
        self.group_size, self.dtype, self.epsilon = group_size, dtype, epsilon
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array, rectify: bool = False) -> jax.Array:
        """[B, H, W, C] -> the same shape; with `rectify`, negative values become 0."""
        if _fusible(x, self.group_size):
            places = x.reshape(len(x), -1, x.shape[-1])
            y = fused_norm(places, self.scale[...], self.bias[...], self.group_size, self.epsilon, rectify)
            return y.reshape(x.shape).astype(self.dtype)
        size, _, _, channels = x.shape
        groups = (size, channels // self.group_size, self.group_size)
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def mean(values: jax.Array) -> jax.Array:
            return values.mean((1, 2)).reshape(groups).mean(-1, keepdims=True)

        average = mean(exact)
        variance = jnp.maximum(mean(jnp.square(exact)) - jnp.square(average), 0)
        scale = self.scale[...].reshape(1, *groups[1:]) * jax.lax.rsqrt(variance + self.epsilon)
        shift = self.bias[...].reshape(1, *groups[1:]) - average * scale
        scale, shift = (values.reshape(size, 1, 1, channels) for values in (scale, shift))
        y = (exact * scale + shift).astype(self.dtype)
        return nnx.relu(y) if rectify else y


def _fusible(x: jax.Array, group_size: int) -> bool:
    """Whether the kernels can be used: XLA does not know how to divide them among several devices."""
    one_gpu = jax.default_backend() == "gpu" and jax.device_count() == 1
    return one_gpu and x.dtype in (jnp.float32, jnp.bfloat16) and group_size & (group_size - 1) == 0


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def fused_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, group_size: int, epsilon: float, rectify: bool,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`GroupNorm` as a kernel; its gradient is another one, which normalises again.

    Args:
        x: float32 or bfloat16 [B, places, C].
        scale, bias: float32 [C].
        group_size: channels of a group, a power of two.
        epsilon: added to the variance.
        rectify: negative results become 0.
        interpret: run the kernels in JAX, on any device.

    Returns:
        the shape and dtype of `x`; sums are float32.
    """
    return _fused(_forward, x, jax.ShapeDtypeStruct(x.shape, x.dtype), group_size, epsilon, rectify, interpret)(
        x, scale, bias
    )


def _save(x: jax.Array, scale: jax.Array, bias: jax.Array, *how: Any) -> tuple:
    return fused_norm(x, scale, bias, *how), (x, scale, bias)


def _gradient(group_size: int, epsilon: float, rectify: bool, interpret: bool, saved: tuple, dy: jax.Array) -> tuple:
    x = saved[0]
    sums = jax.ShapeDtypeStruct((len(x), x.shape[-1]), jnp.float32)
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums)
    dx, dscale, dbias = _fused(_backward, x, results, group_size, epsilon, rectify, interpret)(*saved, dy)
    return dx, dscale.sum(0), dbias.sum(0)


fused_norm.defvjp(_save, _gradient)


def _fused(
    kernel: Any, x: jax.Array, results: Any, group_size: int, epsilon: float, rectify: bool, interpret: bool
) -> Any:
    """A kernel's call, with a program for each image and so many of its channels."""
    size, places, channels = x.shape
    columns = min(channels & -channels, max(TILE // pl.next_power_of_2(places), group_size, 8))
    how = {"places": places, "columns": columns, "group_size": group_size, "epsilon": epsilon, "rectify": rectify}
    return pl.pallas_call(
        partial(kernel, **how),
        out_shape=results,
        grid=(size, channels // columns),
        compiler_params=triton.CompilerParams(num_warps=8),
        interpret=interpret,
        name=f"group_norm{kernel.__name__}",
    )


def _forward(x_ref, scale_ref, bias_ref, y_ref, *, places, columns, group_size, epsilon, rectify) -> None:
    index, inside = _tile(places, columns)
    x = triton.load(x_ref.at[index], mask=inside, other=0.0).astype(jnp.float32)
    normal, _, _ = _normalise(x, inside, places, group_size, epsilon)
    y = normal * triton.load(scale_ref.at[index[2]]) + triton.load(bias_ref.at[index[2]])
    triton.store(y_ref.at[index], (jnp.maximum(y, 0.0) if rectify else y).astype(y_ref.dtype), mask=inside)


def _backward(
    x_ref, scale_ref, bias_ref, dy_ref, dx_ref, dscale_ref, dbias_ref, *, places, columns, group_size, epsilon, rectify
) -> None:
    index, inside = _tile(places, columns)
    x = triton.load(x_ref.at[index], mask=inside, other=0.0).astype(jnp.float32)
    dy = triton.load(dy_ref.at[index], mask=inside, other=0.0).astype(jnp.float32)
    normal, factor, mean = _normalise(x, inside, places, group_size, epsilon)
    scale = triton.load(scale_ref.at[index[2]])
    if rectify:
        dy = jnp.where(normal * scale + triton.load(bias_ref.at[index[2]]) > 0, dy, 0.0)
    dscale, dbias = (dy * normal).sum(0), dy.sum(0)  # of this image
    dx = factor * (dy * scale - mean(scale * dbias) - normal * mean(scale * dscale))
    triton.store(dx_ref.at[index], dx.astype(dx_ref.dtype), mask=inside)
    triton.store(dscale_ref.at[index[0], index[2]], dscale)
    triton.store(dbias_ref.at[index[0], index[2]], dbias)


def _tile(places: int, columns: int) -> tuple[tuple, jax.Array]:
    """This program's part of the images, [places rounded up, columns], and which of it there is."""
    rows = pl.next_power_of_2(places)
    index = pl.program_id(0), pl.ds(0, rows), pl.ds(pl.program_id(1) * columns, columns)
    return index, jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) < places


def _normalise(x: jax.Array, inside: jax.Array, places: int, group_size: int, epsilon: float) -> tuple:
    """A tile normalised; the factor of each channel; and a function from channels' sums to their groups' means."""
    columns = x.shape[1]

    def mean(sums: jax.Array) -> jax.Array:
        grouped = sums.reshape(columns // group_size, group_size).sum(1, keepdims=True) / (places * group_size)
        return jnp.broadcast_to(grouped, (columns // group_size, group_size)).reshape(columns)

    centred = jnp.where(inside, x - mean(x.sum(0)), 0.0)
    factor = jax.lax.rsqrt(mean(jnp.square(centred).sum(0)) + epsilon)
    return centred * factor, factor, mean
