"""What autograd keeps of a block: inputs of what is cheap to repeat, instead of its results.

Plain autograd keeps some 19 tensors of (tokens x width) of a single-stream block with an adapter: the modulated
input, queries and keys after norm and rotation, the MLP's activations. All of these follow by elementwise passes from
nine that must be kept anyway: the block's input, the projections of attention (3) and MLP (4), and the attention's
output. A double-stream block has one more, the stream between attention and MLP, at the price of one projection.

With `selective` the projections are made again too, and two tensors are left. The attention itself never runs twice:
its output and log-sum are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kontext.memory.policies import Policies, places
from kontext.memory.wrapped import Wrapped
from kontext.model.remade import notes
from kontext.model.transformer import Transformer

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class Recipe:
    """How to make a tensor again. The result stays while somebody holds the recipe: several may ask for it."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Any, ...], state: "Draws | None"
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.state = state
        self.result: Tensor | None = None

    def make(self, unpack: Unpack) -> Tensor:
        """`unpack` opens what was kept of the inputs."""
        if self.result is None:
            inputs = [unpack(part.content) if isinstance(part, Kept) else part for part in self.inputs]
            with torch.no_grad(), _redrawing(self.state):
                self.result = self.function(*inputs)
        return self.result


@dataclass(frozen=True)
class Kept:
    """A tensor among a recipe's inputs, as packed."""

    content: Any


@dataclass(frozen=True)
class View:
    """A tensor that shares the storage of what a recipe makes."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def open(self, unpack: Unpack) -> Tensor:
        return self.recipe.make(unpack).as_strided(self.shape, self.stride, self.offset)


@dataclass
class Note:
    """A result with what made it. Held while the block runs, so that no other tensor takes its memory's address."""

    result: Tensor
    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    state: "Draws | None"
    recipe: Recipe | None = None


class Notebook:
    """Notes of one run of a block, and the hooks by which autograd keeps recipes.

    What has no recipe goes to the hooks around, `outer`: those of checkpointing or of streaming.
    """

    def __init__(self, *, selective: bool, outer: tuple[Pack, Unpack]) -> None:
        self.selective = selective
        self.outer_pack, self.outer_unpack = outer
        self.pages: dict[int, Note] = {}

    def elementwise(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        return self.note(function(*inputs), function, inputs, None)

    def projection(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        before = Draws.now(inputs)
        result = function(*inputs)
        return self.note(result, function, inputs, None if before.unchanged() else before)

    def product(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        return self.projection(function, inputs) if self.selective else function(*inputs)

    def note(
        self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...], state: "Draws | None"
    ) -> Tensor:
        address = result.untyped_storage().data_ptr()
        tensors = (part for part in inputs if isinstance(part, Tensor))
        if all(
            part.untyped_storage().data_ptr() != address for part in tensors
        ):  # a view costs nothing to keep
            self.pages[address] = Note(result, function, inputs, state)
        return result

    def pack(self, tensor: Tensor) -> Any:
        page = self.pages.get(tensor.untyped_storage().data_ptr())
        if page is None or tensor.dtype != page.result.dtype:
            return self.outer_pack(tensor)
        if page.recipe is None:
            inputs = tuple(
                Kept(self.pack(part)) if isinstance(part, Tensor) else part for part in page.inputs
            )
            page.recipe = Recipe(page.function, inputs, page.state)
        return View(page.recipe, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Any) -> Tensor:
        return kept.open(self.unpack) if isinstance(kept, View) else self.outer_unpack(kept)


class Draws:
    """The state of torch's global generators: where random numbers were drawn, the same are drawn again."""

    def __init__(self, cpu: Tensor, cuda: Tensor | None, device: torch.device | None) -> None:
        self.cpu, self.cuda, self.device = cpu, cuda, device

    @classmethod
    def now(cls, inputs: tuple[Any, ...] = (), *, device: torch.device | None = None) -> "Draws":
        """The state of the CPU's generator, and of that of the GPU where the inputs lie."""
        device = next((i.device for i in inputs if isinstance(i, Tensor) and i.is_cuda), device)
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device else None, device)

    def unchanged(self) -> bool:
        now = Draws.now(device=self.device)
        return torch.equal(self.cpu, now.cpu) and (self.cuda is None or torch.equal(self.cuda, now.cuda))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def _redrawing(state: Draws | None) -> Iterator[None]:
    if state is None:
        yield
        return
    later = Draws.now(device=state.device)
    state.restore()
    try:
        yield
    finally:
        later.restore()


def _enclosing_hooks() -> tuple[Pack, Unpack]:
    """The hooks on saved tensors in force here: torch applies only the innermost, so they are called by hand."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks or (_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Remade(Wrapped):
    """A transformer block of which autograd keeps little; gradients are those of the plain block, to the bit."""

    def __init__(self, block: nn.Module, *, selective: bool = False) -> None:
        super().__init__(block)
        self.selective = selective

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor | tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self.block(*inputs, **named)
        notebook = Notebook(selective=self.selective, outer=_enclosing_hooks())
        token = notes.set(notebook)
        try:
            with saved_tensors_hooks(notebook.pack, notebook.unpack):
                return self.block(*inputs, **named)
        finally:
            notes.reset(token)
            notebook.pages.clear()


def remake_blocks(model: Transformer, policies: Policies = "none") -> None:
    """Wraps the blocks of `model` that run once. Attach adapters before; place (stream) and recompute after.

    One that is recomputed whole keeps all it makes for the moment until its backward pass: to make some of that a third
    time would cost a twentieth of a step, and save three tensors of (tokens x width).
    """
    for blocks, i, policy in places(model, policies):
        if policy in ("none", "selective"):
            blocks[i] = Remade(blocks[i], selective=policy == "selective")
