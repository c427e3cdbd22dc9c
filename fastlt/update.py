"""From gradients to weights: loss scale, clipping, and no step where a gradient is not finite. Nothing waits for the device."""

import torch
from torch import Tensor
from torch.optim import Optimizer

FIRST_SCALE = 2.0**16
GROWS_AFTER = 2000  # steps in a row without overflow


class Updater:
    """clip: the largest norm of the gradient; 0: any. scales: for float16, whose range gradients would leave."""

    def __init__(self, optimizer: Optimizer, clip: float, scales: bool) -> None:
        self.optimizer, self.clip, self.scales = optimizer, clip, scales
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        device = self.parameters[0].device
        self.scale = torch.full((), FIRST_SCALE if scales else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self._start_momentum()

    def _start_momentum(self) -> None:
        """At zero, which is the same, but for a first step that is skipped: it would leave the buffers to chance."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Gradients of `scale` times the loss, which are used up, to a step. Returns their norm, (); not finite: skipped."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.scale
        if self.clip or self.scales:
            factor = (self.clip / (norm + 1e-6)).clamp(max=1) if self.clip else torch.ones_like(norm)
            torch._foreach_mul_(gradients, factor / self.scale)
        overflow = (~torch.isfinite(norm)).float()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, overflow  # type: ignore[attr-defined]
        self.optimizer.step()  # fused, it looks at found_inf on the device
        self.optimizer.zero_grad()
        if self.scales:
            self._rescale(overflow)
        return norm

    def _rescale(self, overflow: Tensor) -> None:
        """Halved at an overflow, doubled after long without (arXiv 1710.03740)."""
        self.good_steps = (self.good_steps + 1) * (1 - overflow)
        grows = (self.good_steps >= GROWS_AFTER).float()
        self.scale = self.scale * (1 - overflow / 2) * (1 + grows)
        self.good_steps = self.good_steps * (1 - grows)

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
