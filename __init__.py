"""fledge trains EAGLE-3 draft heads: synthesize, dump, train, evaluate, export.

The names of `__all__` are for use from Python (docs/reference/python.md); each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conf.cli.python_api import load_config as load_config
    from .conf.cli.python_api import run as run
    from .data_synthesis.store.store import HiddenStateStore as HiddenStateStore
    from .eval.evaluate import evaluate as evaluate
    from .models.formats.plain import load_head as load_head
    from .train.metrics.tracking import read_metrics as read_metrics

__version__ = "0.1.0"

_MODULES = {
    "load_config": "conf.cli.python_api",
    "run": "conf.cli.python_api",
    "HiddenStateStore": "data_synthesis.store.store",
    "load_head": "models.formats.plain",
    "evaluate": "eval.evaluate",
    "read_metrics": "train.metrics.tracking",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
