"""Networks in files: folders of SMP's `save_pretrained`, and TorchScript."""

import json
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from selfadapt import ModelError

FILES = ("config.json", "model.safetensors")
"""What `save_pretrained` writes."""
SIDECAR = "selfadapt.json"
"""Beside SMP's own files: what SMP's format does not say (heads, normalisation, decoding)."""
OLD_GRAY = {"no": (False, False), "yes": (True, False), "inverted": (True, True)}
"""What a sidecar of version 0.1 calls gray: (gray, invert)."""
LARGEST = 8192
"""No number in the description of a network is larger: it would only fill the memory."""


def _check_config(config: Any) -> None:
    """Raise ValueError where a network's own description leads elsewhere, or beyond all bounds."""
    values = list(config.values()) if isinstance(config, dict) else config
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, dict | list):
            _check_config(value)
        elif isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"it holds {value}, more than {LARGEST}")
        elif isinstance(value, str) and re.search("hf[-_]hub:|local-dir:|://", value):
            raise ValueError(f"it leads to {value!r}")


def torchscript_warnings_off() -> "warnings.catch_warnings[None]":
    """Torch deprecates TorchScript; whoever has such a file cannot act on that here."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


def open_network(path: Path, *, trusted: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the options that the file beside it names."""
    if not path.exists():
        raise ModelError(
            f"there is no model {str(path)!r}: give 'demo', a folder written by save_pretrained, "
            "or a TorchScript file."
        )
    if not path.is_dir() and not trusted:  # whatever is in it: loading it would run it
        raise ModelError(
            f"{str(path)!r} is no folder of SMP's save_pretrained. If it is a TorchScript file: "
            "that is a program, which may do whatever you may do; if you trust its maker, give "
            "trust_torchscript=True (shell: --trust_torchscript true). For another network use "
            "SmpAdapter(your_module, ...) from Python."
        )
    try:
        if path.is_dir():
            missing = [name for name in FILES if not (path / name).is_file()]
            if missing:  # of a folder without them SMP asks the Hugging Face Hub
                raise FileNotFoundError(f"it has no {missing[0]}")
            _check_config(json.loads((path / FILES[0]).read_text()))
            with redirect_stdout(None):  # it prints where it loads from
                # its weights come from the folder, and none from the internet
                network = smp.from_pretrained(str(path), encoder_weights=None)
            sidecar = path / SIDECAR
            options = json.loads(sidecar.read_text()) if sidecar.exists() else {}
            if not isinstance(options, dict):
                raise ValueError(f"{SIDECAR} holds no options")
            if options.get("gray") in OLD_GRAY:
                options["gray"], options["invert"] = OLD_GRAY[options["gray"]]
            return network, options
        with torchscript_warnings_off():
            return torch.jit.load(str(path), map_location="cpu"), {}
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{str(path)!r} is neither a folder of SMP's save_pretrained nor a TorchScript file "
            f"({reason}); for another network use SmpAdapter(your_module, ...) from Python."
        ) from None
