"""Image encoders: float [B, 84, 84, C] -> feature map [B, H, W, F], nothing pooled away.

The last layer is rectified, or, of a ViT, normalised; what reads a feature map must not rely on its sign.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from scaled_ql.defaults import ENCODERS, GROUP_SIZE
from scaled_ql.networks.parts import Dtype, run_blocks, squares_to_channels
from scaled_ql.networks.vit import ViT

kaiming = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def _conv(inputs: int, outputs: int, kernel: int, stride: int, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Convolution without bias, for a normalisation to follow."""
    return nnx.Conv(
        inputs, outputs, (kernel, kernel), stride, use_bias=False, kernel_init=kaiming, dtype=dtype, rngs=rngs
    )


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3 x 3 at every second place, [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C], padded as ``SAME``.

    Written as maxima of slices, rows first: the gradient of XLA's own window reduction is a scatter, which took a tenth
    of a narrow ResNet's step on a CPU, eight times what this takes.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        before = 0 if size % 2 == 0 else 1
        pads = [(0, 0)] * x.ndim
        pads[axis] = (before, 1)
        padded = jnp.pad(x, pads, constant_values=-jnp.inf)
        a, b, c = (jax.lax.slice_in_dim(padded, k, k + size + size % 2 - 1, 2, axis) for k in range(3))
        x = jnp.maximum(jnp.maximum(a, b), c)
    return x


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He, 2018) over space and `group_size` channels, in float32 at least.

    Space is summed first, channel by channel, and only [B, C] numbers are grouped: whole images take only two sums and
    one multiply-add, forwards and backwards. Grouping the channels of the image, as
    `nnx.GroupNorm` does, took three times as long on a CPU.
    """

    def __init__(self, features: int, *, group_size: int, dtype: Dtype, epsilon: float = 1e-6):
        if features % group_size:
            raise ValueError(f"{features} channels cannot be divided into groups of group_size = {group_size}.")
        self.group_size, self.dtype, self.epsilon = group_size, dtype, epsilon
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
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
        return (exact * scale + shift).astype(self.dtype)


def strided_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Compute a convolution whose stride divides the image, [B, H, W, C] -> [B, H', W', F], without a stride.

    Squares of stride x stride pixels are put in the channels, with zeros where the kernel ends within one: the same
    products, on 16 channels instead of a frame stack's 4, which fill vector and matrix units better.

    Args:
        x: [B, H, W, C].
        kernel: [K, K, C, F].
        stride: divides H and W.
        padding: ``SAME`` or ``VALID``.
    """
    size, channels = kernel.shape[0], kernel.shape[2]
    before = max(size - stride, 0) // 2 if padding == "SAME" else 0  # of the image, as XLA pads
    outputs = -(-x.shape[1] // stride) if padding == "SAME" else (x.shape[1] - size) // stride + 1
    shift = -before % stride  # so that the window begins with a whole square
    squares = -(-(shift + size) // stride)
    kernel = jnp.pad(kernel, ((shift, squares * stride - size - shift),) * 2 + ((0, 0), (0, 0)))
    kernel = kernel.reshape(squares, stride, squares, stride, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(squares, squares, stride * stride * channels, -1)
    left = -(-before // stride)
    pads = (left, outputs + squares - 1 - left - x.shape[1] // stride)
    return jax.lax.conv_general_dilated(
        squares_to_channels(x, stride), kernel, (1, 1), (pads, pads), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet-34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, group_size: int, dtype: Dtype, rngs: nnx.Rngs):
        norm = partial(GroupNorm, group_size=group_size, dtype=dtype)
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
        norm = partial(GroupNorm, group_size=group_size, dtype=dtype)
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
        remat: bool,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        self.conv = _conv(channels, width, 7, 2, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(width, group_size=group_size, dtype=dtype)
        layers, features = [], width
        for stage, repeats in enumerate(blocks):
            for number in range(repeats):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(block(features, width * 2**stage, stride, group_size=group_size, dtype=dtype, rngs=rngs))
                features = width * 2**stage * block.expansion
        self.blocks = nnx.Sequential(*layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        x = self.norm(strided_convolution(x, self.conv.kernel[...].astype(self.conv.dtype), 2, "SAME"))
        return run_blocks(self.blocks, nnx.relu(max_pool(x)), self.remat)


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
        return self.units(max_pool(self.conv(x)))


class Impala(nnx.Module):
    """The deep residual network of Espeholt et al. (2018): 16, 32, 32 channels, times a width multiplier.

    He et al.'s initial kernels, the Q-network's trunk above it; Dopamine's Impala-DQN has Xavier's or LeCun's, and one
    dense layer of 512.
    """

    def __init__(self, multiplier: int, *, channels: int, group_size: int, remat: bool, dtype: Dtype, rngs: nnx.Rngs):
        del group_size  # the family has no normalisation
        self.remat = remat
        sizes = [channels, *(multiplier * width for width in (16, 32, 32))]
        self.stages = nnx.Sequential(*(ImpalaStage(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return nnx.relu(run_blocks(self.stages, x, self.remat))


class Nature(nnx.Module):
    """The three convolutions of Mnih et al. (2015), without padding; Dopamine's network pads them (``SAME``)."""

    def __init__(self, *, channels: int, group_size: int, remat: bool, dtype: Dtype, rngs: nnx.Rngs):
        del group_size, remat  # the family has no normalisation, and nothing to save
        self.layers = _convolutions(((32, 8, 4), (64, 4, 2), (64, 3, 1)), channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        return self.layers(x)


class NarrowNature(nnx.Module):
    """`Nature` with a quarter of its channels, on images of half the size, for CPUs."""

    def __init__(self, *, channels: int, group_size: int, remat: bool, dtype: Dtype, rngs: nnx.Rngs):
        del group_size, remat
        self.layers = _convolutions(((8, 4, 2), (16, 4, 2), (16, 3, 1)), channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        x = x[:, ::2] + x[:, 1::2]
        return self.layers((x[:, :, ::2] + x[:, :, 1::2]) / 4)


def _convolutions(layers: tuple, channels: int, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Sequential:
    """Rectified convolutions (channels, kernel, stride) without padding."""
    parts: list[Callable] = []
    for outputs, kernel, stride in layers:
        size, strides = (kernel, kernel), (stride, stride)
        conv = nnx.Conv(channels, outputs, size, strides, padding="VALID", kernel_init=kaiming, dtype=dtype, rngs=rngs)
        parts += [conv, nnx.relu]
        channels = outputs
    return nnx.Sequential(*parts)


FAMILIES: dict[str, Callable[..., nnx.Module]] = {
    "resnet_basic": partial(ResNet, BasicBlock),
    "resnet_bottleneck": partial(ResNet, BottleneckBlock),
    "impala": Impala,
    "nature": Nature,
    "nature_narrow": NarrowNature,
    "vit": ViT,
}


def make_encoder(
    name: str,
    *,
    channels: int = 4,
    group_size: int = GROUP_SIZE,
    remat: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make an encoder by name.

    Args:
        name: a key of `defaults.ENCODERS`.
        channels: frames in an observation.
        group_size: channels per group of the group normalisation (the paper's "group size of 4").
        remat: recompute each block in the backward pass instead of keeping its activations: less memory, a third more
            time.
        dtype: dtype of the computation; parameters are float32.
        rngs: random keys of the initial parameters.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}.")
    family, *arguments = ENCODERS[name]
    how = {"channels": channels, "group_size": group_size, "remat": remat, "dtype": dtype, "rngs": rngs}
    return FAMILIES[family](*arguments, **how)
