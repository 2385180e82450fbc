"""Versions of what a result depends on, for cards."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    """Return the versions of autosparse, torch and timm, where installed."""
    found = {}
    for name in ("autosparse", "torch", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
