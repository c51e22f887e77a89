"""uvicorn's server and HTTP protocol, without what ``import uvicorn`` loads besides.

Its ``__init__`` brings a command line (click) and a process supervisor (multiprocessing): 2 MB that the agent and every
worker would keep. So the package is entered without running it, and given the two names that its own modules ask of it.
Its configuration brings readers of logging's configuration files, another MB; nothing of ours has such a file, so
placeholders stand in for them while it is read.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType

_entered = "uvicorn" not in sys.modules
if _entered:
    _spec = find_spec("uvicorn")
    if _spec is None:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
    sys.modules["uvicorn"] = module_from_spec(_spec)

_placeholders = {name: ModuleType(name) for name in ("configparser", "logging.config") if name not in sys.modules}
if "configparser" in _placeholders:
    vars(_placeholders["configparser"])["RawConfigParser"] = object
sys.modules.update(_placeholders)
try:
    from uvicorn.config import Config
finally:
    for _name in _placeholders:
        del sys.modules[_name]
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # noqa: E402
from uvicorn.server import Server  # noqa: E402

if _entered:
    vars(sys.modules["uvicorn"]).update(Config=Config, Server=Server)

__all__ = ["Config", "HttpToolsProtocol", "Server"]
