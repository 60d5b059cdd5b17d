"""A tokenizer with a chat template of its own, and an engine that says what it is told, for tests of the text layer."""

import re
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forebay_inference.engine.protocol import Capabilities, EngineStatus, LoadedModel, Step, TokenRequest
from forebay_inference.engine.text.model import TextModel


def _raise(message: str) -> None:
    raise TemplateError(message)


class TemplateTokenizer:
    """A byte is a token, and so is each of `special`, which answers hide."""

    begin_token = None

    def __init__(self, template: str, special: Sequence[str] = ()) -> None:
        self.chat_template = template
        self.special_tokens: Mapping[str, int] = {text: 256 + place for place, text in enumerate(special)}
        self.vocabulary_size = 256 + len(special)
        self._texts = {token: text.encode() for text, token in self.special_tokens.items()}
        self._marks = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(template)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        tokens: list[int] = []
        for piece in self._marks.split(text) if self._marks else [text]:
            tokens += [self.special_tokens[piece]] if piece in self.special_tokens else piece.encode()
        return tokens

    def decode(self, tokens: Sequence[int], *, show: Collection[int] = ()) -> str:
        shown = (self.bytes_of(token) for token in tokens if token < 256 or token in show)
        return b"".join(shown).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self._texts[token]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self._template.render(messages=messages, **options)


class Says:
    """An engine whose every answer is `text`. `asked` is the last request."""

    capabilities = Capabilities(resumes="exact", grammars="ignored", logprobs=False)

    def __init__(self, tokenizer: TemplateTokenizer, text: str, end: str = "") -> None:
        self.tokenizer = tokenizer
        self.answer = tokenizer.encode(text)
        self.asked: TokenRequest | None = None
        self._ends = frozenset(tokenizer.encode(end))

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        return LoadedModel(self.tokenizer, 4096, "none", "none", self._ends, quick_length=10_000)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        self.asked = request
        for token in self.answer[len(request.generated) :]:
            yield Step((token,), finish="stop" if token in request.end_tokens else None)
            if token in request.end_tokens:
                return
        yield Step((), finish="stop")

    def status(self) -> EngineStatus:
        return EngineStatus(None, 0, 0)

    async def close(self) -> None:
        pass


async def model_that_says(
    text: str, template: str, special: Sequence[str] = (), end: str = ""
) -> tuple[TextModel, Says]:
    """A model that has `template` and answers with `text`, and its engine."""
    engine = Says(TemplateTokenizer(template, special), text, end)
    model = TextModel(engine)
    await model.start(lambda line: None)
    return model, engine
