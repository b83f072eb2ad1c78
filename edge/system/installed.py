"""The installed distribution."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of


def version() -> str:
    """Its version; "unknown" in a checkout that is not installed. Searches the file system: call it once."""
    try:
        return version_of("diffusion-llm")
    except PackageNotFoundError:
        return "unknown"
