"""kontext: fine-tune FLUX.1 Kontext and edit pictures with it.

For programs: `from kontext import Kontext`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kontext.generation.pipeline import Kontext

__all__ = ["Kontext"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads `Kontext` when it is first asked for: `import kontext` alone stays light."""
    if name == "Kontext":
        from kontext.generation.pipeline import Kontext

        return Kontext
    raise AttributeError(f"module 'kontext' has no attribute {name!r}")
