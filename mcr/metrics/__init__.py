"""Prometheus: what is told (collect.py, and rules.py by text.py's templates), and to whom (server.py)."""

from mcr.metrics.server import Listen, serve

__all__ = ["Listen", "serve"]
