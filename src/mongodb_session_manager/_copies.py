from ._archive import SessionArchive


class Copy: ...


class SessionCopies(SessionArchive): ...
