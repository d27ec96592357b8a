"""The settings of a server that is measured, each written once. Light to import."""

from __future__ import annotations

from pydantic import Field

from longrope.settings import Settings


class ServerOptions(Settings):
    """The requests to a server: its model and tokenizer, how many at once, how long, how often."""

    tokenizer: str | None = None
    """The tokenizer of the served model, by the folder or hub name of a model that has it. Needed."""
    served_model: str | None = None
    """The name of the model on the server. Default: the only one that it serves."""
    concurrency: int = Field(4, ge=1, le=1024)
    """Requests that are sent at once."""
    timeout: float = Field(600.0, gt=0, le=86_400)
    """Seconds until a request is given up."""
    retries: int = Field(3, ge=0, le=100)
    """The number of times that a request is sent again after a timeout, a lost connection or a busy server."""


def is_server(name: object) -> bool:
    """True for the address of a server, http://… or https://…, in the place of a model."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))
