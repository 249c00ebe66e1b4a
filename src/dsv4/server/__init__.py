"""HTTP in front of a model: requests and events in DeepSeek's formats, never a tensor."""

from .app import create_app
from .backend import Backend, LocalBackend
from .run import listen, run

__all__ = ["Backend", "LocalBackend", "create_app", "listen", "run"]
