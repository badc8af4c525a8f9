"""Stands in for torchvision or torchaudio where no build of it fits the installed torch.

ComfyUI imports both while it starts and uses them in few nodes. `hosts.py` copies this file as the
package's `__init__.py` into a folder of its own: any name can be imported and subclassed, calling
one says what is missing.
"""

import sys
import types

_SUBMODULES = (
    *("functional", "io", "models", "ops", "transforms", "transforms.functional"),
    *("transforms.v2", "transforms.v2.functional", "utils"),
)


class _Missing(type):
    """Placeholders are classes: they can be subclassed. Their attributes are more of them."""

    def __getattr__(cls, name):
        return _placeholder(f"{cls.__module__}.{cls.__name__}", name)

    def __call__(cls, *args, **kwargs):
        missing = cls.__mro__[-2]  # of a subclass: what it was made from
        package = missing.__module__.partition(".")[0]
        raise NotImplementedError(
            f"{missing.__module__}.{missing.__name__}: {package} is not installed for this torch"
        )


def _placeholder(module, name):
    if name.startswith("__"):
        raise AttributeError(f"{module!r} has no attribute {name!r}")
    return _Missing(name, (), {"__module__": module})


def __getattr__(name):
    return _placeholder(__name__, name)


for _name in _SUBMODULES:
    _module = types.ModuleType(f"{__name__}.{_name}")
    _module.__getattr__ = lambda name, module=_module.__name__: _placeholder(module, name)
    _module.__path__ = []
    sys.modules[_module.__name__] = _module
    _parent, _, _child = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
