"""Stored values as JSON. A session can hold values that JSON cannot represent, and a response must not fail on them.

bytes               base64 text, in the standard alphabet, as in `data:` URLs
date, time          text, ISO 8601
timedelta           seconds
NaN, infinity       null
int beyond 64 bits  text
tuple, set          a list
any other value     `str(value)`, for example of a `Decimal`
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from typing import Any

import anyio.to_thread
from fastapi.responses import Response


async def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with stored values; they are encoded in a thread, because attachments can be large."""
    body = await anyio.to_thread.run_sync(_encoded, content)
    return Response(body, status, headers, media_type="application/json")


def _encoded(content: Any) -> bytes:
    # json.dumps escapes non-ASCII characters, so that a lone surrogate, which a model can send, is valid JSON.
    return json.dumps(_plain(content), allow_nan=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if -(2**63) <= value < 2**63 else _text_of(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key if isinstance(key, str) else str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case bytes() | bytearray():
            return base64.b64encode(value).decode()
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case _:
            return str(value)


def _text_of(number: int) -> str:
    # Python can refuse to write more than 640 decimal digits (`sys.set_int_max_str_digits`).
    return str(number) if number.bit_length() <= 1024 else hex(number)
