"""uvicorn's WebSocket, with the bounds of the HTTP connection that it was."""

import logging
from typing import Any, Final, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

PATHS: Final = frozenset({b"/v1/responses"})
"""The paths at which a connection may become a WebSocket. At others the offer is ignored."""

DRAINING: Final = "forebay.draining"
"""The message that the application gets when the api stops: it ends what is under way, and closes."""


log = logging.getLogger("websockets.server")


class DrainedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn closes a WebSocket in the middle of an answer when it stops; here the application does, after it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logger = self.conn.logger = log

    async def send(self, message: Any) -> None:
        """See ASGI."""
        await super().send(message)
        if self.close_sent:
            self.handshake_complete = True  # by a refusal too, which uvicorn takes for no answer

    def shutdown(self) -> None:
        """See uvicorn's `Server.shutdown`, which waits for the connection to end."""
        if self.handshake_complete and not self.close_sent:
            self.queue.put_nowait(cast(Any, {"type": DRAINING}))
        else:
            super().shutdown()
