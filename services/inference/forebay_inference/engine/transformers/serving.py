"""What is in memory while the engine serves: the model, its tokenizer and grammars, and the batch."""

import asyncio
import uuid
from collections.abc import Sequence

from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.choice import Choice
from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.text.tool_formats import format_of
from forebay_inference.engine.transformers.batch import Batch, SequenceInBatch, Step
from forebay_inference.engine.transformers.guided import Grammars
from forebay_inference.engine.transformers.loading import Loaded
from forebay_inference.engine.transformers.memory import CachePlan
from forebay_inference.engine.transformers.prepare import Prepared, prepare
from forebay_inference.engine.transformers.sampling import TokenChooser


class Serving:
    """Turns requests into choices, and choices into sequences of the batch."""

    def __init__(self, loaded: Loaded, cache: CachePlan, batch: Batch) -> None:
        self.loaded = loaded
        self.batch = batch
        self.context_length = cache.context_length
        self._vocabulary: int = loaded.model.config.get_text_config().vocab_size
        self._tool_format = format_of(loaded.tokenizer)
        self._grammars = Grammars(loaded.tokenizer, self._vocabulary, loaded.end_tokens)
        self._special = frozenset(loaded.tokenizer.all_special_ids)

    def prepare(self, request: InferenceRequest) -> Prepared:
        """See `prepare.prepare`."""
        return prepare(request, self.loaded, self._tool_format, self._grammars, self.context_length)

    def choice(self, request: InferenceRequest, prepared: Prepared, index: int, resumed: Sequence[int]) -> Choice:
        """Choice `index` of `request`, `resumed` being its tokens already."""
        prompt = index // request.n
        calls = prepared.tools is not None
        choice = Choice(
            index,
            self._decode_with_markers if calls else self._decode,
            self._grammars.bytes_of,
            request.sampling.stop,
            prepared.end_tokens,
            prepared.limits[prompt],
            ToolParser(self._tool_format, f"{request.id}:{index}") if calls else None,
            prepared.echoes[prompt],
        )
        choice.replay(resumed)
        return choice

    def submit(
        self,
        request: InferenceRequest,
        prepared: Prepared,
        choice: Choice,
        steps: "asyncio.Queue[tuple[Choice, Step]]",
    ) -> None:
        """Put the sequence of `choice` into the batch; what it brings goes into `steps`.

        Raises:
            EngineFault: the batch takes no more, or the tokens so far are none of this model's.
        """
        prompt = prepared.prompts[choice.index // request.n]
        guide = None if prepared.grammar is None else self._grammars.guide(prepared.grammar)
        # Without a seed the request's id is one: a second attempt then goes on like the first.
        seed = request.id if request.sampling.seed is None else str(request.sampling.seed)
        chooser = TokenChooser(
            request.sampling,
            f"{seed}:{choice.index}",
            prompt,
            choice.tokens,
            self._vocabulary,
            self.loaded.device,
            guide,
        )
        choice.sequence = SequenceInBatch(
            # Not the request's id alone: an earlier attempt may still be leaving the batch.
            id=f"{request.id}/{choice.index}/{uuid.uuid4().hex[:8]}",
            tokens=[*prompt, *choice.tokens],
            max_new_tokens=choice.limit - len(choice.tokens),
            end_tokens=choice.end_tokens,
            chooser=chooser,
            on_step=lambda step: steps.put_nowait((choice, step)),
        )
        if not self.batch.submit(choice.sequence):
            raise EngineFault("the engine takes no more requests")

    def cancel(self, choice: Choice) -> None:
        """Take the sequence of `choice` out of the batch, if it is there."""
        if choice.sequence is not None:
            self.batch.cancel(choice.sequence.id)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _decode_with_markers(self, tokens: Sequence[int]) -> str:
        """The text with the marker that begins a tool call, which is a special token in some families."""
        hidden = self._special - {self._tool_format.start_token}
        return str(
            self.loaded.tokenizer.decode(
                [token for token in tokens if token not in hidden],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )
