"""The training step of a ResNet with C51 and CQL in plain PyTorch, as a baseline for ours.

Only `09_performance` uses it; it needs the extra ``torch``. The network is that of `networks.make_q_network`
(pointwise embedding, feature normalisation, heads for all games) with PyTorch's own layers.
"""

import time
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaled_ql.defaults import ENCODERS, NUM_ATOMS
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


class Network(nn.Module):
    """uint8 [B, 4, 84, 84], games [B] -> logits float32 [B, 18, 51]."""

    def __init__(self, encoder: str, num_games: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        family, repeats, width = ENCODERS[encoder]
        expansion = {"resnet_basic": 1, "resnet_bottleneck": 4}[family]
        layers = [_conv(4, width, 7, 2), nn.GroupNorm(width // 4, width), nn.MaxPool2d(3, 2, 1), nn.ReLU()]
        features = width
        for stage, count in enumerate(repeats):
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append(Block(features, width << stage, stride, expansion))
                features = (width << stage) * expansion
        self.encoder = nn.Sequential(*layers)
        self.embedding = nn.Parameter(torch.ones(features, 3, 3))
        sizes = [9 * features, *hidden_sizes]
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


def measure_torch_step(
    encoder: str,
    batch: Batch,
    num_actions: list[int],
    hidden_sizes: tuple[int, ...],
    *,
    dtype: str = "float32",
    seconds: float = 5.0,
) -> float:
    """Median seconds of a step in PyTorch's memory format channels_last, on the accelerator if PyTorch sees one.

    On an accelerator the networks are compiled, and bfloat16 is autocast. On a CPU PyTorch uses a thread per core.

    Args:
        encoder: a ResNet of `networks.ENCODERS`.
        batch: batch of NumPy arrays, as for our step; its stacks are cut before the timing.
        num_actions: sizes of the games' action sets.
        hidden_sizes: sizes of the fully connected layers.
        dtype: dtype of the computation.
        seconds: duration of the measurement.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    online = Network(encoder, len(num_actions), hidden_sizes).to(device, memory_format=torch.channels_last)
    target = Network(encoder, len(num_actions), hidden_sizes).to(device, memory_format=torch.channels_last)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), 2e-4, eps=3.125e-4)
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

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            loss = step()
        loss.item()  # waits
        return (time.perf_counter() - began) / calls

    timed(3)
    calls = max(1, round(0.05 / timed(1)))  # as `performance.median_seconds`
    durations, until = [], time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < until:
        durations.append(timed(calls))
    return float(np.median(durations))
