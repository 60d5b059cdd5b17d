"""`python -m forebay_contracts.probe PORT PATH` for health checks: exit status 0 if this machine answers 200 there.

It uses no proxy, no redirects and no package, so an image needs no other HTTP client.
"""

import http.client
import sys
from typing import Final

TIMEOUT_S: Final = 5.0


def main(port: str, path: str) -> int:
    """Send the request and print the answer, which says what is wrong if it is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        print(answer.read(2000).decode(errors="replace"))
    except (OSError, http.client.HTTPException) as exc:
        print(f"no answer on port {port}: {exc}")
        return 1
    return 0 if answer.status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
