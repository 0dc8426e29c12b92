"""What the widget says, in words. Needs neither napari nor Qt."""

from selfadapt import AdaptationResult, Event, Quality, SelfAdaptError
from selfadapt._errors import sentence


def of_error(error: Exception) -> str:
    """An error, for a user; what is no mistake of theirs is called so."""
    if isinstance(error, SelfAdaptError):
        return sentence(str(error))
    told = f": {error}" if str(error) else ""
    return sentence(
        f"this has failed, in a way that was not foreseen ({type(error).__name__}{told}); napari's "
        "notification, or the terminal, has the details"
    )


def of_quality(quality: Quality) -> str:
    """What `check` has found."""
    return f"{of_ap(quality)} {sentence(quality.verdict)}"


def of_ap(quality: Quality) -> str:
    """The estimate."""
    return f"Expected AP at an IoU of 0.5, estimated without labels: {quality}."


def of_result(result: AdaptationResult) -> list[str]:
    """What a run has ended with: a headline, and a sentence for each thing that is known."""
    kept = result.candidate + (f", iteration {result.iteration}" if result.iteration else "")
    told = [result.outcome.capitalize(), sentence(result.reason), of_ap(result.quality)]
    if result.input:
        told.append(sentence(f"images go in at: {result.input}"))
    return [*told, f"Network: {kept}."]


def of_event(event: Event) -> str:
    """What is being done, beside a bar; QProgressBar puts numbers for %v and %m."""
    name = f", {event.candidate}" if event.candidate else ""
    return f"{event.stage}{name}: %v of %m"
