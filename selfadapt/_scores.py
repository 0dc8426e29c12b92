"""Scores of `evaluate`: of all images together, and a table with a row for each."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfadapt._matching import Matches

IOUS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
Row = tuple[str, Sequence[Matches] | str]
"""The name of an image, and its matches at the thresholds `IOUS`, or why it was left out."""


def summarise(per_image: Sequence[Sequence[Matches]]) -> dict[str, Any]:
    """Scores of all images from the matches of each at the thresholds `IOUS`.

    `ap` and `ap50` pool the counts of all images; `ap50_image_mean` averages the images' AP.
    Scores of nothing (no instance on either side) are null.
    """
    pooled = [sum(column, Matches()) for column in zip(*per_image, strict=True)]
    means = [matches[0].ap for matches in per_image if not math.isnan(matches[0].ap)]
    at50 = pooled[0]
    return {
        "ap50": _number(at50.ap),
        "ap50_image_mean": _number(float(np.mean(means)) if means else math.nan),
        "ap": {str(iou): _number(counts.ap) for iou, counts in zip(IOUS, pooled, strict=True)},
        "precision50": _number(at50.precision),
        "recall50": _number(at50.recall),
        "images": len(per_image),
        "instances": at50.tp + at50.fn,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


COLUMNS = (
    "image", "ap50", "precision50", "recall50", "f1_50", "tp50", "fp50", "fn50", "ap_mean",
    "instances", "found", "left_out",
)  # fmt: skip


def to_csv(rows: Sequence[Row]) -> bytes:
    """The table, in UTF-8: a row for each image, in their order.

    `ap_mean` averages the image's AP over `IOUS`; `instances` are in the mask, `found` by the
    model. What is not defined (the recall where the mask is empty) is empty, and so is all of an
    image that was left out but the reason.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for name, result in rows:
        scores = {"left_out": result} if isinstance(result, str) else _scores(result)
        table.writerow({"image": name} | scores)
    return text.getvalue().encode()


def _scores(matches: Sequence[Matches]) -> dict[str, Any]:
    at50 = matches[0]
    return {
        "ap50": _number(at50.ap),
        "precision50": _number(at50.precision),
        "recall50": _number(at50.recall),
        "f1_50": _number(at50.f1),
        "tp50": at50.tp,
        "fp50": at50.fp,
        "fn50": at50.fn,
        "ap_mean": _number(float(np.mean([each.ap for each in matches]))),
        "instances": at50.tp + at50.fn,
        "found": at50.tp + at50.fp,
    }
