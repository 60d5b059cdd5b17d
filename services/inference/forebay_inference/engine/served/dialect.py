"""What the served engine needs to know of a kind of inference server."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import Capabilities, Step, Tokenizer, TokenLogprob, TokenRequest
from forebay_inference.engine.served.http import Http

PROBE: Final = "The quick brown fox: 3,14 né 漢字 🙂\n\n  def f(x):\n\treturn x"
"""A text that tokenizers of different models cut differently."""


MESSAGE_LENGTH: Final = 2000
"""Characters of a server's message that a client gets."""


class NotReady(Exception):
    """The server is not there yet, or still loads; the message says which, in a few words."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says that it serves.

    `context_length` in tokens is that of one sequence. `end_tokens` are those at which the server itself ends a
    sequence, empty where it does not tell them. `capabilities` replace those of the dialect, where this server has
    fewer. It computes `slots` sequences at once, None where it does not tell. `adapters` are the fields of a request to
    the server by which it answers with an adapter, for each by its name, and for none.
    """

    version: str
    vocabulary_size: int
    context_length: int
    quantization: str
    end_tokens: frozenset[int] = frozenset()
    capabilities: Capabilities | None = None
    slots: int | None = None
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})


class Load(NamedTuple):
    """What a server has done since it started (`steps`, a number that grows with its forward passes), and the part
    (0 to 1) of its KV cache in use, None where it does not tell."""

    steps: int
    cache_usage: float | None = None


class ServerDialect(Protocol):
    """How one kind of server is started, identified and watched.

    `name` is the server's, for messages. `package` is the Python package that its `command` runs. `weights` is what the
    server loads: one GGUF file, or a checkpoint's folder.
    """

    name: str
    package: str
    weights: Literal["gguf", "checkpoint"]

    def command(self, settings: InferenceSettings) -> Sequence[str]:
        """The command that starts it, if ENGINE_COMMAND is not set. See `process.filled` for what is filled in."""

    async def identify(self, http: Http, tokenizer: Tokenizer) -> Served:
        """Ask the server what it serves.

        Raises:
            NotReady: it does not answer yet.
            ConfigurationError: it is of a version that is not known to work, or serves another model.
        """

    async def load(self, http: Http) -> Load:
        """How much the server has done; raises ServerFailed where it does not answer."""


class Dialect(ServerDialect, Protocol):
    """How a server that generates is asked. It keeps no state of a request between calls."""

    capabilities: Capabilities

    def generate(self, http: Http, request: TokenRequest, served: Served) -> AsyncGenerator[Step, None]:
        """The steps of a sequence; see `Engine.generate`. An end token need not end it: the engine cuts there.

        The last step comes once the answer of the server is read to its end, so that its connection is kept.

        Raises:
            ServerFailed: the server failed, or answered with something else.
            InvalidRequest: the server cannot do what `request` asks for.
        """


@runtime_checkable
class ScoringDialect(Protocol):
    """A dialect with the capability `prompt_logprobs`."""

    def score(
        self, http: Http, id: str, prompt: Sequence[int], top: int, adapter: str, served: Served
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """See `Scorer.score`."""


class AdapterDialect(Protocol):
    """A dialect with the capability `adapters`."""

    def adapter_arguments(self, settings: InferenceSettings, adapters: Mapping[str, Path]) -> Sequence[str]:
        """What the command that starts the server needs to load `adapters`.

        Raises:
            ConfigurationError: one cannot be loaded.
        """

    async def adapters(
        self, http: Http, adapters: Mapping[str, Path], *, started: bool
    ) -> Mapping[str, Mapping[str, Any]]:
        """See `Served.adapters`. With `started`, the server got `adapter_arguments`.

        Raises:
            ConfigurationError: the server has not loaded one of `adapters`.
        """
