"""GNN and EGNN of the paper's first experiment as plain torch modules: nothing Bayesian, nothing of blip_ft.

Four blocks of width 64. A body's edges go to all others; an edge knows the product of the charges. Architectures of
Satorras, Hoogeboom and Welling (arXiv 2102.09844), eqs. 2 to 7, written anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import BODIES, Samples

WIDTH, BLOCKS = 64, 4


def mlp(inputs: int, outputs: int, *, last: bool, dropout: float) -> nn.Sequential:
    """Two layers; an activation after the second where ``last``."""
    layers: list[nn.Module] = [
        nn.Linear(inputs, WIDTH),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Linear(WIDTH, outputs),
    ]
    return nn.Sequential(*layers, *([nn.SiLU(), nn.Dropout(dropout)] if last else []))


def edges(count: int) -> Tensor:
    """(2, 20 N) receiver and sender of every edge of N samples."""
    pairs = torch.tensor([[i, j] for i in range(BODIES) for j in range(BODIES) if i != j]).T
    first = BODIES * torch.arange(count).repeat_interleave(pairs.shape[1])
    return pairs.repeat(1, count) + first


class Block(nn.Module):
    """Messages along edges, and what bodies make of them."""

    def __init__(self, on_edges: int, dropout: float) -> None:
        super().__init__()
        self.message = mlp(2 * WIDTH + on_edges, WIDTH, last=True, dropout=dropout)
        self.update = mlp(2 * WIDTH, WIDTH, last=False, dropout=dropout)

    def messages(self, h: Tensor, edge: Tensor, pair: Tensor) -> Tensor:
        """(E, 64)."""
        out: Tensor = self.message(torch.cat([h[pair[0]], h[pair[1]], edge], dim=1))
        return out

    def updated(self, h: Tensor, message: Tensor, pair: Tensor) -> Tensor:
        """(n, 64)."""
        total = torch.zeros_like(h).index_add(0, pair[0], message)
        out: Tensor = h + self.update(torch.cat([h, total], dim=1))
        return out


class GNN(nn.Module):
    """Positions and velocities as numbers: no symmetry built in."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block(1, dropout) for _ in range(BLOCKS))
        self.decoder = mlp(WIDTH, 3, last=False, dropout=0.0)

    def forward(self, batch: Samples) -> Tensor:
        """(N, 5, 3) positions 1,000 steps later."""
        pair = edges(len(batch))
        x, v, q = batch.position.flatten(0, 1), batch.velocity.flatten(0, 1), batch.charge.flatten()
        h = self.embedding(torch.cat([x, v], dim=1))
        edge = (q[pair[0]] * q[pair[1]])[:, None]
        for block in self.blocks:
            h = block.updated(h, block.messages(h, edge, pair), pair)
        out: Tensor = self.decoder(h)
        return out.reshape(batch.position.shape)


class EBlock(Block):
    """A block that also moves the bodies."""

    def __init__(self, dropout: float) -> None:
        super().__init__(2, dropout)
        self.move = mlp(WIDTH, 1, last=False, dropout=dropout)
        self.speed = mlp(WIDTH, 1, last=False, dropout=dropout)
        with torch.no_grad():
            self.move[-1].weight.mul_(0.001)  # starts near the identity, as in the source


class EGNN(nn.Module):
    """Equivariant under translations, rotations and reflections."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(EBlock(dropout) for _ in range(BLOCKS))

    def forward(self, batch: Samples) -> Tensor:
        """(N, 5, 3) positions 1,000 steps later."""
        pair = edges(len(batch))
        x, v, q = batch.position.flatten(0, 1), batch.velocity.flatten(0, 1), batch.charge.flatten()
        h = self.embedding(v.norm(dim=1, keepdim=True))
        product = (q[pair[0]] * q[pair[1]])[:, None]
        for block in self.blocks:
            apart = x[pair[0]] - x[pair[1]]
            square = apart.square().sum(dim=1, keepdim=True)
            message = block.messages(h, torch.cat([square, product], dim=1), pair)
            shift = torch.zeros_like(x).index_add(0, pair[0], apart * block.move(message)) / (BODIES - 1)
            x = x + shift + block.speed(h) * v
            h = block.updated(h, message, pair)
        return x.reshape(batch.position.shape)


#: by name; ``rows`` of :class:`blip_ft.BayesianModule`: which layers have edges for rows, the others have bodies
MODELS = {"gnn": GNN, "egnn": EGNN}
ROWS = {
    "edge": r"blocks\.\d+\.(message|move)\..*",
    "body": r"embedding|decoder\..*|blocks\.\d+\.(update|speed)\..*",
}
#: layers that are made Bayesian: those of the blocks, as in the paper
NOISY = r"blocks\..*"


def rows_of(count: int) -> dict[str, Tensor]:
    """Sample of every edge and body."""
    sample = torch.arange(count)
    return {
        "edge": sample.repeat_interleave(BODIES * (BODIES - 1)),
        "body": sample.repeat_interleave(BODIES),
    }
