"""The training loop both stages share: AdamW, warm-up, a flat rate, a linear decay, and averaged weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WARMUP = 100
DECAY = 0.35
CHECKPOINT_SECONDS = 100.0


def rate_at(step: int, steps: int) -> float:
    """Share of the full learning rate: up in the first WARMUP steps, down in the last DECAY of all steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


class Fit:
    """A model being fitted: weights, their running average, and the optimizer; resumable from one file."""

    def __init__(self, model: nn.Module, *, rate: float, checkpoint: Path) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.rate = rate
        self.checkpoint = checkpoint
        self.step = 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        if checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def update(self, loss: Tensor, steps: int) -> None:
        """One step of the optimizer and of the running average, whose memory is a tenth of the training so far."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_at(self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        new = max(10 / (self.step + 10), 0.002)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), new)

    def run(
        self, loss_of: Callable[[nn.Module, int], Tensor], *, steps: int, say: Callable[[str], None]
    ) -> nn.Module:
        """Train up to `steps`, reporting every 50 and saving now and then; returns the averaged model."""
        total, since, saved = 0.0, time.monotonic(), time.monotonic()
        while self.step < steps:
            loss = loss_of(self.model, self.step)
            self.update(loss, steps)
            total += loss.item()
            if self.step % 50 == 0:
                say(
                    f"step {self.step}/{steps}  loss {total / 50:.4f}  {(time.monotonic() - since) / 50:.3f} s/step"
                )
                total, since = 0.0, time.monotonic()
            if time.monotonic() - saved > CHECKPOINT_SECONDS or self.step == steps:
                self.save()
                saved = time.monotonic()
        return self.average
