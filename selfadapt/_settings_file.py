"""Files of settings: `--config`, and the one that repeats a run."""

from pathlib import Path
from typing import Any

import yaml

from selfadapt._errors import ConfigError, first_line

DEEPEST = 8
"""Of lists and names within each other; settings need two."""


def _refuse_nested(text: str) -> None:
    """Aliases and deep nesting, which settings have no use for, can fill memory and time."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            raise ValueError("it has aliases, or is nested too deep")


def read_settings(path: str) -> dict[str, Any]:
    """What a YAML file of 'name: value' lines holds.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = Path(path).read_text()
        _refuse_nested(text)
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file {path!r} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path!r} must hold 'name: value' lines.")
    return content
