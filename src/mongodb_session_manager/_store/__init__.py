"""The storage of a session: opening, writes, archive, attachments, expiry and deletion."""
