"""Models behind a server that speaks OpenAI's protocol with vLLM's additions."""

from opcd.serving.client import Server, ServerError
from opcd.serving.model import ServedModel

__all__ = ["ServedModel", "Server", "ServerError"]
