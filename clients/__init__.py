"""Clients of a coldstream server, over HTTP only. Know the wire format; nothing here imports PyTorch."""

from clients.client import APIError, AsyncClient, Client

__all__ = ["APIError", "AsyncClient", "Client"]
