"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("forebay")
except PackageNotFoundError:  # a source tree on the path, not installed
    VERSION = "0"
