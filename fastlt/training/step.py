"""From gradients to weights: loss scale, clipping, and no step where a gradient is not finite.

Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

FIRST_SCALE = 2.0**16
GROWS_AFTER = 2000  # steps in a row without overflow


class MaxNorm:
    """A limit on the length of the rows of a head, weight (C, D).

    It lies `share` of the way from the shortest to the longest row at the start (Alshammari et al.
    2022, arXiv 2203.14197, section 3.3).
    """

    def __init__(self, weight: Tensor, share: float) -> None:
        self.weight = weight
        lengths = weight.detach().norm(dim=1)
        self.limit = torch.lerp(lengths.min(), lengths.max(), share)

    @torch.no_grad()
    def project(self) -> None:
        """Cut rows that are too long back to the limit."""
        lengths = self.weight.norm(dim=1, keepdim=True)
        self.weight.mul_((self.limit / lengths.clamp(min=1e-12)).clamp(max=1))


class Updater:
    """The way from gradients to weights.

    clip: the largest norm of the gradient; 0: any. scales: for float16, whose range gradients would
    leave. sharded: parameters of which each rank has its own part.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: float,
        scales: bool,
        sharded: Sequence[Tensor] = (),
        max_norm: MaxNorm | None = None,
    ) -> None:
        self.max_norm = max_norm
        self.optimizer, self.clip, self.scales = optimizer, clip, scales
        self._sharded = {id(parameter) for parameter in sharded}
        self.parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        device = self.parameters[0].device
        self.scale = torch.full((), FIRST_SCALE if scales else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self._start()

    def _start(self) -> None:
        """The optimiser's state at zero, where it begins anyway: a first step that is skipped would
        leave a momentum to chance, and what is loaded from a checkpoint needs a place.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if isinstance(self.optimizer, AdamW):
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = (
                        torch.zeros_like(parameter),
                        torch.zeros_like(parameter),
                    )
                elif group["momentum"]:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take an optimiser step by gradients of `scale` times the loss, which are used up.

        Returns their norm, (); where it is not finite the step was skipped.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = self._norm() / self.scale
        if self.clip or self.scales:
            factor = (
                (self.clip / (norm + 1e-6)).clamp(max=1) if self.clip else torch.ones_like(norm)
            )
            torch._foreach_mul_(gradients, factor / self.scale)
        overflow = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, overflow  # type: ignore[attr-defined]
        self.optimizer.step()  # fused, it looks at found_inf on the device
        self.optimizer.zero_grad()
        if self.max_norm is not None:
            self.max_norm.project()
        if self.scales:
            self._rescale(overflow)
        return norm

    def _norm(self) -> Tensor:
        """The same on every rank."""
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        everywhere = [parameter.grad for parameter in moving if id(parameter) not in self._sharded]
        norm = torch.nn.utils.get_total_norm(
            [gradient for gradient in everywhere if gradient is not None]
        )
        if not self._sharded:
            return norm
        here = [parameter.grad for parameter in moving if id(parameter) in self._sharded]
        square = (
            torch.nn.utils.get_total_norm(
                [gradient for gradient in here if gradient is not None]
            ).to(self.scale.device)
            ** 2
        )
        dist.all_reduce(square)
        return (norm.to(self.scale.device) ** 2 + square).sqrt()

    def _rescale(self, overflow: Tensor) -> None:
        """Halved at an overflow, doubled after long without (arXiv 1710.03740)."""
        self.good_steps = (self.good_steps + 1) * (1 - overflow)
        grows = (self.good_steps >= GROWS_AFTER).float()
        self.scale = self.scale * (1 - overflow / 2) * (1 + grows)
        self.good_steps = self.good_steps * (1 - grows)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps of the loss scale."""
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """Take up what a checkpoint kept."""
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
