"""AP before and after, through the shell only: adapt, evaluate, for two networks and two data sets.

    python benchmarks/before_after.py --shared ../shared --out runs/before_after

Networks: the bundled one, and the third-party TorchScript U-Net `unet2d_nuclei_broad`. Targets:
`fluo256` and `he` (H&E as inverted gray) of dsb2018. Every third image is scored and the others
are adapted to. The criterion is the default (embedding drift), and the FN rate for TorchScript,
which has no embedding. Finished runs are kept; a second call goes on.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from common import shell

NETWORKS: dict[str, list[str]] = {
    "bundled U-Net": ["--model", "demo"],
    "unet2d_nuclei_broad": [
        "--model", "{shared}/models/unet2d_nuclei_broad/weights_abe6.pt",
        "--heads", "foreground", "--activated", "true", "--normalize", "standard",
        "--size_multiple", "8",
    ],
}  # fmt: skip
TARGETS = {"fluo256": [], "he": ["--gray", "inverted"]}


def split(source: Path, target: Path) -> None:
    """Copy every third image to test/, the others to train/."""
    for k, image in enumerate(sorted((source / "images").iterdir())):
        part = target / ("test" if k % 3 == 0 else "train")
        for kind in ("images", "masks"):
            (part / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / kind / image.name, part / kind / image.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    print("| network | target | seed | AP before | AP after | stop | kept iteration |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for target, conversion in TARGETS.items():
        data = args.out / "data" / target
        if not data.exists():
            split(args.shared / "data" / "dsb2018" / target, data)
        test = ["--images", str(data / "test/images"), "--masks", str(data / "test/masks")]
        for network, template in NETWORKS.items():
            model = ["--adapter", "smp", *(w.format(shared=args.shared) for w in template)]
            model += conversion
            stop = "fn" if "activated" in str(template) else "embedding"
            before = json.loads(shell("evaluate", *model, *test))
            for seed in args.seeds:
                run = args.out / f"{network.replace(' ', '_')}-{target}-{seed}"
                shell(
                    "adapt", *model, "--images", str(data / "train/images"), "--out", str(run),
                    "--stop", stop, "--seed", str(seed), "--iterations", str(args.iterations),
                    "--resume",
                )  # fmt: skip
                after = json.loads(shell("evaluate", "--model", str(run), *test))
                result: dict[str, Any] = json.loads((run / "result.json").read_text())
                print(
                    f"| {network} | {target} | {seed} | {before['ap50']:.3f} | "
                    f"{after['ap50']:.3f} | {stop} | {result['iteration']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
