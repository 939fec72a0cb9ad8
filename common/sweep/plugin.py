"""Where Hydra finds the sweeper. It takes plugins from the namespace package `hydra_plugins` alone, which only an
installed distribution has on disk. So the name is given in memory, when a multirun asks for it, and taken away again
once Hydra has made its object: a launcher that pickles Hydra's state for a cluster would look for it in vain there.
"""

from __future__ import annotations

import sys
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

PACKAGE = "hydra_plugins"
MODULE = f"{PACKAGE}.fewshot"


def register(sweeper: type[Sweeper]) -> None:
    """Make it known as `hydra_plugins.fewshot.<class>`."""
    plugins = Plugins.instance()  # looks through the installed ones
    sweeper.__module__ = MODULE
    module = ModuleType(MODULE)
    setattr(module, sweeper.__name__, sweeper)
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    setattr(package, "fewshot", module)  # noqa: B010
    sys.modules[MODULE] = module
    plugins.register(sweeper)


def unregister(sweeper: type[Sweeper]) -> None:
    """Take the name away."""
    plugins = Plugins.instance()
    del plugins.class_name_to_class[f"{MODULE}.{sweeper.__name__}"]
    plugins.plugin_type_to_subclass_list[Sweeper].remove(sweeper)
    del sys.modules[MODULE]
