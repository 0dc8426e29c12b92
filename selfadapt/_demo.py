"""`selfadapt demo`: the main job on real images that installed packages ship."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from selfadapt._adapt import adapt
from selfadapt._config import Config
from selfadapt._errors import AdapterNotFoundError
from selfadapt._matching import Matches, match
from selfadapt._registry import load_adapter
from selfadapt._report import write_report

SHIFT = "defocus (Gaussian blur, sigma 1 px) and camera noise (sigma 10 of 235 gray values)"


def degrade(image: NDArray[Any]) -> NDArray[np.float32]:
    """The shift of the demo, added to a sharp image: the same for everybody."""
    blurred = ndimage.gaussian_filter(image.astype(np.float32), 1)
    noise = np.random.default_rng(0).normal(0, 10, image.shape)
    return np.asarray(blurred + noise, np.float32)


def run_demo(out: str | Path) -> None:
    """Adapt the bundled network to a degraded image of nuclei; write run and report to `out`."""
    try:
        from stardist.data import test_image_nuclei_2d
    except ModuleNotFoundError:
        raise AdapterNotFoundError(
            "the demo takes its image from the package stardist: pip install 'selfadapt[demo]'"
        ) from None
    sharp, labels = test_image_nuclei_2d(return_mask=True)
    image = degrade(sharp)
    adapter = load_adapter("smp").from_pretrained("demo")
    print(
        "Network: a small U-Net trained on the nuclei of two other laboratories.\n"
        "Image:   fluorescent nuclei, 512 x 512, from the package stardist (2018 Data Science\n"
        f"         Bowl), with {SHIFT} added."
    )
    result = adapt(adapter, image, config=Config(iterations=200, validate_every=20), output_dir=out)
    before = match(labels, adapter.segment(image))[0]
    after = match(labels, result.adapter.segment(image))[0]
    scores = [f"before: {_score(before)}", f"after:  {_score(after)}"]
    report = write_report(result.directory, scores)
    print("\n".join(scores))
    print(f"Stopped: {result.reason}.\nReport:  {report}\nModel:   {result.directory.model}")


def _score(counts: Matches) -> str:
    return (
        f"AP at IoU 0.5 {counts.ap:.3f} (precision {counts.precision:.3f}, "
        f"recall {counts.recall:.3f}; {counts.tp + counts.fn} annotated nuclei)"
    )
