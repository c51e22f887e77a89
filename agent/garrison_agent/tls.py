"""TLS to the fleet's own servers: pinned CA, and certificates judged at a time that a wrong clock cannot move back.

OpenSSL judges certificates by the system's clock, which on a board may say 1970. So it is told to leave time alone
(X509_V_FLAG_NO_CHECK_TIME), and the end of the handshake judges instead: neither the server's own certificate nor the
pinned CA that issued it may have ended by ``judge_at()``. When they began is not asked: the later of clock and floor is
a time that has come, never one that is yet to come, and a board's floor may be older than its fleet. Everything else
(chain, names, key usage) stays OpenSSL's.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name."""

JudgeAt = Callable[[], datetime]
"""Returns the time (aware UTC) to judge by: the later of the board's clock and its floor."""


class JudgedSocket(ssl.SSLSocket):
    """A client's TLS socket whose handshake fails where the server's certificate has ended by the judged time."""

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, then judge. After a failure the socket is closed: paho would leave that to the collector.

        Raises:
            ssl.SSLCertVerificationError: The certificate has ended.
            OSError: The handshake failed.
        """
        context = self.context
        assert isinstance(context, PinnedContext)
        try:
            super().do_handshake(block)
            context.judge(self.getpeercert() or {})
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise  # no failure: a socket without a time-out goes on later
        except BaseException:
            self.close()
            raise


class PinnedContext(ssl.SSLContext):
    """Client settings that trust the CAs of one file and no other, at least TLS 1.2, judged at ``judge_at``."""

    sslsocket_class = JudgedSocket
    judge_at: JudgeAt

    def judge(self, leaf: dict[str, Any]) -> None:
        """Return if neither ``leaf`` (as of ``getpeercert``) nor every pinned CA of its issuer's name has ended.

        Raises:
            ssl.SSLCertVerificationError: One has.
        """
        if not leaf:
            raise ssl.SSLCertVerificationError("the server showed no certificate")
        _check_end(_end(leaf), self.judge_at(), "the server's certificate")
        pinned = self.get_ca_certs()
        issuers = [ca for ca in pinned if ca.get("subject") == leaf.get("issuer")] or pinned
        _check_end(max(map(_end, issuers)), self.judge_at(), "the pinned server CA")


def pinned_context(server_ca: Path, judge_at: JudgeAt) -> PinnedContext:
    """Return TLS settings that trust the CA in ``server_ca`` and no other.

    Raises:
        OSError: The file cannot be read or holds no certificate.
    """
    context = PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    context.judge_at = judge_at
    context.load_verify_locations(cafile=str(server_ca))
    return context


def unpinned_context() -> ssl.SSLContext:
    """Return TLS settings that check nothing, for requests whose answer is checked by its digest instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _end(certificate: dict[str, Any]) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)


def _check_end(end: datetime, at: datetime, what: str) -> None:
    if at > end:
        raise ssl.SSLCertVerificationError(
            f"{what} expired on {end:%Y-%m-%d %H:%M} UTC, and by this board it is {at:%Y-%m-%d %H:%M}"
        )
