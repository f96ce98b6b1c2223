"""The health check of the server's image: exit status 0 if the server answers on this machine, by HTTP or by HTTPS."""

import http.client
import os
import ssl
import sys

port = int(os.environ.get("LOWSSL_SERVER_PORT", "8080"))
# On this machine alone, and nothing is sent: whose certificate it is does not matter.
context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
for connection in (
    http.client.HTTPConnection("127.0.0.1", port, timeout=2),
    http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=context),
):
    try:
        connection.request("GET", "/healthz")
        sys.exit(connection.getresponse().status != 200)
    except (OSError, http.client.HTTPException):
        connection.close()
sys.exit(1)
