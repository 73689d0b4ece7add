"""CoDA-GQA-L: differential attention with a bounded memory. Importing it registers the converted models with transformers."""

from . import functional
from ._library import cmake_prefix_path, version as __version__
from .cache import CodaCache
from .calibrate import calibrate
from .config import CodaConfig
from .convert import convert, reconfigure, set_mode
from .nn import CodaGqaL
from .state import State
from .state_io import load_adapters, load_state, save_state

__all__ = ["CodaCache", "CodaConfig", "CodaGqaL", "State", "__version__", "calibrate", "cmake_prefix_path", "convert",
           "functional", "load_adapters", "load_state", "reconfigure", "save_state", "set_mode"]
