"""Prometheus: what is told (collect.py, rules.py), how it is written (text.py), and to whom (server.py)."""

from mcr.metrics.server import Listen, serve

__all__ = ["Listen", "serve"]
