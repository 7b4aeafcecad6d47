"""Models behind a server with OpenAI's protocol and vLLM's additions."""

from opcd.serving.client import Server, ServerError
from opcd.serving.served_model import START, Card, ServedModel, find

__all__ = ["START", "Card", "ServedModel", "Server", "ServerError", "find"]
