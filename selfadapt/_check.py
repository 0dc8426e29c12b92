"""Does a network work on these images? Asked before adapting, answered without labels."""

from typing import Any

from selfadapt._adapter import Adapter
from selfadapt._calibrate import search
from selfadapt._crops import evenly
from selfadapt._errors import ConfigError, ImageError
from selfadapt._events import Callback, Teller
from selfadapt._images import open_windows
from selfadapt._judge import Judge
from selfadapt._masks import refuse_masks
from selfadapt._quality import Quality, estimate


def estimate_quality(
    adapter: Adapter,
    images: Any,
    *,
    windows: int = 24,
    channel_axis: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Quality:
    """The AP to be expected of a network on images, with an interval, estimated without labels.

    docs/evidence.md shows how far the estimate is off, and where it is blind.

    Args:
        adapter: the network, and how images go into it.
        images: any source that `open_images` takes.
        windows: at most that many windows of the images are segmented, seven times each.
        channel_axis: see `open_images`.
        progress: whether a progress bar is shown.
        callback: is told of each window, by an `Event`; returning True cancels.

    Raises:
        SelfAdaptError: the images cannot be used, or the adapter cannot decode instances.
        RunCancelledError: the callback wanted it.
    """
    if windows < 1:
        raise ConfigError(f"windows={windows} is not allowed: it must be 1 or more.")
    if not adapter.can_decode:
        raise ConfigError(
            f"{type(adapter).__name__} cannot decode instances, and quality is judged by these: "
            "override its `decode`."
        )
    sources = open_windows(images, channel_axis=channel_axis)
    refuse_masks(sources)
    with Teller(progress=progress, callback=callback) as tell:
        if adapter.auto:
            adapter = search(adapter, sources, tell).adapter
        adapter.check(sources)
        seeing = evenly(sources, windows, blank_images=False)
        if not seeing:
            raise ImageError("all images are constant: there is nothing to see in them.")
        return estimate(Judge(seeing, windows=windows).look(adapter, adapter.model, tell))
