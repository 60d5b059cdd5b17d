"""The inference server of a worker: started or found, waited for, watched, and known to be dead."""

import asyncio
import logging
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import EngineFault, EngineStatus, Tokenizer
from forebay_inference.engine.served.dialect import Load, NotReady, Served, ServerDialect
from forebay_inference.engine.served.http import Http, ServerFailed, ServerGone
from forebay_inference.engine.served.process import ServerProcess, filled, free_port, require
from forebay_inference.engine.served.silence import until_silent
from forebay_inference.engine.served.tokenizer import bare_tokenizer
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.models.store import ensure_gguf, ensure_model, precision_of

log = logging.getLogger(__name__)

_KEY_VARIABLES: Final = ("LLAMA_API_KEY", "VLLM_API_KEY")
"""From which servers take the key that their clients must send."""
_POLL_S: Final = 0.2
_PROGRESS_S: Final = 5.0
_DEATH_S: Final = 1.0
"""Time in which a server that broke off its answers is found dead."""
_GONE_S: Final = 5.0
"""Time after which nobody waits any more for a server that is gone."""
_LOOK_S: Final = 1.0
"""Pause between two questions for the server's load."""


class Server:
    """One server, which this process starts unless ENGINE_URL names one. Construct, `starting`, `serving`, `close`.

    The engine counts in `sequences` what the server computes for it now, and in `steps` what has come from the server.
    """

    def __init__(self, settings: InferenceSettings, dialect: ServerDialect) -> None:
        self.sequences = 0
        self.steps = 0
        self.process: ServerProcess | None = None
        self._settings = settings
        self._dialect = dialect
        self._http: Http | None = None
        self._watching: asyncio.Task[None] | None = None
        self._load = Load(0)
        self._fault: str | None = None
        self._told = ""

    def require(self) -> None:
        """Find out whether it can be started at all; raises ConfigurationError."""
        require(self._dialect.package, self._settings)

    async def fetched(self, progress: Callable[[str], None]) -> tuple[Path, LibraryTokenizer]:
        """The model that it is to serve, and its tokenizer, where nothing is generated; raises ConfigurationError."""
        self.require()
        settings = self._settings
        ensure = ensure_gguf if self._dialect.weights == "gguf" else ensure_model
        model = await in_daemon_thread(
            lambda: ensure(settings.default_model, settings.data_dir, progress, settings.hf_token)
        )
        progress("reading the tokenizer")
        return model, await in_daemon_thread(lambda: bare_tokenizer(model))

    @asynccontextmanager
    async def starting(
        self, model: Path, arguments: Callable[[], Sequence[str]], progress: Callable[[str], None]
    ) -> AsyncIterator[Http]:
        """Start or find it. It must serve `model` at the end of the block, and is watched from then on.

        `arguments` makes what is added to the command that starts it.

        Raises:
            ConfigurationError: the server ended, failed, or took longer than ENGINE_START_TIMEOUT.
        """
        settings, name = self._settings, self._dialect.name
        self._http = http = await self._reached(model, arguments, progress)
        try:
            async with asyncio.timeout(settings.engine_start_timeout):
                yield http
        except TimeoutError as exc:
            raise ConfigurationError(
                f"{name} did not serve within {settings.engine_start_timeout:g} s: {self._told}"
            ) from exc
        except (EngineFault, ServerFailed) as exc:
            raise ConfigurationError(f"{name} cannot serve {settings.default_model}: {exc}") from exc
        self._watching = asyncio.create_task(self._watch(http))

    async def _reached(
        self, model: Path, arguments: Callable[[], Sequence[str]], progress: Callable[[str], None]
    ) -> Http:
        """The server of ENGINE_URL, or one that is started now."""
        url, key = self._settings.engine_url, self._settings.engine_api_key
        if url is not None:
            return Http(url, None if key is None else key.get_secret_value())
        port = free_port()
        # Other users of this machine may reach the port.
        own_key = secrets.token_hex(16) if key is None else key.get_secret_value()
        command = self._command(model, port) + list(arguments())
        if shutil.which(command[0]) is None:
            raise ConfigurationError(f"{self._settings.inference_engine}: there is no program {command[0]}")
        self.process = ServerProcess(self._dialect.name, own_key)
        progress(f"starting {self._dialect.name}")
        await self.process.start(command, dict.fromkeys(_KEY_VARIABLES, own_key))
        return Http(f"http://127.0.0.1:{port}", own_key)

    def _command(self, model: Path, port: int) -> list[str]:
        settings = self._settings
        given = settings.engine_command
        command = self._dialect.command(settings) if given is None else shlex.split(given)
        values = {
            "python": settings.engine_python or sys.executable,
            "model": model,
            "name": settings.served_model,
            "port": port,
            "slots": settings.slots,
            "dtype": precision_of(model),
        }
        return filled(command, values)

    async def identified(self, http: Http, tokenizer: Tokenizer, progress: Callable[[str], None]) -> Served:
        """What it serves, once it does.

        Raises:
            ConfigurationError: it has ended, or serves another model; see also `ServerDialect.identify`.
        """
        name, settings = self._dialect.name, self._settings
        served = await self._until_identified(http, tokenizer, progress)
        if (size := tokenizer.vocabulary_size) > served.vocabulary_size:
            raise ConfigurationError(
                f"{name} serves a model of {served.vocabulary_size} tokens, and the tokenizer of "
                f"{settings.default_model} has {size}"
            )
        if served.slots is not None and served.slots < settings.slots:
            log.warning("[%s] has %d slots, and the worker has %d", name, served.slots, settings.slots)
        return served

    async def _until_identified(self, http: Http, tokenizer: Tokenizer, progress: Callable[[str], None]) -> Served:
        started = told = time.monotonic()
        while True:
            if self.process is not None and (fault := self.process.fault) is not None:
                raise ConfigurationError(fault)
            try:
                return await self._dialect.identify(http, tokenizer)
            except (NotReady, ServerFailed) as exc:
                self._told = str(exc)
                if (now := time.monotonic()) - told >= _PROGRESS_S:
                    told = now
                    progress(f"waiting for {self._dialect.name} ({now - started:.0f} s): {exc}")
            await asyncio.sleep(_POLL_S)

    def asks(self, http: Http) -> bool:
        """Whether `http` is still how to ask it: false after `close`."""
        return self._http is http

    @property
    def fault(self) -> str | None:
        """Why it serves nothing any more; None while it does."""
        if self._fault is None and self.process is not None:
            self._fault = self.process.fault
        return self._fault

    def serving(self) -> Http:
        """How to ask it; raises EngineFault where it serves nothing."""
        if self._http is None:
            raise EngineFault("the engine is not started, or closed")
        if (fault := self.fault) is not None:
            raise EngineFault(fault)
        return self._http

    async def failed(self, error: ServerFailed) -> EngineFault:
        """The fault of a request whose server failed.

        A server that is gone fails its engine at once: further requests would spend their attempts on it.
        """
        if error.status is None and self.process is not None:
            await self.process.ended(_DEATH_S)
        elif error.status is None and self._http is not None:
            try:
                await self._dialect.load(self._http)
            except ServerGone as gone:
                self._fault = f"{self._dialect.name}: {gone}"
            except ServerFailed:
                pass
        return EngineFault(self.fault or f"{self._dialect.name}: {error}")

    def status(self) -> EngineStatus:
        """See `Engine.status`. The steps are those of the server and those that have come from it."""
        return EngineStatus(self.fault, self.sequences, self._load.steps + self.steps, self._load.cache_usage)

    async def _watch(self, http: Http) -> None:
        """Find out when the server answers no more."""
        silence = await until_silent(
            lambda: self._look(http), _LOOK_S, self._settings.engine_stall_timeout, gone_s=_GONE_S
        )
        self._fault = self.fault or f"{self._dialect.name} {silence}"

    async def _look(self, http: Http) -> None:
        load = await self._dialect.load(http)
        if load.steps < self._load.steps and self.process is None:
            # It may serve another model now, or its adapters under other numbers.
            self._fault = f"{self._dialect.name} was started anew"
        self._load = load

    async def close(self) -> None:
        """See `Engine.close`."""
        http, self._http = self._http, None
        if self._watching is not None:
            self._watching.cancel()
        if http is not None:
            await http.close()
        if self.process is not None:
            await self.process.close()
