"""Muon: momentum whose update is replaced by the nearest (half-)orthogonal matrix.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
the five Newton-Schulz steps and their coefficients are from there.
"""
import torch

NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix):
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The step is scaled by sqrt(rows / columns) where that is above 1."""

    def __init__(self, matrices, lr, momentum=.95, weight_decay=.05):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(weight)
                velocity = state["velocity"].mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalise(weight.grad + group["momentum"] * velocity)
                shape_scale = max(1, weight.shape[0] / weight.shape[1]) ** .5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * shape_scale)
