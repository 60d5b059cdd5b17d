"""Bodies, paths and parameters of every shape, made from our own OpenAPI document."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.nats import NatsServer
from support.stack import Stack, running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 12


def explore(stack: Stack, mode: GenerationMode) -> int:
    """Call every operation with generated requests and check every answer; how many were made."""
    schema = schemathesis.openapi.from_url(f"{stack.apis[0].url}/openapi.json")
    # The events have no end, which a generated request would wait for.
    operations = [result.ok() for result in schema.exclude(path="/v1/queue/events").get_all_operations()]
    made = 0

    @settings(
        max_examples=EXAMPLES * len(operations),
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data(), number=st.integers(0, len(operations) - 1))
    def call(data: st.DataObject, number: int) -> None:
        nonlocal made
        case = data.draw(operations[number].as_strategy(generation_mode=mode))
        case.call_and_validate(checks=CHECKS, headers={"connection": "close"})
        made += 1

    call()
    return made


async def test_generated_requests_get_documented_answers(nats_server: NatsServer) -> None:
    import asyncio

    async with running(nats_server, max_concurrent_requests=4) as stack:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            assert await asyncio.to_thread(explore, stack, mode) >= EXAMPLES
        assert (await stack.chat("hi")).status_code == 200
        assert not [line for line in stack.apis[0].log if "failed unexpectedly" in line]
        await stack.idle()
