"""What boards without a network asked for, until a bundle takes the answers to them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from garrison_controller.db.base import Base


class CarriedRequest(Base):
    """The newest request that came home from one board."""

    __tablename__ = "carried_request"

    device_id: Mapped[str] = mapped_column(ForeignKey("device.id"), primary_key=True)
    identity_public: Mapped[str] = mapped_column(String(64))
    """The board's key at that time: what an earlier identity asked for is not answered."""
    nonce: Mapped[str] = mapped_column(String(32))
    """Of the anchor that the board waits for."""
    renewal: Mapped[int] = mapped_column(BigInteger, default=0)
    """The number of the newest renewal that was granted to this identity; lower ones are refused."""
    csr_sha256: Mapped[str] = mapped_column(String(64), default="")
    certificate_pem: Mapped[str] = mapped_column(Text, default="")
    """What was granted for that CSR; a bundle carries it until the board asks for another."""
    received_at: Mapped[datetime]
