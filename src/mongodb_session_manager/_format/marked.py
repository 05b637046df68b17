"""The marker of encoded values, and the options and limits with which values are BSON. Pure."""

from __future__ import annotations

from datetime import UTC
from typing import Any, Final

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidBSON

MARKER: Final = "__msm__"
LEGACY_MARKER: Final = "__bytes_encoded__"
"""The key of Strands' own form of bytes."""

CODEC_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    # With STANDARD, one stored UUID of a length other than 16 bytes makes the whole reply unreadable.
    uuid_representation=UuidRepresentation.UNSPECIFIED,
    # Other programs might have stored strings that are not UTF-8.
    unicode_decode_error_handler="replace",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,  # a date beyond the year 9999 is a `DatetimeMS`
)

MAX_LEVELS: Final = 100
"""The documented maximum number of levels of a stored document, with its root; the server accepts about 180."""

MAX_NESTING: Final = 256
"""The maximum number of levels of dicts and lists of one value, packed or not.

Python's stack allows 1000 frames by default and the codec takes two for a level, so an encoded value can also be
decoded at a greater depth of the stack.
"""


def marked(tag: str, value: Any) -> dict[str, Any]:
    return {MARKER: tag, "v": value}


def dump(value: Any) -> bytes:
    return bson.encode({"v": value}, codec_options=CODEC_OPTIONS)


def load(data: bytes) -> Any:
    """Return the value that was passed to `dump`.

    Raises:
        BSONError: The bytes are malformed.
        RecursionError: The value is nested deeper than Python's stack allows here.
    """
    try:
        return bson.decode(data, CODEC_OPTIONS)["v"]
    except InvalidBSON as error:
        # PyMongo reports stack exhaustion like malformed data; the words are CPython's, up to 3.13 and from 3.14.
        if str(error).startswith(("maximum recursion depth", "Stack overflow")):
            raise RecursionError(str(error)) from error
        raise
