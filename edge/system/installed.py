"""What is installed here."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of


def version() -> str:
    """Of the installed distribution; "unknown" in a checkout alone. Looks through the file system: ask once."""
    try:
        return version_of("diffusion-llm")
    except PackageNotFoundError:
        return "unknown"
