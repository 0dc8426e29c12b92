"""`selfadapt demo`: the main job on real images that installed packages ship."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from numpy.typing import NDArray

from selfadapt._adapt import adapt
from selfadapt._config import Config
from selfadapt._errors import AdapterNotFoundError, CheckpointError
from selfadapt._matching import Matches, match
from selfadapt._registry import load_adapter
from selfadapt._report import write_report
from selfadapt._rundir import RunDirectory
from selfadapt._tiles import resize_labels

ENLARGED = 1.5
"""Factor on the sides of the image."""


def demo_image() -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A real fluorescence image of nuclei, made hard, and its labels.

    It is as noisy as a third of its light would make it, half as large again as the network knows
    nuclei, and a negative, dark on bright. All three are simulated: of each gray value a third is
    taken as the mean number of photons, and the number is drawn from a Poisson distribution, always
    with the same seed.
    """
    try:
        from stardist.data import test_image_nuclei_2d
    except ModuleNotFoundError:
        raise AdapterNotFoundError(
            "the demo takes its image from the package stardist: pip install 'selfadapt[demo]'"
        ) from None
    image, labels = test_image_nuclei_2d(return_mask=True)
    size = [round(ENLARGED * n) for n in image.shape]
    large = skimage.transform.resize(image, size, order=1, preserve_range=True)
    photons: NDArray[Any] = np.random.default_rng(0).poisson(large / 3)
    negative = photons.max() - photons
    return negative.astype(np.float32), resize_labels(labels, (size[0], size[1]))


def run_demo(out: str | Path, iterations: int = 200, resume: bool = False) -> None:
    """Adapt the bundled network to the demo image; write run and report to the folder `out`."""
    image, labels = demo_image()
    adapter = load_adapter("smp").from_pretrained("demo")
    config = Config(iterations=iterations, validate_every=50, candidates="default,batch,teacher")
    if not resume:
        try:
            RunDirectory(out).check(config, resume=False)
        except CheckpointError:
            raise CheckpointError(
                f"{str(out)!r} is not empty: give another folder, --out DIR, or --resume to go on."
            ) from None
    print(
        "Network  a small U-Net, trained on fluorescent nuclei of two other data sets\n"
        "Image    fluorescent nuclei (2018 Data Science Bowl, from the package stardist), made\n"
        "         hard: a negative, half as large again, with the noise of a third of the light\n"
        "Finding scale and polarity, then adapting, without labels; a few minutes on a CPU ...",
        flush=True,
    )
    result = adapt(adapter, image, config=config, output_dir=out, resume=resume)
    found = result.adapter.input
    calibrated = adapter.with_input(replace(found, tta=False))
    stages = {"As it is": adapter, "Calibrated": calibrated, "Adapted": result.adapter}
    scores = [
        f"{name:<11}{_score(match(labels, stage.segment(image))[0])}"
        for name, stage in stages.items()
    ]
    report = write_report(result.directory, scores)
    print(f"Input    {result.input}")
    print("\n".join(scores))
    print(f"Verdict  {result.outcome}: {result.reason}")
    print(f"Report   {report}\nModel    {result.directory.model}")


def _score(counts: Matches) -> str:
    return (
        f"AP {counts.ap:.3f} at IoU 0.5 (precision {counts.precision:.3f}, recall "
        f"{counts.recall:.3f}; {counts.tp + counts.fn} annotated nuclei, used for scoring only)"
    )
