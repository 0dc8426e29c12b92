"""Commands of a run: demo, adapt, select, report; adapters."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from selfadapt._adapt import adapt
from selfadapt._config import Config
from selfadapt._demo import run_demo
from selfadapt._disk import appearing
from selfadapt._errors import ConfigError, sentence
from selfadapt._monitors import EmbeddingDrift, FalseNegativeRate, Monitor
from selfadapt._options import make_parser, model_parser, open_model, refuse_empty
from selfadapt._registry import adapters
from selfadapt._report import write_report
from selfadapt._rundir import COMMAND, ORIGIN, REPEATS, RunDirectory
from selfadapt._wording import Parser


def demo_parser(_: Sequence[str]) -> Parser:
    parser = make_parser("demo", demo_command.__doc__)
    parser.add_argument("--out", type=str, default="selfadapt-demo", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on where it was interrupted")
    return parser


def demo_command(words: Sequence[str]) -> None:
    """Adapt the bundled network to a real image, offline, and write a report."""
    options = demo_parser(words).parse_args(words)
    run_demo(options.out, resume=options.resume)


def adapt_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("adapt", adapt_command.__doc__, words)
    add = parser.add_argument
    add("--out", type=str, required=True, help="RUN folder to write")
    add("--validation", type=str | None, help="held-out images (default: a share of the images)")
    names = Literal["auto", "embedding", "fn", "none"]
    add("--stop", type=names, default="auto", help="who decides (auto: the judge, if it can)")
    add("--tau", type=float | None, help="threshold of embedding (0.5) or fn (0.05)")
    add("--resume", action="store_true", help="go on with RUN, or start it")
    add("--calibrate", type=bool, default=True, help="find scale and polarity where not said")
    parser.add_class_arguments(Config)
    return parser


def adapt_command(words: Sequence[str]) -> bool:
    """Adapt a model to images without labels; the result is a RUN folder."""
    parser = adapt_parser(words)
    options = parser.parse_args(words)
    refuse_empty(options.out)
    config = Config(**{field.name: options[field.name] for field in fields(Config)})
    stop = _criterion(options.stop, options.tau)
    adapter, origin = open_model(parser.kind, options)
    repeat = options.clone()
    repeat.pop("resume")  # the file starts a run of its own
    began = shlex.join(["selfadapt", "adapt", *(word for word in words if word != "--resume")])
    notes = {ORIGIN: json.dumps(origin, indent=2), REPEATS: parser.dump(repeat), COMMAND: began}
    directory = RunDirectory(options.out, notes)
    result = adapt(
        adapter,
        options.images,
        validation=options.validation,
        config=config,
        stop=stop,
        output_dir=directory,
        resume=options.resume,
        channel_axis=options.channel_axis,
        calibrate=options.calibrate,
    )
    if result.input:
        print(f"Input:   {result.input}")
    print(f"Model:   {directory.model}")
    if usage := result.adapter.usage(directory.model):
        print(f"Use it:  {usage}")
    if find_spec("matplotlib"):
        print(f"Report:  {write_report(directory)}")
    else:
        print(f"Report:  pip install 'selfadapt[report]', then: selfadapt report {options.out}")
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {result.quality}")
    print(f"Verdict: {result.outcome}. {sentence(result.reason)}")
    return result.outcome != "not to be trusted"


def _criterion(stop: str, tau: float | None) -> Monitor | Literal["auto"] | None:
    kinds: dict[str, Callable[..., Monitor]] = {
        "embedding": EmbeddingDrift,
        "fn": FalseNegativeRate,
    }
    if stop in kinds:
        try:
            return kinds[stop]() if tau is None else kinds[stop](tau)
        except ConfigError as error:  # --threshold is an adapter's
            raise ConfigError(str(error).replace("threshold=", "tau=")) from None
    if tau is not None:
        raise ConfigError("--tau is the threshold of --stop embedding or fn: name one of them.")
    return "auto" if stop == "auto" else None


def select_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("select", select_command.__doc__, words)
    parser.add_argument("--out", type=str, required=True, help="model to write, as its family does")
    return parser


def select_command(words: Sequence[str]) -> None:
    """Save another snapshot of a RUN folder as a model of its own."""
    parser = select_parser(words)
    options = parser.parse_args(words)
    refuse_empty(options.out)
    target = Path(options.out)
    if target.exists():
        raise ConfigError(f"{options.out!r} exists already: give another --out.")
    adapter, told = open_model(parser.kind, options)
    with appearing(target) as partial:
        adapter.save(partial)
    print(f"Model:   {target}")
    if usage := adapter.usage(target):
        print(f"Use it:  {usage}")
    shell = ["selfadapt", "segment", "--adapter", told["adapter"], "--model", options.out]
    print(f"Shell:   {shlex.join(shell)}")


def report_parser(_: Sequence[str]) -> Parser:
    return make_parser("report", report_command.__doc__, run="RUN folder")


def report_command(words: Sequence[str]) -> None:
    """Draw the report of a RUN folder."""
    print(write_report(report_parser(words).parse_args(words).run))


def adapters_parser(_: Sequence[str]) -> Parser:
    return make_parser("adapters", adapters_command.__doc__)


def adapters_command(words: Sequence[str]) -> None:
    """List the adapters, and what is missing for them."""
    adapters_parser(words).parse_args(words)
    for name, missing in sorted(adapters().items()):
        print(f"{name:12} {missing or 'ready'}")
