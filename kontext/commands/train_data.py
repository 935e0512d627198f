"""What `kontext train` learns from and is measured by: cached items."""

from kontext.data.batches import Batches, open_batches
from kontext.data.items import Skips
from kontext.data.plan import Part
from kontext.errors import UserError
from kontext.options.train import Train
from kontext.training.names import Names
from kontext.training.validation import Every, Held


def batches(options: Train, seed: int, part: Part = "training") -> Batches:
    """The cached items to train on, or those to validate with. Raises UserError when caches are not ready."""
    skips = Skips(strict=options.strict)
    names = ("vae", "text_encoder1", "text_encoder2", "tokenizer1", "tokenizer2")
    encoders = {name: getattr(options, name) for name in names}
    found = open_batches(options.dataset_config, seed=seed, skips=skips, encoders=encoders, part=part)
    skips.show()
    return found


def held(options: Train, names: Names) -> Held | None:
    """What to validate with, if there is anything. Raises UserError when it is asked for and there is nothing."""
    every = Every(options.validate_every_n_steps, options.validate_every_n_epochs)
    found = batches(options, 0, "validation")
    if found.groups:
        return Held(found, every, names.best())
    if every != Every():
        raise UserError(
            f"{options.dataset_config}: --validate-every-n-{'steps' if every.steps else 'epochs'} needs a [[validation]] "
            "block, with the keys of a [[datasets]] block."
        )
    return None
