"""Write the StarDist folders and outputs that tests compare with, by StarDist and TensorFlow.

    pip install 'tensorflow==2.15.*' stardist 'numpy<2'
    python tests/stardist_references/make.py

Networks have random weights; images are cut out of the one that StarDist ships.
"""

import json
from pathlib import Path

import numpy as np
from stardist.data import test_image_nuclei_2d
from stardist.models import Config2D, StarDist2D

HERE = Path(__file__).parent
SMALL = {"unet_n_filter_base": 4, "unet_n_depth": 2, "net_conv_after_unet": 8, "n_rays": 8}
CONFIGS = {
    "plain": {},
    "unequal": {"grid": (2, 1), "n_channel_in": 3, "n_classes": 2},
    "normalised": {"grid": (4, 4), "n_channel_in": 2, "unet_batch_norm": True, "unet_prefix": "u_"},
}


def main() -> None:
    whole = test_image_nuclei_2d()
    whole = (whole / np.percentile(whole, 99.8)).astype(np.float32)
    for name, config in CONFIGS.items():
        model = StarDist2D(Config2D(**SMALL, **config), name=name, basedir=str(HERE))
        rng = np.random.default_rng(len(name))
        weights = model.keras_model.get_weights()
        spread = [(2 / np.prod(w.shape[:-1])) ** 0.5 if w.ndim == 4 else 0.1 for w in weights]
        weights = [rng.normal(0, s, w.shape) for s, w in zip(spread, weights, strict=True)]
        if config.get("unet_batch_norm"):  # a variance is positive
            names = [w.name for w in model.keras_model.weights]
            weights = [
                abs(w) + 0.5 if "variance" in n else w for n, w in zip(names, weights, strict=True)
            ]
        model.keras_model.set_weights(weights)
        dist = model.keras_model.get_layer("dist")
        dist.set_weights([dist.get_weights()[0], dist.get_weights()[1] + 6])
        model.keras_model.save_weights(str(HERE / name / "weights_best.h5"))
        channels = config.get("n_channel_in", 1)
        image = np.stack([whole[40 * k : 40 * k + 47, 90:151] for k in range(channels)], -1)
        thresholds = {"prob": float(np.quantile(model.predict(image)[0], 0.6)), "nms": 0.35}
        (HERE / name / "thresholds.json").write_text(json.dumps(thresholds))
        model = StarDist2D(None, name=name, basedir=str(HERE))  # with these thresholds
        outputs = dict(zip(("prob", "dist", "prob_class"), model.predict(image), strict=False))
        outputs["labels"] = model.predict_instances(image)[0]
        np.savez_compressed(HERE / name / "outputs.npz", image=image, **outputs)
        print(name, {key: value.shape for key, value in outputs.items()}, outputs["labels"].max())


if __name__ == "__main__":
    main()
