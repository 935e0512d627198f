"""What training minimises."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from kontext.denoiser import Conditioning, Denoiser
from kontext.flow import mix, velocity
from kontext.model.latents import PATCH
from kontext.timesteps import Timesteps, levels, loss_weights
from kontext.training.ahead import Pass
from kontext.training.feed import Example


@dataclass(frozen=True)
class Objective:
    """The flow-matching loss of a transformer: its error in the velocity at noise levels of `timesteps`.

    run: within it the transformer may be used.
    """

    transformer: nn.Module
    timesteps: Timesteps
    guidance: float
    run: Callable[[Callable[[], Tensor]], Tensor] = lambda use: use()

    def levels(self, example: Example) -> Tensor:
        """Noise levels t (B,), float32, on the CPU."""
        height, width = example.batch.latents.shape[-2:]
        return levels(self.timesteps, example.u, (height // PATCH) * (width // PATCH))

    def losses(self, asked: Pass) -> Tensor:
        """The loss (B,) of every item, float32: weighted mean square error of the velocity.

        Each item's mean is over what its mask lets count; see `masked_mean`.
        """
        batch, noise = asked.example.batch, asked.example.noise
        latents, t = batch.latents.float(), asked.t.to(batch.latents.device, non_blocking=True)
        conditioning = Conditioning(batch.txt, batch.vector, batch.references, self.guidance)

        def predict() -> Tensor:
            return Denoiser(self.transformer, conditioning)(mix(latents, noise, t), t, asked.modulations)

        error = self.run(predict).float() - velocity(latents, noise)
        return loss_weights(self.timesteps.weighting, t) * masked_mean(error.square(), batch.masks)


def masked_mean(values: Tensor, masks: Tensor | None) -> Tensor:
    """sum(mask * value) / sum(mask), (B,), of each item's values (B, C, h, w); masks (B, 1, h, w), None: all ones.

    So the loss is that of the part that counts, however small it is: an item with a mask weighs as much in a step as one
    without, and a learning rate means the same for both. (The plain mean of mask * value, as sd-scripts takes it,
    shrinks with the mask.)
    """
    if masks is None:
        return values.flatten(1).mean(1)
    weighted = (values * masks).flatten(1).sum(1)
    return weighted / (values.shape[1] * masks.flatten(1).sum(1))
