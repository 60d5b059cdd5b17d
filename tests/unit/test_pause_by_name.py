"""Which consumer the name of a model means that is to be paused, resumed or drained."""

import pytest
from nats.js.api import ConsumerConfig, ConsumerInfo

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing import steering
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ModelNotFound


def consumer(model: str, aliases: str = "") -> ConsumerInfo:
    metadata = {names.MODEL_METADATA: model, names.ALIASES_METADATA: aliases}
    config = ConsumerConfig(metadata=metadata)
    return ConsumerInfo(name=names.model_token(model), stream_name=names.STREAM, config=config, created=None)


async def test_a_name_goes_before_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(_: Connection) -> list[ConsumerInfo]:
        return [consumer("org/new", "org/old,chat"), consumer("org/old")]

    monkeypatch.setattr(steering, "consumers", found)
    connection = Connection.__new__(Connection)
    for asked, meant in (("org/old", "org/old"), ("chat", "org/new"), (names.model_token("org/old"), "org/old")):
        assert (await steering._consumer(connection, asked)).name == names.model_token(meant)
    with pytest.raises(ModelNotFound):
        await steering._consumer(connection, "other")
