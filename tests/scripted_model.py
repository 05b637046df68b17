"""Another name of `mongodb_session_manager.demo`, for test modules that still import it."""

from __future__ import annotations

import sys

from mongodb_session_manager import demo

sys.modules[__name__] = demo
