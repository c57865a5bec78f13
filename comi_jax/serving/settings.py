"""What a server may be asked to do: its limits, each with the status that a request above it gets."""

import math
from dataclasses import dataclass, field

from comi_jax.checks import one_of
from comi_jax.config import Config
from comi_jax.errors import ConfigError

SINGLE_MESSAGE = ("refuse", "plain")
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # addresses that only this machine reaches


@dataclass(frozen=True)
class Settings:
    """The limits of a server. Sizes are in bytes, lengths in tokens, times in seconds."""

    name: str  # of the model, as requests give it
    rates: tuple[int, ...]  # that may be asked for, the first one by default; one set of programs is compiled for each
    slots: int = 8  # answers that are decoded at once
    slot_length: int = 1024  # positions of a slot: memory vectors, question and answer together
    queue: int = 64  # requests that may wait for a slot; more get 429
    deadline: float = 120.0  # of a request, waiting included; 408 behind it
    drain: float = 30.0  # how long accepted requests may go on after SIGTERM
    max_context: int = 32_768  # 400 above it, like the next two
    max_question: int = 128
    max_tokens: int = 512  # of an answer
    max_body: int = 16 * 2**20  # of a request; 413 above it, like the next two
    max_file: int = 8 * 2**20  # of an uploaded text
    store_bytes: int = 4 * 2**30  # of the device, for stored documents
    host_bytes: int = 4 * 2**30  # of host memory, for those that were not asked lately; 429 when both are full
    max_files: int = 1000  # of all keys together; 429 above it
    body_seconds: float = 30.0  # in which a request's body must have arrived; 408 behind it
    single_message: str = "refuse"  # a lone message without any context: "refuse", or "plain": answer it as it is
    auto: bool = False  # whether rate "auto" may be asked for: the model is calibrated for rates that are served
    cors: str = ""  # the origin whose pages in a browser may ask
    documents: str = ""  # a folder for uploaded files, which other servers may share; empty: they end with the process
    decoder: str = ""  # the URL of an endpoint that decodes answers from prompt embeddings; empty: this server does
    decoder_key: str = field(default="", repr=False)  # for that endpoint

    def __post_init__(self):
        one_of("single_message", self.single_message, SINGLE_MESSAGE)
        for name in ("slots", "slot_length", "max_context", "max_question", "max_tokens", "max_body", "max_file",
                     "store_bytes"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("deadline", "drain", "body_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a positive number of seconds")
        if not self.rates or any(rate < 1 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"rates is {self.rates}; give different whole numbers of at least 1")
        if self.max_file > self.max_body:
            raise ConfigError(
                f"max_file is {self.max_file}, more than the {self.max_body} of max_body, in which a file comes; raise "
                "max_body or lower max_file"
            )
        if self.max_tokens + 2 > self.slot_length:
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, which leaves no room for a question in slots of {self.slot_length} "
                "positions; lower max_tokens or raise slot_length"
            )

    @property
    def most_requests(self) -> int:
        """How many requests may be open at once."""
        return self.slots + self.queue


def trained_rates(config: Config) -> tuple[int, ...]:
    """The rates that a run was trained at, and 1, no compression."""
    return (*config.compression.rates, *(() if 1 in config.compression.rates else (1,)))
