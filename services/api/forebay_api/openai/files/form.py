"""A multipart form that is read while it comes: its file goes on in pieces, and nothing of it is kept.

Starlette's own form spools each file to the disk first.
"""

import logging
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from forebay_contracts.wire.errors import InvalidRequest

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each form that cannot be read

MAX_FIELDS_BYTES: Final = 16 * 1024
"""Most bytes of all parts but the file, their headers included."""


class Form:
    """The parts of a form, as far as they have come. `fields`: the small ones. `filename` None: no file yet."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequest if `content_type` is not that of a form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequest("The body must be a form: send it as `multipart/form-data`.")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.whole = False
        self._file = bytearray()
        self._in_file = False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._field, self._name = bytearray(), ""
        self._small = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._keep(self._header, data[start:end]),
                    "on_header_value": lambda data, start, end: self._keep(self._value, data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._end_form,
                },
            )
        except FormParserError as exc:
            raise InvalidRequest(f"The form cannot be read: {exc}") from exc

    def feed(self, data: bytes) -> bytes:
        """Take the next piece of the body; returns the bytes of the file in it. Raises InvalidRequest."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise InvalidRequest(f"The form cannot be read: {exc}") from exc
        found = bytes(self._file)
        self._file.clear()
        return found

    def finish(self) -> None:
        """The body has ended. Raises InvalidRequest if the form has not, or has no file."""
        if not self.whole:
            raise InvalidRequest("The form ends in the middle.")
        if self.filename is None:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")

    def _begin(self) -> None:
        self._disposition, self._in_file = b"", False
        self._field.clear()

    def _keep(self, part: bytearray, data: bytes) -> None:
        self._small += len(data)
        if self._small > MAX_FIELDS_BYTES:
            raise InvalidRequest(f"The fields of the form are larger than {MAX_FIELDS_BYTES} bytes.")
        part += data

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name != "file":
            return
        if self.filename is not None:
            raise InvalidRequest("The form has more than one file.", param="file")
        self._in_file = True
        self.filename = options.get(b"filename", b"").decode(errors="replace") or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file += data[start:end]
        else:
            self._keep(self._field, data[start:end])

    def _end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._field.decode(errors="replace")

    def _end_form(self) -> None:
        self.whole = True
