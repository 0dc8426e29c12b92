"""What a run leaves on disk. Files appear complete or not at all (`_disk`).

Folders (the model, the examples) are made again from the snapshots when a run is resumed: while one
takes the place of another, both are there. Of several ranks the first one writes, and the others
wait for it: they read the same folder.
"""

import csv
import io
import json
import logging
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfadapt import _ranks as ranks
from selfadapt._config import Config
from selfadapt._disk import appearing, write_file
from selfadapt._errors import CheckpointError, first_line
from selfadapt._network import Network, copy_network
from selfadapt._state import first_difference, refuse_other_tensors

logger = logging.getLogger(__name__)
Row = dict[str, Any]
"""Figures of one iteration of one candidate: "iteration", "candidate" and numbers."""
CALIBRATION = "calibration.json"
CHECKPOINTS = "checkpoints"
INPUT = "input.json"
ORIGIN, REPEATS = "adapter.json", "run.yaml"
"""Of the shell: adapter and options; all settings, with which `adapt --config` repeats the run."""
COMMAND = "command.txt"
"""Of the shell: the words with which the run was begun, not those that have resumed it."""
LOCK = ".lock"
"""Held by the process that is at work; the system lets it go when that ends, however it ends."""
FORMAT = 3
"""Of the folder; runs of another one are refused."""


class RunDirectory:
    """The folder of one run.

    Args:
        path: the folder.
        notes: text files by name that are written when the run starts.

    config.json      the settings
    calibration.json how images go in, and what was tried
    data.json        format, versions; checksums of images and model; input, options, criterion
    history.csv      one row per iteration that was logged
    looks.json       what the judge has seen of each candidate
    pixels.json      checksums of the images that were learnt from
    checkpoints/     everything to go on from the last validation point of each loop
    snapshots/       the exported network's weights at each validation point (safetensors)
    input.json       how images go into the result
    examples/        held-out images with instances before and after (TIFF)
    model            the result, in the model's native format
    result.json      where the run stopped and why
    command.txt      of the shell: how it was started
    report.html      what `selfadapt report` draws

    Raises:
        CheckpointError: the folder holds something else, another run, or a damaged file.
    """

    def __init__(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._notes = notes or {}
        self._lock = FileLock(self.path / LOCK, timeout=0)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def model(self) -> Path:
        """Where the adapted model is saved."""
        return self.path / "model"

    def check(self, config: Config, *, resume: bool) -> None:
        """Raise CheckpointError unless a run with these settings may use the folder."""
        ranks.first(lambda: self._check(config, resume=resume))

    def _check(self, config: Config, *, resume: bool) -> None:
        if self.path.is_file():
            raise CheckpointError(f"{str(self.path)!r} is a file: give a folder for the run.")
        self.refuse_links()
        files = list(self.path.iterdir()) if self.path.is_dir() else []
        if all(file.name.endswith(".partial") or file.name == LOCK for file in files):
            return
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{str(self.path)!r} holds other files: give a new or an empty folder."
            )
        if not resume:
            raise CheckpointError(
                f"{str(self.path)!r} holds another run: give a new folder, or resume it "
                "(resume=True, --resume)."
            )
        self._refuse_other("config.json", config.to_dict(), "Give the same settings")

    def refuse_links(self) -> None:
        """Raise CheckpointError for a link, which leads out of the folder."""
        for entry in self.path.rglob("*"):
            if entry.is_symlink():
                raise CheckpointError(
                    f"{str(entry)!r} is a link: a run has plain files and folders only."
                )

    def start(self, config: Config, data: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder for a run with these settings on these images, until `release`.

        Raises:
            CheckpointError: another process is at work in it, or it holds another run.
        """
        ranks.first(lambda: self._start(config, data, resume=resume))

    def _start(self, config: Config, data: Mapping[str, Any], *, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.refuse_links()
        try:
            self._lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"another process is at work in {str(self.path)!r}: wait for its end, or give "
                "another folder."
            ) from None
        self._check(config, resume=resume)  # again: it may have changed until now
        data = {"format": FORMAT, **data}
        versions: Any = _versions()
        if (self.path / "data.json").exists():
            self._refuse_other("data.json", data, "Give the same images and options")
            began = self.read_json("data.json").get("versions")
            if began != versions:
                logger.warning(
                    "This run began with %s, and goes on with %s: it may end in other bits.",
                    began,
                    versions,
                )
                versions = began
        for name, text in self._notes.items():
            if name.endswith(".json") and (self.path / name).exists():
                self._refuse_other(name, json.loads(text), "Give the same options")
        self._write("config.json", _packed(config.to_dict()))
        self._write("data.json", _packed(data | {"versions": versions}))
        (self.path / "snapshots").mkdir(exist_ok=True)
        for left in (self.path / "snapshots").glob(".tmp*"):  # of a killed run, by safetensors
            left.unlink()
        for name, text in self._notes.items():
            if name != COMMAND or not (self.path / name).exists():
                self._write(name, text.encode(errors="backslashreplace"))

    def release(self) -> None:
        """Let others work in the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refuse_other(self, name: str, ours: Mapping[str, Any], remedy: str) -> None:
        theirs = self.read_json(name)
        for key, value in ours.items():
            if key not in theirs:
                raise CheckpointError(
                    f"{str(self.path)!r} holds a run of another version, which knows no {key}: "
                    "start in a new folder."
                )
            if theirs[key] != value:
                what, was, now = first_difference(key, theirs[key], value)
                raise CheckpointError(
                    f"{str(self.path)!r} holds a run with {what} = {was}, not {now}. {remedy} to "
                    "resume it, or a new folder."
                )

    def replacing(self, name: str) -> AbstractContextManager[Path]:
        """A path to write a file or folder to, which then takes the place of `name`."""
        return appearing(self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run."""
        try:
            data = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{str(self.path)!r} is no run: it has no {name}.") from None
        except (ValueError, RecursionError, OSError) as error:
            raise CheckpointError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{self.path / name} is damaged: it holds no names and values.")
        return data

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file of the run; one that holds this already keeps its date."""
        packed, path = _packed(data), self.path / name

        def write() -> None:
            if not path.is_file() or path.read_bytes() != packed:
                self._write(name, packed)

        ranks.first(write)

    def read_history(self) -> list[Row]:
        """All rows so far; figures that a row does not have are left out."""
        path = self.path / "history.csv"
        if not path.exists():
            return []
        try:
            with path.open(newline="") as file:
                rows = [
                    {
                        name: value if name == "candidate" else float(value)
                        for name, value in row.items()
                        if value
                    }
                    for row in csv.DictReader(file)
                ]
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if not all(
            {"iteration", "candidate"} <= row.keys() and float(row["iteration"]).is_integer()
            for row in rows
        ):
            raise CheckpointError(f"{path} is damaged: a row names no iteration or candidate.")
        return rows

    def write_history(self, rows: list[Row]) -> None:
        """Write all rows; the columns are the union of theirs."""
        text = io.StringIO()
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "iteration": int(row["iteration"])} for row in rows)
        ranks.first(lambda: self._write("history.csv", text.getvalue().encode()))

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return (self.path / CHECKPOINTS).is_dir()

    def begin(self) -> None:
        """From here on there is."""
        ranks.first((self.path / CHECKPOINTS).mkdir)

    def save_checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint of a loop."""

        def save() -> None:
            with appearing(self.path / CHECKPOINTS / f"{name}.pt") as partial:
                torch.save(dict(state), partial)

        ranks.first(save)

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """The checkpoint of a loop, or None before its first validation point."""
        path = self.path / CHECKPOINTS / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
            return state
        except Exception as error:
            raise CheckpointError(
                f"{path} is damaged or no checkpoint of a run ({first_line(error)}): start in a "
                "new folder."
            ) from None

    def save_snapshot(self, name: int | str, model: nn.Module) -> None:
        """Keep the weights of a validation point."""

        def save() -> None:
            # clones, since safetensors refuses tensors that share memory
            tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
            with appearing(self._snapshot(name)) as partial:
                save_file({name: t.contiguous() for name, t in tensors.items()}, partial)

        ranks.first(save)

    def load_snapshot(self, name: int | str) -> dict[str, Tensor]:
        """The weights of a candidate: an iteration of the loop (0: initial), or its name."""
        path = self._snapshot(name)
        if name not in self.snapshots():
            there = ", ".join(map(str, self.snapshots()))
            raise CheckpointError(f"there is no snapshot {name}; there are {there}.")
        try:
            tensors = load_file(path)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
        if any(bool(tensor.isnan().any()) for tensor in tensors.values()):
            raise CheckpointError(f"{path} is damaged: it holds NaN, which no run keeps.")
        return tensors

    def load_network(self, name: int | str, like: Network, device: torch.device) -> Network:
        """A copy of a network, with the weights of a candidate."""
        network = copy_network(like, device)
        tensors = self.load_snapshot(name)
        refuse_other_tensors(f"snapshot {name}", tensors, network.state_dict())
        network.load_state_dict(tensors)
        return network

    def remove_snapshot(self, name: int | str) -> None:
        """Weights that are not needed any more."""
        ranks.first(lambda: self._snapshot(name).unlink(missing_ok=True))

    def snapshots(self) -> list[int | str]:
        """Of which there are weights: iterations, 0 being the initial model, then names."""
        stems = sorted(path.stem for path in (self.path / "snapshots").glob("*.safetensors"))
        numbers: list[int | str] = [int(stem) for stem in stems if stem.isdecimal()]
        return numbers + [stem for stem in stems if not stem.isdecimal()]

    def _snapshot(self, name: int | str) -> Path:
        stem = f"{name:06d}" if isinstance(name, int) else name
        return self.path / "snapshots" / f"{stem}.safetensors"

    def _write(self, name: str, data: bytes) -> None:
        write_file(self.path / name, data)


def _packed(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2).encode()


def _versions() -> dict[str, str]:
    names = ("selfadapt", "torch", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
