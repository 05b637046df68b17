"""Hooks that tell the world of a session's metadata and feedback, and how any hook does so without being waited for.

`sns`, `sqs` and `websocket` need the extra `aws`; importing one without it raises `MissingExtraError`. Everything here
is for users at the root of the package.
"""
