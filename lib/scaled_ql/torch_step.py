"""The training step of a Q-network with C51 and CQL in plain PyTorch, as a baseline for ours.

Only `09_performance` uses it; it needs the extra ``torch``. The network is that of `networks.make_q_network`
(pointwise embedding, feature normalisation, heads for all games) with PyTorch's own layers.
"""

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaled_ql import performance
from scaled_ql.defaults import ENCODERS, NUM_ATOMS
from scaled_ql.games import TRAINING_GAMES, action_names
from scaled_ql.networks.vit import PATCH, sine_positions
from scaled_ql.replay import Batch


class Block(nn.Module):
    """A basic (expansion 1) or a bottleneck block (4), with group normalisation, 4 channels a group."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int):
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            sizes = ((inputs, width, 3, stride), (width, width, 3, 1))
        else:
            sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
        layers = []
        for number, size in enumerate(sizes):
            layers += [_conv(*size), nn.GroupNorm(size[1] // 4, size[1])]
            layers += [nn.ReLU()] if number < len(sizes) - 1 else []
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.GroupNorm(outputs // 4, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return F.relu(self.residual(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _resnet(expansion: int, repeats: tuple[int, ...], width: int) -> nn.Module:
    layers = [_conv(4, width, 7, 2), nn.GroupNorm(width // 4, width), nn.MaxPool2d(3, 2, 1), nn.ReLU()]
    features = width
    for stage, count in enumerate(repeats):
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers.append(Block(features, width << stage, stride, expansion))
            features = (width << stage) * expansion
    return nn.Sequential(*layers)


def _convolutions(*sizes: tuple[int, int, int]) -> list[nn.Module]:
    """Rectified convolutions (channels, kernel, stride) without padding."""
    channels = [4, *(size[0] for size in sizes)]
    pairs = zip(pairwise(channels), sizes)
    return [layer for (a, b), (_, kernel, stride) in pairs for layer in (nn.Conv2d(a, b, kernel, stride), nn.ReLU())]


class ViT(nn.Module):
    """Patches and a class token through PyTorch's transformer layers, which fuse their attention: a map of 6 x 6."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.patch, self.class_token = nn.Conv2d(4, width, PATCH, PATCH), nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", torch.tensor(sine_positions(6, 6, width)))
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **how)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, 84, 84] -> [B, width, 6, 6]."""
        tokens = self.patch(x).flatten(2).mT + self.positions
        tokens = torch.cat([self.class_token.expand(len(x), 1, -1), tokens], 1)
        return self.blocks(tokens)[:, 1:].mT.unflatten(2, (6, 6))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet_basic": lambda *size: _resnet(1, *size),
    "resnet_bottleneck": lambda *size: _resnet(4, *size),
    "nature": lambda: nn.Sequential(*_convolutions((32, 8, 4), (64, 4, 2), (64, 3, 1))),
    "nature_narrow": lambda: nn.Sequential(nn.AvgPool2d(2), *_convolutions((8, 4, 2), (16, 4, 2), (16, 3, 1))),
    "vit": ViT,
}


class Network(nn.Module):
    """uint8 [B, 4, 84, 84], games [B] -> logits float32 [B, 18, 51]."""

    def __init__(self, encoder: str, num_games: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        family, *size = ENCODERS[encoder]
        self.encoder = FAMILIES[family](*size)
        shape = self.encoder(torch.zeros(1, 4, 84, 84)).shape[1:]
        self.embedding = nn.Parameter(torch.ones(shape))
        sizes = [shape.numel(), *hidden_sizes]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norm = nn.LayerNorm(sizes[1])
        self.heads = nn.Linear(sizes[-1], num_games * 18 * NUM_ATOMS)

    def forward(self, frames: Tensor, game: Tensor) -> Tensor:
        """See the class."""
        x = self.encoder(frames.contiguous(memory_format=torch.channels_last).float() / 255) * self.embedding
        x = x.flatten(1)
        for number, layer in enumerate(self.hidden):
            x = F.relu(self.norm(layer(x)) if number == 0 else layer(x))
        logits = self.heads(F.normalize(x.float(), dim=-1)).view(len(x), -1, 18, NUM_ATOMS)
        return logits[torch.arange(len(x), device=x.device), game].float()


def make_torch_step(
    encoder: str,
    batch: Batch,
    num_actions: list[int],
    hidden_sizes: tuple[int, ...],
    *,
    dtype: str = "float32",
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """A step in PyTorch's memory format channels_last, with its fused Adam, on the accelerator if PyTorch sees one.

    On a CPU PyTorch uses a thread per core; bfloat16 is autocast.

    Args:
        encoder: of `networks.ENCODERS`, of a family of `FAMILIES`.
        batch: batch of NumPy arrays, as for our step; its stacks are cut before any step.
        num_actions: sizes of the games' action sets.
        hidden_sizes: sizes of the fully connected layers.
        dtype: dtype of the computation.
        compiled: whether the networks are compiled, by the first step.

    Returns:
        a function without arguments that takes a step and returns its loss.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    online = Network(encoder, len(num_actions), hidden_sizes).to(device, memory_format=torch.channels_last)
    target = Network(encoder, len(num_actions), hidden_sizes).to(device, memory_format=torch.channels_last)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), 2e-4, eps=3.125e-4, fused=True)
    atoms = torch.linspace(-20, 20, NUM_ATOMS, device=device)
    masks = torch.arange(18, device=device) < torch.tensor(num_actions, device=device)[:, None]
    stacks = [np.moveaxis(np.asarray(x), -1, 1) for x in (batch.observation, batch.next_observation)]
    now, following = (torch.tensor(np.ascontiguousarray(x), device=device) for x in stacks)
    fields = (batch.action, batch.reward, batch.discount, batch.game)
    action, reward, discount, game = (torch.tensor(np.asarray(x), device=device) for x in fields)
    action, game, rows = action.long(), game.long(), torch.arange(len(action), device=device)
    allowed = masks[game]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX's products in float32
    if compiled:
        online, target = torch.compile(online), torch.compile(target)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            with torch.no_grad():
                probability = target(following, game).softmax(-1)
                best = (probability @ atoms).masked_fill(~allowed, -torch.inf).argmax(1)
                place = ((reward[:, None] + discount[:, None] * atoms).clamp(-20, 20) + 20) / (40 / (NUM_ATOMS - 1))
                near = (1 - (place[:, None] - torch.arange(NUM_ATOMS, device=device)[:, None]).abs()).clamp(0, 1)
                goal = (near * probability[rows, best][:, None]).sum(-1)
            logits = online(now, game)
            values = (logits.softmax(-1) @ atoms).masked_fill(~allowed, -torch.inf)
            td_loss = -(goal * logits[rows, action].log_softmax(-1)).sum(-1)
            loss = (td_loss + 0.05 * (values.logsumexp(1) - values[rows, action])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def median_seconds(step: Callable[[], Tensor], seconds: float) -> float:
    """Median time of a step, after three that do not count; as `performance.median_seconds`."""

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            loss = step()
        loss.item()  # waits
        return (time.perf_counter() - began) / calls

    timed(3)
    calls = max(1, round(0.05 / timed(1)))
    durations, until = [], time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < until:
        durations.append(timed(calls))
    return float(np.median(durations))


def compare(
    encoder: str,
    batch_size: int,
    num_games: int,
    hidden_sizes: tuple[int, ...],
    dtype: str,
    limits: performance.Ceilings,
    seconds: float,
) -> dict[str, float | str]:
    """Our step beside PyTorch's, not compiled and compiled: milliseconds. Ours is measured before and after them.

    Where PyTorch cannot compile a step, that column is missing.
    """
    sizes = [len(action_names(game)) for game in TRAINING_GAMES[:num_games]]
    noise = performance.random_batch(batch_size, num_games)

    def ours() -> float:
        how = {"num_games": num_games, "hidden_sizes": hidden_sizes, "dtype": dtype, "seconds": seconds}
        return performance.measure_step(encoder, batch_size, limits, **how)["ms"]

    before, theirs = ours(), {}
    for name, compiled in (("PyTorch, ms", False), ("PyTorch compiled, ms", True)):
        step = make_torch_step(encoder, noise, sizes, hidden_sizes, dtype=dtype, compiled=compiled)
        try:
            theirs[name] = 1e3 * median_seconds(step, seconds)
        except RuntimeError as error:
            if not compiled:
                raise
            print(f"{encoder}: PyTorch could not compile it here ({str(error).splitlines()[0]})")
    milliseconds = (before + ours()) / 2
    row = {"encoder": encoder, "dtype": dtype, "JAX, ms": milliseconds} | theirs
    return row | {"JAX, of PyTorch's best": milliseconds / min(theirs.values())}
