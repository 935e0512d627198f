"""First-block caching: steps at which the model would say about what it said before take that over.

The first block tells. While what it adds to the target's tokens has changed little since the last step that was
computed in full, what all other blocks added then is added again (the FBCache of ParaAttention). An approximation: for
when speed counts more than the exact picture.
"""

from torch import Tensor

from kontext.model.transformer import Modulations, Transformer


class StepCache:
    """A transformer's trunk that skips all blocks but the first where it may. Of one picture, or one of each item.

    threshold: the relative change of what the first block adds, below which the others are skipped. Every item decides
    for itself, so a picture does not depend on those in its batch. To decide, the CPU waits for the GPU once a step.
    """

    def __init__(self, model: Transformer, threshold: float) -> None:
        self.model = model
        self.threshold = threshold
        self.added: Tensor | None = None  # by the first block at the last full step, (B, targets, D)
        self.rest: Tensor | None = None  # by all others
        self.passes = self.skipped = 0

    def __call__(
        self, img: Tensor, txt: Tensor, pe: Tensor, mods: Modulations, *, targets: int | None = None
    ) -> Tensor:
        """As `Transformer.trunk`, without gradients."""
        after, txt = self.model.first(img, txt, pe, mods)
        added, x = (after - img)[:, :targets], after[:, :targets]
        rows = self._changed(added)
        if self.added is None or self.rest is None:
            self.added, self.rest = added.clone(), added.clone()
        if rows:
            out = self.model.rest(after[rows], txt[rows], pe, _items(mods, rows), targets=targets)
            self.added[rows], self.rest[rows] = added[rows], out - x[rows]
        self.passes, self.skipped = self.passes + len(img), self.skipped + len(img) - len(rows)
        return self.model.final_layer(x + self.rest, mods.vec)

    def _changed(self, added: Tensor) -> list[int]:
        """The items to be computed in full."""
        if self.added is None:
            return list(range(len(added)))
        change = (added - self.added).float().abs().mean((1, 2)) / self.added.float().abs().mean((1, 2))
        return [row for row, value in enumerate(change.tolist()) if not value < self.threshold]


def _items(mods: Modulations, rows: list[int]) -> Modulations:
    """Those of some items, or the one of all."""
    if len(mods.vec) == 1:
        return mods
    return Modulations(mods.vec[rows], tuple(mod[rows] for mod in mods.blocks))
