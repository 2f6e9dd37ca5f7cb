"""Model families, one small file each: a spec of blocks and the names of its weights. Importing this knows them all."""

import importlib
import pkgutil

from cableway.workers.models import registry
from cableway.workers.models.registry import Architecture, architectures, find

__all__ = ["Architecture", "architectures", "find", "registry"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
