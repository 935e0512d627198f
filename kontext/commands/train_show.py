"""`kontext train --show-timesteps`: the noise levels that training would see, and nothing else."""

from collections import Counter

from kontext import console
from kontext.commands.train_values import timesteps
from kontext.data.batches import Batches
from kontext.files import atomic_write
from kontext.options.train import Train
from kontext.training.names import Names
from kontext.training.spread import picture, rows, spread

TOKEN = 16  # pixels along an edge
RANGES = {"console": 20, "image": 50}


def show_timesteps(options: Train, batches: Batches, names: Names) -> None:
    """A table on stdout, or a picture beside the other files of the run."""
    assert options.show_timesteps is not None
    items: Counter[int] = Counter()
    for group in batches.groups:
        for entry in group.entries:
            items[(entry.target[0] // TOKEN) * (entry.target[1] // TOKEN)] += group.repeats
    found = spread(timesteps(options), items, RANGES[options.show_timesteps])
    if options.show_timesteps == "console":
        console.table("Noise levels", ("timestep", "", "share", "weight"), rows(found), asked=True)
        return
    path = names.final("-timesteps.png")
    with atomic_write(path) as temporary:
        picture(found).save(temporary, "PNG")
    console.say(f"Noise levels: {path}")
