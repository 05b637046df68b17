"""Run a server in the foreground."""

from __future__ import annotations

from ._server import main

raise SystemExit(main())
