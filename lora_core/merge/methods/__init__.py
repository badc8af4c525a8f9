"""The registry of ways to merge. A new one is one class in a file and one entry here."""

from __future__ import annotations

from .base import ElementMethod, FactoredMethod, Method, Parameter
from .karcher import Karcher
from .linear import Normalised, Sum
from .sce import Sce
from .slerp import NuSlerp, Slerp
from .ties import Breadcrumbs, Dare, DareTies, Della, Prune, Ties

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        *(Sum, Normalised, Slerp, NuSlerp, Karcher),
        *(Ties, Dare, DareTies, Prune, Breadcrumbs, Della, Sce),
    )
}

__all__ = ["METHODS", "ElementMethod", "FactoredMethod", "Method", "Parameter"]
