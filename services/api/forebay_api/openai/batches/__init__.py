"""Batches: the body of `POST /v1/batches`, the record of a batch, and what is read, listed and cancelled."""
