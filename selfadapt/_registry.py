"""Adapters of installed packages, found through the entry-point group `selfadapt.adapters`."""

import importlib
import re
from importlib.metadata import EntryPoint, entry_points

from selfadapt._adapter import Adapter
from selfadapt._errors import AdapterNotFoundError

GROUP = "selfadapt.adapters"


def adapters() -> dict[str, str | None]:
    """The registered adapters by name: None if it can be loaded, else what is missing.

    This imports each of them; `load_adapter` imports only the one asked for.
    """
    found: dict[str, str | None] = {}
    for name, entry in _entries().items():
        try:
            load_adapter(name)
            found[name] = None
        except AdapterNotFoundError as error:
            found[name] = str(error)
        except Exception as error:  # a broken adapter must not hide the others
            found[name] = f"{entry.value} fails: {type(error).__name__}: {error}"
    return found


def load_adapter(name: str) -> type[Adapter]:
    """The adapter class registered under `name`.

    Raises:
        AdapterNotFoundError: no installed package registers it, or the library that it needs is not
            installed; the message names the command that installs it. Errors in the adapter's
            own code come through as they are.
    """
    entries = _entries()
    if name not in entries:
        raise AdapterNotFoundError(
            f"there is no adapter {name!r}; installed are: {', '.join(sorted(entries)) or 'none'}."
        )
    entry = entries[name]
    try:
        loaded: type[Adapter] = entry.load()
    except ModuleNotFoundError as error:
        extra = _extra_with(entry, error.name.partition(".")[0]) if error.name else None
        if extra is None:
            raise
        raise AdapterNotFoundError(
            f"adapter {name!r} needs {error.name}, which is not installed: pip install '{extra}'"
        ) from error
    return loaded


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _extra_with(entry: EntryPoint, module: str) -> str | None:
    """The requirement, e.g. "selfadapt[smp]", that would bring `module`; None if it is no
    declared optional requirement of the entry point's distribution, or is there after all."""
    try:
        importlib.import_module(module)
        return None
    except ModuleNotFoundError:
        pass
    if entry.dist is None:
        return None
    extras = []
    for requirement in entry.dist.requires or []:
        project, _, marker = requirement.partition(";")
        required = re.split(r"[\s<>=!~\[(]", project.strip())[0]
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if extra and required.lower().replace("-", "_") == module.lower():
            extras.append(extra[1])
    if not extras:
        return None
    extra_name = entry.name if entry.name in extras else extras[0]  # not "all"
    return f"{entry.dist.name}[{extra_name}]"
