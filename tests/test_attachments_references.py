"""What of a message is kept outside of its document and how large it may be. No server."""

from __future__ import annotations

import hashlib
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strands.types.session import SessionMessage

from mongodb_session_manager import MessageTooLargeError
from mongodb_session_manager._format.attachment_refs import (
    MAX_MESSAGE_BYTES,
    Reference,
    attached,
    detached,
    references_of,
    set_aside,
)
from mongodb_session_manager._format.codec import CODEC_OPTIONS
from mongodb_session_manager._format.documents import message_from, stored_message

TOKEN = "0123456789abcdef01234567"
IMAGE = b"\x89PNG" * 100
LOOKALIKES: list[Any] = [
    {"__msm__": "attachment", "v": str(Reference(hashlib.sha256(IMAGE).hexdigest(), len(IMAGE), TOKEN))},
    {"__msm__": "attachment", "v": "text"},
    {"__msm__": "attachment"},
    {"attachments": [str(Reference(hashlib.sha256(IMAGE).hexdigest(), len(IMAGE), TOKEN))]},
    {"__bytes_encoded__": True, "data": "AAAA"},
    {"__msm__": "bson", "v": b"x" * 200},
    str(Reference(hashlib.sha256(IMAGE).hexdigest(), len(IMAGE), TOKEN)),
]


def message(*content: Any) -> Any:
    return {"role": "user", "content": list(content), "tracking_id": "t"}


def fields_of(content: Any, redacted: Any = None) -> dict[str, Any]:
    return dict(stored_message(SessionMessage(content, 0, redacted), 0))


def through_storage(fields: dict[str, Any]) -> dict[str, Any]:
    """Store a message as `_attachments` does, in BSON and a dict in the place of the server and GridFS."""
    blobs: dict[str, bytes] = {}
    if "attachments" in fields:
        references = {}
        for token, data in fields["attachments"]:
            reference = str(Reference(hashlib.sha256(data).hexdigest(), len(data), token))
            references[id(data)], blobs[reference] = reference, data
        fields = detached(fields, references)
    stored = bson.decode(bson.encode(fields, codec_options=CODEC_OPTIONS), CODEC_OPTIONS)
    assert {str(reference) for reference in references_of(stored)} == blobs.keys()
    return attached(stored, blobs)


blobs = st.sampled_from([IMAGE, b"", b"small", b"x" * 128, b"y" * 129, b"z" * 5000])
leaves = st.none() | st.integers() | st.text(max_size=5) | blobs | st.sampled_from(LOOKALIKES)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["__msm__", "v", "$ref"]), inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(blobs, inner, max_size=3)
    ),
    max_leaves=15,
)


@given(content=st.lists(values, max_size=4), redacted=st.none() | values, bound=st.sampled_from([0, 200, 5000]))
def test_what_is_kept_outside_comes_back_equal(content: list[Any], redacted: Any, bound: int) -> None:
    said = message(*({"json": value} for value in content))
    redacted = None if redacted is None else message({"json": redacted})
    stored = through_storage(set_aside(fields_of(said, redacted), bound)[0])
    restored = message_from(stored, 0)
    assert restored.message == said or redacted is not None
    assert restored.redact_message == redacted
    assert repr(restored.to_message()) == repr(redacted if redacted is not None else said)


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_what_looks_like_a_reference_is_data(lookalike: Any) -> None:
    said = message({"image": {"source": {"bytes": IMAGE}}}, {"text": "see"}, {"json": lookalike})
    stored = through_storage(set_aside(fields_of(said), 0)[0])
    assert "attachments" in stored
    assert message_from(stored, 0).message == said


def test_deep_within_a_message() -> None:
    nested: Any = IMAGE
    for _ in range(150):  # deeper than a document may be
        nested = [nested]
    said = message({"toolResult": {"toolUseId": "t", "content": [{"json": nested}]}})
    stored = through_storage(set_aside(fields_of(said), 0)[0])
    assert len(stored["attachments"]) == 1
    assert message_from(stored, 0).message == said


def test_up_to_the_bound_nothing_is_kept_outside() -> None:
    said = message({"image": {"source": {"bytes": b"a" * 600}}}, {"image": {"source": {"bytes": b"b" * 400}}})
    fields = fields_of(said)
    assert set_aside(fields, 1000)[0] is fields
    assert [len(data) for _, data in set_aside(fields, 999)[0]["attachments"]] == [400, 600]


def text_of(size: int) -> dict[str, Any]:
    """A stored message whose BSON takes `size` bytes."""
    fields = fields_of(message({"text": ""}))
    missing = size - len(bson.encode(fields, codec_options=CODEC_OPTIONS))
    fields["message"]["content"][0]["text"] = "a" * missing
    return fields


def test_the_largest_message() -> None:
    fields = text_of(MAX_MESSAGE_BYTES)
    assert set_aside(fields, 0)[0] is fields


def test_one_byte_more() -> None:
    with pytest.raises(MessageTooLargeError, match=r"15728641 bytes, .* maximum of 15728640 bytes"):
        set_aside(text_of(MAX_MESSAGE_BYTES + 1), 0)[0]


def test_attachments_do_not_count() -> None:
    fields = fields_of(message({"document": {"source": {"bytes": b"a" * (MAX_MESSAGE_BYTES + 1)}}}))
    assert "attachments" in set_aside(fields, MAX_MESSAGE_BYTES)[0]


def test_text_counts_beside_attachments() -> None:
    fields = text_of(MAX_MESSAGE_BYTES - 10)
    fields["message"]["content"].append({"image": {"source": {"bytes": IMAGE}}})
    with pytest.raises(MessageTooLargeError):
        set_aside(fields, 0)[0]


def test_references_are_text() -> None:
    reference = Reference("ab" * 32, 7, TOKEN)
    assert str(reference) == "ab" * 32 + f":7:{TOKEN}"
    assert Reference.parse(str(reference)) == reference
    assert not reference.is_of_v1
    assert [
        Reference.parse(text)
        for text in ("", "ab:7:3", "AB" * 32 + ":7:3", str(reference) + "0", f"{reference}"[:-1], 7, None)
    ] == [None] * 7


def test_references_of_an_earlier_version_have_a_number() -> None:
    reference = Reference.parse("ab" * 32 + ":7:3")
    assert reference == Reference("ab" * 32, 7, "3")
    assert reference.is_of_v1
    assert not Reference("ab" * 32, 7, "0" * 24).is_of_v1


def test_each_recorded_message_has_attachments_of_its_own() -> None:
    said = message({"image": {"source": {"bytes": IMAGE}}})
    tokens = [set_aside(fields_of(said), 0)[0]["attachments"][0].token for _ in range(2)]
    assert len(set(tokens)) == 2
