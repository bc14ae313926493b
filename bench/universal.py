"""Universal noise by DeepFool, here and by the Adversarial Robustness Toolbox where it is installed (adversarial-robustness-toolbox), at
one size, with the same pictures, passes and inner attack: the share of unseen pictures that change class."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import numpy as np
import torch

from harness.context import Draws, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel, load_model
from harness.registry import load_registry
from harness_adversarial.universal import answers, universal_deepfool


def art_noise(model: LoadedModel, images: np.ndarray, eps: float, passes: int, wanted: float) -> torch.Tensor:
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x)

    classifier = PyTorchClassifier(
        Whole(), torch.nn.CrossEntropyLoss(), images.shape[1:], model.class_count, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = UniversalPerturbation(
        classifier, "deepfool", {"max_iter": 10, "epsilon": 0.02, "nb_grads": 10, "verbose": False}, delta=1 - wanted, max_iter=passes,
        eps=eps, norm=np.inf, batch_size=1, verbose=False,
    )  # fmt: skip
    attack.generate(images)
    return torch.from_numpy(np.asarray(attack.noise, np.float32)).reshape(images.shape[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits_cnn")
    parser.add_argument("--eps", type=float, default=32.0, help="in 255ths")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    registry, eps = load_registry(), options.eps / 255
    model = load_model(options.model, registry)
    train, unseen = (
        to_images(load_dataset(name, registry).pictures(model.input), model.device) for name in ("digits_train", "digits_test")
    )
    own = answers(model, unseen, batch=25)
    print("seed  here  ART  (share of unseen pictures that change class)")
    for seed in range(options.seeds):
        rows = np.random.default_rng(seed).permutation(len(train))[: options.count]
        images = train[rows]
        ours = universal_deepfool(model, images, eps, Draws(["noise"], model.device, model.dtype, seed), passes=options.passes, wanted=0.8)
        noises = [ours]
        if find_spec("art"):
            np.random.seed(seed)  # noqa: NPY002  # ART draws from the global generator
            noises.append(art_noise(model, images.numpy(), eps, options.passes, 0.8))
        shares = [float((answers(model, unseen, noise, batch=25) != own).float().mean()) for noise in noises]
        assert max(float(noise.abs().max()) for noise in noises) <= eps + 1e-6
        print(f"{seed:4}  " + "  ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
