"""`LeaseGuard`: the condition of a statement on the lease of its manager."""

from __future__ import annotations

from datetime import datetime

from .._format.documents import Document
from .._format.statements import Update
from .._io.drivers import AsyncCollection, find_and_modify
from ..errors import SessionBusyError, SessionConflictError
from .lease import Lease, Mode


async def matched_with_lease(collection: AsyncCollection, update: Update) -> Document | None:
    """Send a statement that takes the lease; return the new `lease`, or `None` if the statement matched nothing."""
    return await find_and_modify(collection, update.filter, update.update, {"lease": 1})


class LeaseGuard:
    """Makes the statements of a flush match only during the turn of their manager.

    Args:
        lease: The lease.
        releases: Whether the last statement releases the lease.
    """

    def __init__(self, lease: Lease, releases: bool) -> None:
        self._lease = lease
        self._releases = releases
        self._mode: Mode = "passes"

    def unreleased(self) -> LeaseGuard:
        """Return the guard of a statement that is not the last one of the flush."""
        return LeaseGuard(self._lease, releases=False)

    @property
    def takes(self) -> bool:
        """Whether the last statement takes the lease: its result must contain the field `lease`."""
        return self._mode == "takes"

    def added_to(self, update: Update, moment: datetime) -> Update:
        """Return a statement that matches only if it is this manager's turn."""
        self._mode, claim = self._lease.mode(), self._lease.claim
        releases = self._mode == "holds" and self._releases
        self._lease.releasing(releases)
        if self._mode == "takes":
            return claim.taking(update, moment)
        if self._mode == "passes":
            return claim.passing(update, moment)
        return claim.releasing(update) if releases else claim.holding(update, moment)

    def confirm(self, document: Document | None) -> None:
        """Record that the last statement was stored; `document` is its result if it has taken the lease."""
        if self._mode == "takes" and document is not None:
            self._lease.taken(document)
        elif self._mode == "holds":
            self._lease.releasing(False)
            self._lease.confirm(self._releases)

    def check_lost(self, document: Document) -> SessionConflictError | None:
        """Return the error for the last statement if it matched nothing because the lease is lost."""
        self._lease.releasing(False)
        return self._lease.check_lost(document) if self._mode == "holds" else None

    async def wait(self, document: Document) -> SessionBusyError | None:
        """Wait for the lease if the last statement matched nothing because it is another manager's turn.

        Returns:
            The error for its writes if the session stays busy.
        """
        if self._mode == "holds" or not self._lease.is_busy(document, in_line=self.takes):
            return None
        return await self._lease.wait_to_write()
