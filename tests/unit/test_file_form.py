"""The form of an upload, read in pieces of any size, and a download that breaks off."""

from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest

from forebay_api.openai.files.form import MAX_FIELDS_BYTES, Form
from forebay_api.openai.files.routes import Content
from forebay_contracts.wire.errors import InvalidRequest, QueueUnavailable

TYPE = "multipart/form-data; boundary=xyz"
FILE = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a b.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
PURPOSE = b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
CONTENT = b"\r\n--xy\r\n-- x\n" * 50
END = b"--xyz--\r\n"


def read(data: bytes, piece: int) -> tuple[Form, bytes]:
    form = Form(TYPE)
    content = b"".join(form.feed(data[start : start + piece]) for start in range(0, len(data), piece))
    form.finish()
    return form, content


@pytest.mark.parametrize("piece", [1, 2, 5, 64, 10_000])
def test_a_file_comes_out_as_it_was_sent(piece: int) -> None:
    for parts in ((FILE, CONTENT, b"\r\n", PURPOSE, END), (PURPOSE, FILE, CONTENT, b"\r\n", END)):
        form, content = read(b"".join(parts), piece)
        assert (content, form.filename, form.fields) == (CONTENT, "a b.jsonl", {"purpose": "batch"})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (FILE + CONTENT, "ends in the middle"),
        (PURPOSE + END, "Missing required parameter: 'file'"),
        (FILE + b"a\r\n" + FILE + b"b\r\n" + END, "more than one file"),
        (b"no form at all", "cannot be read"),
        (PURPOSE.replace(b"batch", b"x" * MAX_FIELDS_BYTES) + FILE + END, "fields of the form are larger"),
        (PURPOSE.replace(b"purpose", b"p" * MAX_FIELDS_BYTES) + FILE + END, "cannot be read"),
    ],
)
def test_what_is_no_form_of_a_file(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        read(data, 100)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=xyz"])
def test_what_is_no_form(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="must be a form"):
        Form(kind)


def test_a_boundary_has_a_limit() -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Form(f"multipart/form-data; boundary={'b' * 20_000}")


async def test_a_download_that_breaks_off_has_no_end() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"a"
        raise QueueUnavailable("the file was deleted")

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await Content(content()).stream_response(send)
    assert [message.get("more_body", True) for message in sent] == [True, True]
