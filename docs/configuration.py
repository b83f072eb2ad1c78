"""Writes docs/configuration.md from the structs of edge/config.py: `python docs/configuration.py`.

A test holds the page to what this prints.
"""

import inspect
import re
from pathlib import Path

import msgspec.inspect

from edge.config import LEVELS, LOG_VARIABLE, VARIABLES, Config, HomeAssistantConfig, HttpConfig, MqttConfig
from edge.daemon import RELOADED
from shared.validation import takes

SECTIONS: dict[str, type[msgspec.Struct]] = {
    "mqtt": MqttConfig,
    "homeassistant": HomeAssistantConfig,
    "http": HttpConfig,
}
PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration of the daemon

Written by `python docs/configuration.py` from the structs in `edge/config.py`; edit those.

Every setting has a default. A TOML file overrides it (`--config FILE`, or `EDGELM_CONFIG=FILE`; `deploy/edgelm.toml` is
one with every key in it), an environment variable overrides the file, and a flag (`--bundle`, `--socket`, `--backend`,
`--mqtt HOST[:PORT]`, `--http HOST:PORT`) overrides both. Unknown keys and variables are refused by name; an empty
variable counts as unset. Relative paths in the file start at the file's folder, all others at the working directory.

The service reads `/etc/edgelm/edgelm.toml`. `systemctl reload edgelm`, or SIGHUP, reads the file again and applies
{reloaded}; the rest takes effect at the next start.

`{log}` sets the log level: {levels} (default: info for the daemon, warning for other commands).
"""


def entries(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Field → its line in the struct's docstring."""
    found = re.findall(r"^(\w+): (.*(?:\n  .*)*)", inspect.cleandoc(struct.__doc__ or ""), re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def default_of(field: msgspec.inspect.Field) -> str:
    """A field's default as TOML writes it; of a computed one, the first sentences of the function that computes it."""
    if field.default_factory is not msgspec.NODEFAULT:
        return inspect.cleandoc(field.default_factory.__doc__ or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
    if field.default is None:
        return "none"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def table(struct: type[msgspec.Struct], section: str = "") -> str:
    """The settings of a struct, a row each."""
    variables = {key: name for name, key in VARIABLES.items()}
    texts = entries(struct)
    rows = ["| key | meaning | takes | default | variable |", "| --- | --- | --- | --- | --- |"]
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if field.name in SECTIONS:
            continue
        variable = f"`{variables[key]}`" if (key := section + field.name) in variables else "–"
        cells = (f"`{field.name}`", texts[field.name], takes(field.type), default_of(field), variable)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    *most, last = (f"`{key}`" for key in RELOADED)
    head = HEAD.format(reloaded=f"{', '.join(most)} and {last}", log=LOG_VARIABLE, levels=", ".join(LEVELS))
    sections = "".join(f"\n## `[{name}]`\n\n{table(struct, f'{name}.')}\n" for name, struct in SECTIONS.items())
    return f"{head}\n## Top level\n\n{table(Config)}\n{sections}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
