"""`selfadapt demo`: the main job on real images that installed packages ship."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfadapt._adapt import adapt
from selfadapt._config import Config
from selfadapt._errors import AdapterNotFoundError, CheckpointError
from selfadapt._matching import Matches, match
from selfadapt._registry import load_adapter
from selfadapt._report import write_report
from selfadapt._rundir import RunDirectory


def demo_image() -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A real fluorescence image of nuclei, made as noisy as a third of its light would, and labels.

    The shift is simulated: of each gray value a third is taken as the mean number of photons,
    and the number is drawn from a Poisson distribution, always with the same seed.
    """
    try:
        from stardist.data import test_image_nuclei_2d
    except ModuleNotFoundError:
        raise AdapterNotFoundError(
            "the demo takes its image from the package stardist: pip install 'selfadapt[demo]'"
        ) from None
    image, labels = test_image_nuclei_2d(return_mask=True)
    photons: NDArray[Any] = np.random.default_rng(0).poisson(image / 3)
    return photons.astype(np.float32), labels.astype(np.int32)


def run_demo(out: str | Path, iterations: int = 200) -> None:
    """Adapt the bundled network to the demo image; write run and report to the folder `out`."""
    image, labels = demo_image()
    adapter = load_adapter("smp").from_pretrained("demo")
    config = Config(iterations=iterations, validate_every=20)
    try:
        RunDirectory(out).check(config, resume=False)
    except CheckpointError:
        raise CheckpointError(
            f"{str(out)!r} is not empty: give another folder, --out DIR."
        ) from None
    print(
        "Network  a small U-Net, trained on fluorescent nuclei of two other data sets\n"
        "Images   fluorescent nuclei, 512 x 512 (2018 Data Science Bowl, from the package\n"
        "         stardist), with simulated photon noise as in a third of the exposure\n"
        "Adapting without labels; this takes a few minutes on a CPU ...",
        flush=True,
    )
    result = adapt(adapter, image, config=config, output_dir=out)
    before = match(labels, adapter.segment(image))[0]
    after = match(labels, result.adapter.segment(image))[0]
    scores = [f"Before   {_score(before)}", f"After    {_score(after)}"]
    report = write_report(result.directory, scores)
    print("\n".join(scores))
    print(f"Verdict  {result.outcome}: {result.reason}")
    print(f"Report   {report}\nModel    {result.directory.model}")


def _score(counts: Matches) -> str:
    return (
        f"AP {counts.ap:.3f} at IoU 0.5 (precision {counts.precision:.3f}, recall "
        f"{counts.recall:.3f}; {counts.tp + counts.fn} annotated nuclei, used for scoring only)"
    )
