"""Which batches make up which step: arithmetic alone, so that any step can be found again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A run of `steps` optimizer steps over epochs of `batches` batches.

    A step takes `accumulation` batches from each of `processes` processes; the last step of an epoch takes what is
    left. Epochs and steps are counted from 0 here.
    """

    batches: int
    accumulation: int
    processes: int
    steps: int

    @property
    def per_step(self) -> int:
        return self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches // self.per_step)

    @property
    def epochs(self) -> int:
        """Epochs begun in the course of the run."""
        return -(-self.steps // self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        """The epoch that step `step` belongs to."""
        return step // self.steps_per_epoch

    def group(self, step: int) -> range:
        """Indices, within its epoch, of the batches of step `step`."""
        first = step % self.steps_per_epoch * self.per_step
        return range(first, min(first + self.per_step, self.batches))

    def rounds(self, step: int) -> int:
        """The most batches that a process has in step `step`."""
        return -(-len(self.group(step)) // self.processes)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with step `step`."""
        return (step + 1) % self.steps_per_epoch == 0
