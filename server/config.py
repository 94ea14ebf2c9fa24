"""What the operator of a server chooses, frozen. Knows no defaults of the command line: those are in settings.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version


def distribution_version() -> str:
    """The installed version of coldstream; "0+unknown" when it runs from a source tree that is not installed."""
    try:
        return version("coldstream")
    except PackageNotFoundError:
        return "0+unknown"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the operator chooses. No api_keys: everybody may ask. cors_origins: pages that may, "*" for all."""

    served_model_name: str
    api_keys: frozenset[str] = frozenset()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    ping_interval_s: float = 10.0
    version: str = field(default_factory=distribution_version)
