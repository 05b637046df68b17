"""How a session is kept: writes, archive, attachments, expiry and deletion."""
