"""What a chat template takes, found by rendering tiny conversations.

A rewrite is adopted if the template does not show all of a conversation without it, and does with it.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any, Final, NamedTuple

from forebay_inference.engine.text.rewrites import (
    Message,
    Rewrite,
    arguments_as_text,
    content_as_parts,
    developer_as_system,
    merged_turns,
    one_call_a_turn,
    reasoning_as_thinking,
    rewritten,
    short_call_ids,
    system_first,
    system_in_user,
    text_before_calls,
    told_in_words,
    user_first,
)

Render = Callable[[list[Message], bool], str | None]
"""The text of a conversation, with a tool offered or not; None where the template refuses it."""


class Probe(NamedTuple):
    """A conversation that a template should show, and what may help where it does not.

    It is shown if every text of the form `probe1` appears. The first of `rewrites` that achieves that is adopted.
    """

    lacks: str
    conversation: Sequence[Message]
    rewrites: Sequence[tuple[Rewrite, ...]]
    tools: bool = False


def _call(number: int) -> Message:
    function = {"name": "probe", "arguments": {"x": f"probe{number}"}}
    return {"id": f"call_{number:024}", "type": "function", "function": function}


def _turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


_FIXES: Final = (short_call_ids, arguments_as_text, one_call_a_turn)

PROBES: Final = (
    Probe(
        "developer",
        [_turn("system", "probe1"), _turn("developer", "probe2"), _turn("user", "probe3")],
        [(developer_as_system,)],
    ),
    Probe(
        "system before tool results",
        [
            _turn("system", "probe1"),
            _turn("user", "a"),
            _turn("assistant", "", tool_calls=[_call(2)]),
            _turn("tool", "probe3", tool_call_id=_call(2)["id"], name="probe"),
        ],
        [(system_in_user,)],
        tools=True,
    ),
    Probe(
        "reasoning of earlier turns",
        [
            _turn("user", "a"),
            _turn("assistant", "", reasoning_content="probe1", tool_calls=[_call(2)]),
            _turn("tool", "b", tool_call_id=_call(2)["id"], name="probe"),
        ],
        [(reasoning_as_thinking,)],
        tools=True,
    ),
    Probe(
        "text beside tool calls",
        [
            _turn("user", "a"),
            _turn("assistant", "probe1", thinking="b", tool_calls=[_call(2)]),
            _turn("tool", "probe3", tool_call_id=_call(2)["id"], name="probe"),
            _turn("assistant", "probe4"),
            _turn("user", "probe5"),
        ],
        [(text_before_calls,)],
        tools=True,
    ),
    Probe(
        "tool calls and results",
        [
            _turn("user", "probe1"),
            _turn("assistant", "", tool_calls=[_call(2), _call(3)]),
            _turn("tool", "probe4", tool_call_id=_call(2)["id"], name="probe"),
            _turn("tool", "probe5", tool_call_id=_call(3)["id"], name="probe"),
        ],
        [*chain.from_iterable(combinations(_FIXES, count) for count in range(1, 4)), (told_in_words,)],
        tools=True,
    ),
    Probe(
        "more than one system message",
        [
            _turn("system", "probe1"),
            _turn("system", "probe2"),
            _turn("user", "probe3"),
            _turn("assistant", "probe4"),
            _turn("system", "probe5"),
            _turn("user", "probe6"),
        ],
        [(system_first,)],
    ),
    Probe("system", [_turn("system", "probe1"), _turn("user", "probe2")], [(system_in_user,)]),
    Probe(
        "two turns of one role",
        [
            _turn("user", "probe1"),
            _turn("user", "probe2"),
            _turn("assistant", "probe3"),
            _turn("assistant", "probe4"),
            _turn("user", "probe5"),
        ],
        [(merged_turns,)],
    ),
    Probe(
        "a first turn of the assistant",
        [_turn("assistant", "probe1"), _turn("user", "probe2")],
        [(user_first,)],
    ),
    Probe("text content", [_turn("user", "probe1")], [(content_as_parts,)]),
)
"""In the order in which their rewrites are applied."""


def rewrites_for(render: Render, *, tools: bool) -> tuple[Rewrite, ...]:
    """What has to be done to the messages for a template, in this order. `tools`: the template can tell of tools.

    The last is looked for first: what an earlier one makes passes through it.
    """
    words: tuple[Rewrite, ...] = () if tools else (told_in_words,)
    adopted: tuple[Rewrite, ...] = ()
    for probe in reversed(PROBES):
        helps = (some for some in ((), *probe.rewrites) if _shows(render, probe, (*words, *some, *adopted)))
        adopted = (*next(helps, ()), *adopted)
    return words + adopted


def _shows(render: Render, probe: Probe, rewrites: Sequence[Rewrite]) -> bool:
    messages = rewritten(list(probe.conversation), rewrites)
    text = render(messages, probe.tools)
    if text is None or any(marker not in text for marker in re.findall(r"probe\d", json.dumps(probe.conversation))):
        return False
    if all(one["role"] != "developer" for one in messages):
        return True
    # Many templates write any role as it stands: then the model does not know it.
    stranger = [{**one, "role": one["role"].replace("developer", "stranger")} for one in messages]
    strange = render(stranger, probe.tools)
    return strange is None or strange.replace("stranger", "developer") != text
