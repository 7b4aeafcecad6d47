"""Models behind a server that speaks OpenAI's protocol with vLLM's additions."""

from opcd.serving.client import Server, ServerError
from opcd.serving.served_model import START, Card, ServedModel, find

__all__ = ["START", "Card", "ServedModel", "Server", "ServerError", "find"]
