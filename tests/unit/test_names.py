import pytest

from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus


@pytest.mark.parametrize(
    ("model", "token"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB-SmolLM2-135M-Instruct"),
        ("org/Model-1.5", "org-Model-1-5"),
        ("with space.and>wild*card", "with-space-and-wild-card"),
        ("under_score", "under_score"),
        ("--edge--", "edge"),
        ("模型", "model"),
    ],
)
def test_a_model_becomes_one_readable_token(model: str, token: str) -> None:
    assert names.model_token(model) == token


def test_names_as_the_nats_cli_shows_them() -> None:
    assert names.STREAM == "INFERENCE"
    assert names.STREAM_SUBJECTS == "inference.requests.>"
    assert names.request_subject("org/m", "chat") == "inference.requests.org-m.chat"
    assert names.model_subjects("org/m") == "inference.requests.org-m.*"
    assert names.reply_subject("a1", "r1") == "inference.replies.a1.r1"
    assert names.reply_subjects("a1") == "inference.replies.a1.*"
    assert names.cancel_subject("r1") == "inference.cancel.r1"
    assert names.counter_subject(RequestStatus.TIMED_OUT) == "inference.counters.timed_out"
    assert names.bucket_stream(names.REQUESTS_BUCKET) == "KV_inference-requests"
    assert names.bucket_subjects(names.WORKERS_BUCKET) == "$KV.inference-workers.>"


def test_an_answer_s_id_has_the_request_id_in_it() -> None:
    request_id = "0b7ed6ce-3c9f-4a36-9d33-6c2f4c1f2a10"
    digits = request_id.replace("-", "")
    assert names.response_id(request_id) == f"resp_{digits}"
    assert names.request_id(f"resp_{digits}") == request_id
    assert names.request_id(f"msg_{digits}") == request_id
    assert names.request_id(f"chatcmpl-{request_id}") == names.request_id(f"cmpl-{request_id}") == request_id
    for other in ("", "resp_", request_id, digits, f"resp_{request_id}", f"resp_{digits.upper()}", f"resp_{digits}0"):
        assert names.request_id(other) == other
