"""Files: the form of `POST /v1/files`, and what is read, listed and removed."""
