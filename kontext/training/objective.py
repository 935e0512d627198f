"""What training minimises."""

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
    """The flow-matching loss of a transformer: its error in the velocity at noise levels of `timesteps`."""

    transformer: nn.Module
    timesteps: Timesteps
    guidance: float

    def levels(self, example: Example) -> Tensor:
        """Noise levels t (B,), float32, on the CPU."""
        height, width = example.batch.latents.shape[-2:]
        return levels(self.timesteps, example.u, (height // PATCH) * (width // PATCH))

    def losses(self, asked: Pass) -> Tensor:
        """The loss (B,) of every item, float32: weighted mean square error of the velocity."""
        batch, noise = asked.example.batch, asked.example.noise
        latents, t = batch.latents.float(), asked.t.to(batch.latents.device, non_blocking=True)
        denoiser = Denoiser(
            self.transformer, Conditioning(batch.txt, batch.vector, batch.references, self.guidance)
        )
        error = denoiser(mix(latents, noise, t), t, asked.modulations).float() - velocity(latents, noise)
        return loss_weights(self.timesteps.weighting, t) * error.square().flatten(1).mean(1)
