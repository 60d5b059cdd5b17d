"""The passes of the library's batch processor: how each sequence gets its token, and what happens out of memory.

On a GPU the library computes on a stream of its own, and may start a pass before the host has the tokens of the one
before (`use_async_batching`). So whatever a choice needs of the device is made on that stream, and only a grammar waits
for the token before.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.continuous_batching.utils import stream_context

from forebay_inference.engine.protocol import EngineFault, as_fault
from forebay_inference.engine.transformers.penalties import Histories
from forebay_inference.engine.transformers.sampling import Row, TokenChooser, choose

_log = logging.getLogger(__name__)


def requests_of(inputs: Any) -> Any:
    """The requests of the pass that is computed next, of the library's inputs and outputs."""
    pairs = getattr(inputs, "io_pairs", None)
    return inputs.requests_in_batch if pairs is None else pairs[inputs.current_pair].host_io.requests_in_batch


class Passes:
    """Computes the scores of each pass as the library does, and the tokens as the choosers of `sequences` ask.

    What the library records as a CUDA graph ends with the scores: what follows differs from pass to pass.
    """

    def __init__(self, processor: Any, sequences: Mapping[str, Any], vocabulary: int) -> None:
        self._inputs = processor.inputs_and_outputs
        self._runner = runner = processor.model_runner
        self._sequences = sequences
        self._histories = Histories(vocabulary, processor.model_device)
        self._scores = torch.empty(0)
        self._recorded: torch.Tensor | None = None
        if runner.pad_inputs:
            # A graph writes to the same place each time it is replayed.
            rows = processor.cb_config.max_requests_per_batch
            self._recorded = torch.empty(rows, vocabulary, device=processor.model_device)
        self._compute = runner.compute_batch
        runner.compute_batch = self._compute_and_choose
        runner._forward_process_and_sample = self._forward

    def _forward(
        self, model: Any, batch: dict[str, Any], carried: torch.Tensor, previous: torch.Tensor, _: torch.Tensor
    ) -> None:
        """The library's own, without the choice."""
        self._inputs.carry_over_tokens(batch["input_ids"], carried, previous)
        logits = model(**batch).logits[0]
        if "logits_to_keep" not in batch:
            logits = logits[batch["logits_indices"]]
        if self._recorded is None:
            self._scores = logits.float()
        else:
            self._recorded[: logits.size(0)].copy_(logits)

    def _compute_and_choose(self, model: Any, batch: dict[str, Any]) -> None:
        stream = self._inputs.compute_stream
        if stream is not None:
            # The library writes the inputs of a pass on the default stream, and does not let its own stream wait for
            # it. Streams of torch do not wait for the default stream by themselves.
            stream.wait_stream(torch.get_device_module().current_stream())
        try:
            self._compute(model, batch)
        except RuntimeError as exc:
            if not (self._runner.use_cuda_graph_varlen or self._runner.use_cuda_graph_decode):
                raise
            # Some models look at the host in a pass, which cannot be recorded.
            _log.warning("a pass cannot be recorded as a CUDA graph (%s): computing without graphs", exc)
            self._runner.use_cuda_graph_varlen = self._runner.use_cuda_graph_decode = False
            self._compute(model, batch)
        requests = [request.state for request in requests_of(self._inputs) if request.has_new_token]
        if not requests:
            return
        with stream_context(stream):
            rows = []
            for index, state in enumerate(requests):
                if (sequence := self._sequences.get(state.request_id)) is not None:
                    chooser: TokenChooser = sequence.chooser
                    row = Row(index, chooser, state.position_offset - len(chooser.prompt))
                    rows.append(row)
                    if chooser.guide is not None and chooser.guided < row.position:
                        self._accept_token_before(row, state.request_id)
            scores = self._scores if self._recorded is None else self._recorded
            tokens = choose(rows, scores[: len(requests)], self._histories)
            self._inputs.output_ids[0, : len(requests)].copy_(tokens)

    def _accept_token_before(self, row: Row, request_id: str) -> None:
        """Let the grammar of `row` accept the token of the pass before, which the library has not told yet."""
        before = self._inputs.io_pairs[1 - self._inputs.current_pair]
        before.d2h_over.synchronize()
        place = list(before.host_io.req_id_to_new_token_position).index(request_id)
        token = int(before.host_io.output_ids[0, place])
        if token in row.chooser.ends:
            return  # The sequence has ended, and this pass computes a token too many for it.
        try:
            row.chooser.accept_early(token)
        except Exception as exc:  # one sequence's trouble must not end the thread that all share
            row.chooser.outcomes[row.position] = as_fault(exc)


def survive_out_of_memory(manager: Any) -> None:
    """Let the library's loop go on after a pass for which the GPU had no memory. The sequences of the pass fail; those
    that wait are computed next. The library would end its thread."""
    body = manager._generation_loop_body
    fault = EngineFault("the GPU ran out of memory in a forward pass")
    bootstraps = False

    def go_on(processor: Any, bootstrapping: bool) -> bool:
        nonlocal bootstraps
        try:
            if not bootstraps:
                return bool(body(processor, bootstrapping))
            # Of passes that overlap, the first has no predecessor whose tokens were to be read.
            passes = manager.current_batch
            goes_on = bool(body(processor, True))
            bootstraps = manager.current_batch == passes
            return goes_on or not bootstraps
        except torch.OutOfMemoryError as exc:
            _log.error("%s: lower LLM_BATCH_SIZE or WORKER_SLOTS (%s)", fault, str(exc).partition("\n")[0])
            # Waits for a pass that may still be computed.
            processor.inputs_and_outputs.reset()
            for state in list(processor.scheduler.active_requests.values()):
                processor._handle_request_error(fault, state)
                processor.scheduler.finish_request(state.request_id)
            processor.scheduler.block_new_requests = False
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            bootstraps = processor.use_async_batching and not bootstrapping
            return True

    manager._generation_loop_body = go_on
