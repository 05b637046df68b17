"""Run a server in the foreground."""

from __future__ import annotations

from ._command_line import main

raise SystemExit(main())
