"""Modules that stand in sys.modules at once and run when something is asked of them."""

import importlib.util
import sys
import threading
from types import ModuleType


# One for all modules, since they import each other; reentrant, since a module may ask for its own
# attributes.
_RUNNING = threading.RLock()


class LazyModule(ModuleType):
    """A module that runs at the first attribute that is not there before it runs.

    `__file__`, `__spec__` and the like are there before. importlib.util.LazyLoader runs a module
    for these as well, and `import torch` asks every module for its `__file__` (by
    inspect.getmodule): a module that imports torch itself would run in the midst of it, and both
    would fail.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _RUNNING:
            spec = self.__spec__
            if spec.loader_state is None:
                spec.loader_state = "running"
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    # The next attribute tries again, and tells the same reason.
                    spec.loader_state = None
                    raise
                self.__class__ = ModuleType
        try:
            return vars(self)[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def put_into_sys_modules(name: str) -> None:
    """Let a module stand in sys.modules and in its package without running it.

    One that is there already stays.
    """
    if name in sys.modules:
        return
    parent, _, stem = name.rpartition(".")
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = LazyModule
    sys.modules[name] = module
    setattr(sys.modules[parent], stem, module)
