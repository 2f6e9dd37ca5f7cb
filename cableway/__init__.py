"""Cableway: an inference engine of separate processes. `LLM` and `SamplingParams` are imported when first used."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from cableway.frontend.llm import LLM, SamplingParams


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from cableway.frontend import llm

        return getattr(llm, name)
    raise AttributeError(name)
