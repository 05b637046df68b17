r"""The codec: encodes Python values for MongoDB and decodes them to equal values of the same types.

Every value of an application or a model passes `encode` before it is stored and `decode` after it is read. Values that
BSON preserves are stored unchanged, so that a conversation is readable in the database. Others are stored as
`{"__msm__": <tag>, "v": <value>}`:

    tag                          v
    "int"                        text: an integer beyond 64 bits, hexadecimal beyond 1024
    "str"                        text: lone surrogates as `\udxxx`, a backslash as two
    "decimal"                    text: a `decimal.Decimal`
    "datetime", "date", "time"   text, ISO 8601: what a BSON date (UTC, whole milliseconds) does not hold
    "timedelta"                  text: a `timedelta` in microseconds
    "bytearray"                  the bytes of a `bytearray`
    "binary"                     subtype and data of a `Binary` that BSON decoding would turn into another type
    "tuple", "set", "frozenset"  list of the members
    "dict"                       list of [key, value] pairs: a dict that BSON does not preserve
    "attachment"                 text: replaced by bytes before decoding, see `attachment_refs`
    "bson"                       BSON of `{"v": <value>}`: a value that is nested deeper than MongoDB allows

Instances of subclasses (an `Enum` of strings, `OrderedDict`, a named tuple) are decoded as their base type, NumPy
scalars as the equal number or date, a `memoryview` as bytes.
"""

from __future__ import annotations

from typing import Any, Final

from ..errors import EncodingError, raise_alone
from .decoder import TooDeepError, decoded
from .encoder import RefusedError, encoded, subscript
from .marked import CODEC_OPTIONS, MARKER, MAX_LEVELS, MAX_NESTING

__all__ = ["CODEC_OPTIONS", "MARKER", "MAX_LEVELS", "MAX_NESTING", "decode", "decode_own", "encode", "subscript"]

_MAX_PACKED: Final = 16
"""The maximum number of packed forms within each other that `encode` writes, rounded up."""


def encode(value: Any, *, depth: int = 0, name: str = "value", nesting: int = MAX_NESTING) -> Any:
    """Return a copy of a value in a form that MongoDB stores.

    Args:
        value: The value; later changes of it do not affect the copy.
        depth: Levels from the document's root to the value; 1 for the value of a top-level field.
        name: The name of the value in errors, like `message`.
        nesting: The maximum number of levels of the value.

    Raises:
        EncodingError: The value holds an unsupported type, is nested deeper than `nesting` or Python's stack, or
            raises an error when it is read.
    """
    try:
        return encoded(value, MAX_LEVELS - depth, nesting)
    except RefusedError as refused:
        raise_alone(EncodingError(f"cannot store {refused.reason}, at {name}{refused.path_to()}{refused.advice}"))
    except RecursionError:
        raise_alone(EncodingError("cannot store a value nested deeper than Python's stack allows here"))
    except Exception as error:  # a metaclass, or a dict that another thread changes
        raise_alone(EncodingError(f"cannot store a value that cannot be read: {type(error).__name__}"))


def decode(stored: Any) -> Any:
    """Return the value that was passed to `encode`; nothing mutable is shared with `stored`.

    Strands' own form of bytes, `{"__bytes_encoded__": True, "data": <base64>}`, becomes bytes. A marked form that
    `encode` does not write belongs to another program and is returned as the dict it is.

    Args:
        stored: A value that was read with `CODEC_OPTIONS`.

    Raises:
        EncodingError: The value is nested deeper than Python's stack allows here.
    """
    # A value of metadata can have grown, through dotted keys, to all levels of a document above those of `encode`.
    return _decode(stored, MAX_NESTING + MAX_LEVELS, strict=False)


def decode_own(stored: Any) -> Any:
    """Return a decoded value, like `decode`; refuse values that `encode` does not write.

    Raises:
        EncodingError: The value holds a marker that is not part of a marked form that `encode` writes, or it is nested
            deeper than `MAX_NESTING`.
    """
    return _decode(stored, MAX_NESTING + _MAX_PACKED, strict=True)


def _decode(stored: Any, nesting: int, *, strict: bool) -> Any:
    try:
        return decoded(stored, nesting, strict)
    except (RecursionError, TooDeepError):
        raise_alone(EncodingError("cannot read a value nested deeper than Python's stack allows here"))
