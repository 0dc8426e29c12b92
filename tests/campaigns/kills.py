"""Runs that are killed or hindered, and resumed, must end as they would have.

    python tests/campaigns/kills.py [--random 60] [--out FILE.json]

A run of seconds is killed (SIGKILL) before each of its writes, renames and flushes to the disk, at
random moments, and twice in a row; it meets a full disk at each write (a limit of the file size
that the system enforces), its folder vanishes, an image vanishes, another run wants its folder, and
it is asked to end. After each, nothing under a valid name may be torn, and the resumed run must end
with the same bytes as one that nothing happened to. POSIX only: it forks.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tifffile
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import discs, trained_adapter

from selfadapt import Config, SelfAdaptError, adapt

SETTINGS = Config(
    iterations=12, batch_size=2, crop=32, views=2, validate_every=3, learning_rate=1e-3,
    device="cpu", validation_images=2, candidates="default,gentle,teacher",
)  # fmt: skip
FAULTS = ("replace", "fsync", "open", "unlink", "mkdir")
"""Calls of the operating system before which a run is killed."""


class Place:
    """Images, and folders for runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"
        self.images.mkdir()
        for k in range(6):
            tifffile.imwrite(self.images / f"{k}.tif", discs(k)[0])
        self.adapter = trained_adapter()
        self.count = 0

    def folder(self) -> Path:
        self.count += 1
        return self.root / f"run{self.count}"

    def run(self, folder: Path, *, resume: bool = True) -> None:
        adapt(self.adapter, self.images, config=SETTINGS, output_dir=folder, resume=resume,
              progress=False)  # fmt: skip


def child(work: Callable[[], None], log: Path) -> int:
    """Fork; the process id. It exits with 0, 2 for a sentence of ours, 1 for any other error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except SelfAdaptError as error:
        print(f"sentence: {error}", flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # everything else is a failure, and shown
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(number: int, calls: list[int]) -> None:
    """Let this process be killed before the call of that number; 0 only counts."""
    original = {name: getattr(os, name) for name in FAULTS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original[name](*args, **kwargs)

        return call

    for name in FAULTS:
        setattr(os, name, counted(name))


def written_out(value: object) -> str:
    """Everything in it, tensors bit for bit."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return "".join(f"{key}:{written_out(each)};" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(written_out, value))
    return repr(value)


def whole(folder: Path) -> dict[str, str]:
    """Checksum of each file under a valid name; an error if one of them is torn."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".lock" or ".partial" in name or ".old" in name:
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt" or path.name == "model":  # pickle writes equal things unequally
            content = written_out(torch.load(path, weights_only=True)).encode()
        elif path.suffix == ".csv":
            assert content.endswith(b"\n")
        elif path.suffix == ".tif":
            tifffile.imread(path)
        sums[name] = hashlib.sha256(content).hexdigest()
    return sums


class Campaign:
    """Counts what was tried, and what went wrong."""

    def __init__(self, place: Place) -> None:
        self.place, self.tried, self.failed = place, Counter[str](), []
        self.log = place.root / "log"
        folder = place.folder()
        calls = [0]

        def counting() -> None:
            dying_at(0, calls)
            place.run(folder)
            (place.root / "calls").write_text(str(calls[0]))

        assert ended(child(counting, self.log)) == 0, self.log.read_text()
        self.calls = int((place.root / "calls").read_text())
        self.expected = whole(folder)

    def after(self, kind: str, folder: Path, detail: object, wrong: str = "") -> None:
        """Resume, and compare."""
        self.tried[kind] += 1
        try:
            if folder.exists():
                whole(folder)
        except Exception as error:
            wrong = wrong or f"torn: {error}"
        if not wrong:
            code = ended(child(lambda: self.place.run(folder), self.log))
            if code:
                wrong = f"resume ended with {code}: {self.log.read_text()[-300:]}"
            elif (found := whole(folder)) != self.expected:
                differ = {
                    n for n in {**found, **self.expected} if found.get(n) != self.expected.get(n)
                }
                wrong = f"another end: {sorted(differ)}"
        if wrong:
            self.failed.append(f"{kind} {detail}: {wrong}")
            print(self.failed[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)

    def killed_at_calls(self) -> None:
        for number in range(1, self.calls + 1):
            folder = self.place.folder()

            def dying(folder: Path = folder, number: int = number) -> None:
                dying_at(number, [0])
                self.place.run(folder)

            code = ended(child(dying, self.log))
            self.after("kill before a call", folder, number, "" if code == -9 else f"ended {code}")

    def killed_at_random(self, count: int, rng: random.Random) -> None:
        began = time.perf_counter()
        assert ended(child(lambda: self.place.run(self.place.folder()), self.log)) == 0
        lasts = time.perf_counter() - began
        for _ in range(count):
            folder, moments = self.place.folder(), [rng.uniform(0, lasts) for _ in range(2)]
            for moment in moments:  # the second one hits the resumed run
                pid = child(lambda folder=folder: self.place.run(folder), self.log)
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
                ended(pid)
            self.after("kill twice at random", folder, [round(m, 2) for m in moments])

    def full_disk(self) -> None:
        for limit in (100, 300, 1000, 3000, 6000, 10_000, 20_000, 40_000, 60_000):
            folder = self.place.folder()

            def limited(folder: Path = folder, limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                self.place.run(folder)

            code = ended(child(limited, self.log))
            told = self.log.read_text()
            wrong = "" if code == 0 or "cannot be written" in told else f"{code}: {told[-300:]}"
            self.after("full disk", folder, limit, wrong)

    def refused(self, kind: str, number: int) -> None:
        """A read-only file system: the call of that number fails for good."""
        folder = self.place.folder()

        def failing() -> None:
            calls = [0]
            original = os.replace

            def call(*args: Any, **kwargs: Any) -> None:
                calls[0] += 1
                if calls[0] >= number:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                original(*args, **kwargs)

            os.replace = call
            self.place.run(folder)

        code = ended(child(failing, self.log))
        told = self.log.read_text()
        fine = code == 2 and "cannot be written (Read-only file system)" in told
        self.after(kind, folder, number, "" if fine else f"{code}: {told[-300:]}")

    def asked_to_end(self, which: signal.Signals, moment: float) -> None:
        folder = self.place.folder()

        def handled() -> None:
            signal.signal(which, signal.default_int_handler)
            self.place.run(folder)

        pid = child(handled, self.log)
        time.sleep(moment)
        os.kill(pid, which)
        code = ended(pid)
        told = f"{code}: {self.log.read_text()[-300:]}"
        self.after(which.name, folder, moment, "" if code in (0, 130) else told)

    def two_at_once(self) -> None:
        folder = self.place.folder()
        logs = [self.place.root / f"log{k}" for k in range(2)]
        pids = [child(lambda: self.place.run(folder), log) for log in logs]
        codes = sorted(ended(pid) for pid in pids)
        told = " ".join(log.read_text() for log in logs)
        # the later one is refused, or comes when the first has ended, and gives its result again
        fine = codes == [0, 0] or (codes == [0, 2] and "another process is at work" in told)
        self.after("two at once", folder, codes, "" if fine else told[-300:])

    def vanishing(self, moment: float, what: str) -> None:
        folder, kept = self.place.folder(), self.place.root / "kept"
        pid = child(lambda: self.place.run(folder), self.log)
        time.sleep(moment)
        if what == "folder":
            shutil.rmtree(folder, ignore_errors=True)
        else:
            (self.place.images / "3.tif").rename(kept)
        code = ended(pid)
        if what != "folder":
            kept.rename(self.place.images / "3.tif")
        told = self.log.read_text()
        self.after(f"{what} vanishes", folder, moment, "" if code in (0, 2) else told[-300:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=60, help="how many random kills, twice each")
    parser.add_argument("--out", type=Path, help="file for what was tried and what failed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(Place(Path(root)))
        print(f"{campaign.calls} calls to the operating system that write", flush=True)
        campaign.killed_at_calls()
        campaign.killed_at_random(args.random, rng)
        campaign.full_disk()
        for number in range(1, 20, 3):
            campaign.refused("read-only", number)
        for which in (signal.SIGINT, signal.SIGTERM):
            for moment in (0.1, 0.4, 0.8, 1.2):
                campaign.asked_to_end(which, moment)
        for _ in range(6):
            campaign.two_at_once()
        for moment in (0.1, 0.3, 0.6, 0.9):
            campaign.vanishing(moment, "folder")
            campaign.vanishing(moment, "image")
    told = {"tried": dict(campaign.tried), "failed": campaign.failed}
    print(json.dumps(told, indent=2))
    if args.out:
        args.out.write_text(json.dumps(told, indent=2) + "\n")
    raise SystemExit(1 if campaign.failed else 0)


if __name__ == "__main__":
    main()
