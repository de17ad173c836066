"""The chat page, a file without scripts or styles from elsewhere."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_FILE = Path(__file__).with_name("page.html")


async def show(request: Request) -> Response:
    """Returns the page."""
    body, policy = _page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(body, headers=headers, media_type="text/html; charset=utf-8")


@functools.cache
def _page() -> tuple[bytes, str]:
    """Returns the page, and the policy that lets browsers run only its own script and style."""
    body = _FILE.read_bytes()

    def hashes(tag: bytes) -> str:
        found = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(one).digest()).decode() for one in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return body, policy
