"""Register the papers' sweeper with Hydra.

Hydra takes plugins only from the namespace package `hydra_plugins`, which only an installed distribution has on disk.
So a module of that name is created in memory when a multirun needs it, and removed once Hydra has instantiated the
sweeper: a launcher that pickles Hydra's state for a cluster would look for it there in vain.
"""

from __future__ import annotations

import sys
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

PACKAGE = "hydra_plugins"
MODULE = f"{PACKAGE}.fewshot"


def register(sweeper: type[Sweeper]) -> None:
    """Register a sweeper as `hydra_plugins.fewshot.<class>`."""
    plugins = Plugins.instance()  # scans the installed plugins
    sweeper.__module__ = MODULE
    module = ModuleType(MODULE)
    setattr(module, sweeper.__name__, sweeper)
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    setattr(package, "fewshot", module)  # noqa: B010
    sys.modules[MODULE] = module
    plugins.register(sweeper)


def unregister(sweeper: type[Sweeper]) -> None:
    """Remove the sweeper and its module."""
    plugins = Plugins.instance()
    del plugins.class_name_to_class[f"{MODULE}.{sweeper.__name__}"]
    plugins.plugin_type_to_subclass_list[Sweeper].remove(sweeper)
    del sys.modules[MODULE]
