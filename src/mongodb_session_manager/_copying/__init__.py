"""Export, import, fork and write-back of sessions."""
