"""Responses: the body of `POST /v1/responses`, and the events and the object that answer it."""
