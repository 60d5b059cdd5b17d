"""Which model and which adapter a client's `model` means, by what live workers tell."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from forebay_api.watching.served_models import Asked, Models
from forebay_contracts.nats.consumers import KnownModel
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import AdapterNotFound, ModelNotFound, ModelUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import CompletionType


def worker(*adapters: str, **fields: Any) -> WorkerInfo:
    given = {"id": "w", "version": "1", "started_at": 0, "heartbeat_at": time.time(), "slots": 1, "engine": "vllm"}
    given |= {"model": "org/base", "aliases": ("base",), "status": WorkerStatus.READY, "adapters": adapters}
    return WorkerInfo(**given | fields)


def models(*workers: WorkerInfo, known: Mapping[str, KnownModel] | None = None) -> Models:
    async def asked() -> Mapping[str, KnownModel]:
        return known or {}

    return Models(ApiSettings(default_model="m", _env_file=None), lambda: workers, asked)


async def admitted(found: Models, name: str) -> Asked:
    return await found.admit(name, CompletionType.CHAT)


@pytest.mark.parametrize("base", ["org/base", "base"])
async def test_an_adapter_is_admitted_to_its_model_s_queue(base: str) -> None:
    assert await admitted(models(worker("red"), worker("blue", "red")), f"{base}:red") == Asked("org/base", "red")


async def test_an_unknown_adapter_is_no_model() -> None:
    with pytest.raises(AdapterNotFound, match="The model `org/base` has no adapter `green`") as caught:
        await admitted(models(worker("red")), "base:green")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    for name in ("other:red", ":red", "base:", "m:red:red", "m::red"):
        with pytest.raises(ModelNotFound):
            await admitted(models(worker("red")), name)


async def test_an_adapter_that_some_worker_lacks_is_not_admitted() -> None:
    # One of an older version says nothing of adapters, and would answer without.
    for lacks in (worker(), worker("blue"), worker(status=WorkerStatus.LOADING)):
        found = models(worker("red"), lacks)
        with pytest.raises(ModelUnavailable, match="`red` of `org/base` is not on every worker"):
            await admitted(found, "base:red")
        assert found.adapters("org/base") == []
    # It gets no more requests.
    assert await admitted(models(worker("red"), worker(status=WorkerStatus.DRAINING)), "base:red")


async def test_without_a_worker_the_newest_one_s_adapters_count() -> None:
    known = {"org/base": KnownModel(("base",), ("red",))}
    for workers in ((), (worker("blue", status=WorkerStatus.DRAINING),)):
        found = models(*workers, known=known)
        assert await admitted(found, "base:red") == Asked("org/base", "red")
        with pytest.raises(AdapterNotFound):
            await admitted(found, "base:blue")
        assert found.adapters("org/base") == []
    with pytest.raises(AdapterNotFound):
        await admitted(models(), "m:red")


async def test_a_name_counts_before_an_adapter() -> None:
    for named in ({"model": "base:red"}, {"model": "other", "aliases": ("base:red",)}):
        found = models(worker("red"), worker(**named))
        assert await admitted(found, "base:red") == Asked(named["model"])
        assert await admitted(found, "org/base:red") == Asked("org/base", "red")
