"""Tables of vectors for weights that come from a file."""

from torch import nn


class Embedding(nn.Embedding):
    """Without random first weights: drawing them on the meta device imports torch's compiler, for seconds."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are allocated."""
