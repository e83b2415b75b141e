"""The settings of a training script, read without what it computes with.

torch, diffusers and the data libraries take seconds to import, and --help and the check of a flag
need none of them. While the script is imported here, classes without content stand in for all
that they define.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType

import yaml  # noqa: F401  before anything stands in for it


PACKAGE = "hf_diffusion"
# What the settings of scripts are made of; a class from another room stands for nothing in --help.
REAL = tuple(f"{PACKAGE}.{room}" for room in ("config", "losses", "data", "training", "files", "randomness"))


def config_class(module: str) -> type:
    """The class of the settings that the script passes to `run`: the last one that it defines.

    A class is looked up in the real module where torch is imported already.
    """
    if "torch" in sys.modules:
        return _own_settings(importlib.import_module(module))
    # Before the stand-ins, so that they stay the same classes afterwards.
    for room in ("command_line", "run_options", "shared_options", "options"):
        importlib.import_module(f"{PACKAGE}.config.{room}")
    try:
        with _stand_ins():
            return _own_settings(importlib.import_module(module))
    # A script that computes something while it is imported needs the real things.
    except Exception:
        return _own_settings(importlib.import_module(module))


def _own_settings(module: ModuleType) -> type:
    found = [cls for cls in vars(module).values() if getattr(cls, "__module__", "") == module.__name__]
    found = [cls for cls in found if isinstance(cls, type) and hasattr(cls, "method") and hasattr(cls, "given")]
    if not found:
        raise ValueError(f"{module.__name__} has no settings of a training; it must define a TrainingConfig")
    return found[-1]


class _Anything(type):
    """The class of a stand-in, whose attributes, items and instances are stand-ins, too."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __call__(cls, *arguments, **settings):
        # a decorator gives back what it decorates
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else stand_in(cls.__name__)

    def __getitem__(cls, item) -> type:
        return cls

    def __iter__(cls) -> Iterator:
        return iter(())

    def _operation(cls, *others) -> type:
        return cls

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = __neg__ = _operation


def stand_in(name: str) -> type:
    """A class that takes the place of anything: a base, a decorator, an annotation, a number."""
    return _Anything(name, (), {})


class _StandInModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module without content for what is neither Python's own nor about settings."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "yaml" or name == PACKAGE or name.startswith(REAL):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Anything("_", (), {}), name)
        return module

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let modules without content stand for the heavy ones, and leave none of them behind."""
    before, finder = dict(sys.modules), _StandInModules()
    # components that wait to be run at their first attribute
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.") and not name.startswith(REAL)]:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)
