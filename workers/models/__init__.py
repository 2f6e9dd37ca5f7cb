"""Model families, one small file each: a spec of blocks and the names of its weights. Importing this knows them all."""

from cableway.workers.models import llama, qwen3
from cableway.workers.models.registry import Architecture, architectures, find

__all__ = ["Architecture", "architectures", "find", "llama", "qwen3"]
