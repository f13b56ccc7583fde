"""Image encoders: float [B, 84, 84, C] -> feature map [B, H, W, F], the last layer rectified, nothing pooled away."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Dtype = Any
kaiming = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def _conv(inputs: int, outputs: int, kernel: int, stride: int, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Convolution without bias, for a normalisation to follow."""
    return nnx.Conv(
        inputs, outputs, (kernel, kernel), stride, use_bias=False, kernel_init=kaiming, dtype=dtype, rngs=rngs
    )


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet-34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, group_size: int, dtype: Dtype, rngs: nnx.Rngs):
        norm = partial(nnx.GroupNorm, num_groups=None, group_size=group_size, dtype=dtype, rngs=rngs)
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, width, 3, stride), norm(width)
        self.conv2, self.norm2 = conv(width, width, 3, 1), norm(width)
        same = stride == 1 and inputs == width
        self.shortcut = None if same else nnx.Sequential(conv(inputs, width, 1, stride), norm(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        residual = nnx.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return nnx.relu(residual + (self.shortcut(x) if self.shortcut else x))


class BottleneckBlock(nnx.Module):
    """1 x 1, 3 x 3 (which strides), 1 x 1 to four times the width, and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, group_size: int, dtype: Dtype, rngs: nnx.Rngs):
        norm = partial(nnx.GroupNorm, num_groups=None, group_size=group_size, dtype=dtype, rngs=rngs)
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        outputs = self.expansion * width
        self.conv1, self.norm1 = conv(inputs, width, 1, 1), norm(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), norm(width)
        self.conv3, self.norm3 = conv(width, outputs, 1, 1), norm(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nnx.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        residual = nnx.relu(self.norm1(self.conv1(x)))
        residual = nnx.relu(self.norm2(self.conv2(residual)))
        residual = self.norm3(self.conv3(residual))
        return nnx.relu(residual + (self.shortcut(x) if self.shortcut else x))


class ResNet(nnx.Module):
    """ResNet of He et al. (2016) with ImageNet's strides (84 -> 3 x 3) and group instead of batch normalisation.

    Appendix B.1; group normalisation because a device holds only a few of the batch's images (appendix A.3).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[BottleneckBlock],
        blocks: tuple[int, ...],
        width: int,
        *,
        channels: int,
        group_size: int,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = _conv(channels, width, 7, 2, dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=None, group_size=group_size, dtype=dtype, rngs=rngs)
        layers, features = [], width
        for stage, repeats in enumerate(blocks):
            for number in range(repeats):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(block(features, width * 2**stage, stride, group_size=group_size, dtype=dtype, rngs=rngs))
                features = width * 2**stage * block.expansion
        self.blocks = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding="SAME")
        return self.blocks(x)


class ResidualUnit(nnx.Module):
    """Two pre-activated 3 x 3 convolutions and an identity shortcut (IMPALA)."""

    def __init__(self, features: int, *, dtype: Dtype, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, features, features, (3, 3), kernel_init=kaiming, dtype=dtype, rngs=rngs)
        self.conv1, self.conv2 = conv(), conv()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return x + self.conv2(nnx.relu(self.conv1(nnx.relu(x))))


class ImpalaStage(nnx.Module):
    """Convolution, max pool by 2, two residual units."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), kernel_init=kaiming, dtype=dtype, rngs=rngs)
        self.units = nnx.Sequential(*(ResidualUnit(outputs, dtype=dtype, rngs=rngs) for _ in range(2)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return self.units(nnx.max_pool(self.conv(x), (3, 3), (2, 2), padding="SAME"))


class Impala(nnx.Module):
    """The deep residual network of Espeholt et al. (2018): 16, 32, 32 channels, times a width multiplier."""

    def __init__(self, multiplier: int, *, channels: int, group_size: int, dtype: Dtype, rngs: nnx.Rngs):
        del group_size  # the family has no normalisation
        sizes = [channels, *(multiplier * width for width in (16, 32, 32))]
        self.stages = nnx.Sequential(*(ImpalaStage(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return nnx.relu(self.stages(x))


class Nature(nnx.Module):
    """The three convolutions of Mnih et al. (2015)."""

    def __init__(self, *, channels: int, group_size: int, dtype: Dtype, rngs: nnx.Rngs):
        del group_size  # the family has no normalisation
        layers: list[Callable] = []
        for outputs, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            size, strides = (kernel, kernel), (stride, stride)
            conv = nnx.Conv(
                channels, outputs, size, strides, padding="VALID", kernel_init=kaiming, dtype=dtype, rngs=rngs
            )
            layers += [conv, nnx.relu]
            channels = outputs
        self.layers = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return self.layers(x)


ENCODERS: dict[str, Callable[..., nnx.Module]] = {
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": partial(ResNet, BottleneckBlock, (3, 4, 6, 3), 64),
    "resnet101": partial(ResNet, BottleneckBlock, (3, 4, 23, 3), 64),
    "resnet152": partial(ResNet, BottleneckBlock, (3, 8, 36, 3), 64),
    "resnet_narrow": partial(ResNet, BasicBlock, (1, 1, 1, 1), 16),
    "impala_x1": partial(Impala, 1),
    "impala_x4": partial(Impala, 4),
    "impala_x8": partial(Impala, 8),
    "impala_x16": partial(Impala, 16),
    "nature": Nature,
}


def make_encoder(
    name: str, *, channels: int = 4, group_size: int = 4, dtype: Dtype = jnp.float32, rngs: nnx.Rngs
) -> nnx.Module:
    """An encoder by name.

    Args:
        name: a key of `ENCODERS`.
        channels: frames in an observation.
        group_size: channels per group of the group normalisation (the paper's "group size of 4").
        dtype: of the computation; parameters are float32.
        rngs: for the initial parameters.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}.")
    return ENCODERS[name](channels=channels, group_size=group_size, dtype=dtype, rngs=rngs)
